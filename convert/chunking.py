"""How stored arrays are cut into chunks, so that a device of any mesh reads about its part only.

A device has a part of the width of all experts, or whole experts. So experts are cut both ways, but
into fewer parts by number: each cut multiplies the files.
"""

from __future__ import annotations

import math

import numpy as np

from glmjax.config import ModelConfig
from glmjax.model.spec import ParamSpec
from glmjax.sharding import partition_spec

MIN_CHUNK_BYTES = 1 << 18
MAX_CHUNK_BYTES = 1 << 26
_COMMON_PARTS = 16
_EXPERT_AXIS, _EXPERT_PARTS = "experts", 8  # as many as devices of a machine


def tensor_parts(config: ModelConfig) -> int:
    """Into how many parts to cut a sharded axis.

    A tensor-parallel size divides the KV heads or is a multiple of them, which repeats them. This
    many parts divide evenly over each of the former; 16 at least, for the smallest of the latter.
    """
    return math.lcm(_COMMON_PARTS, config.num_key_value_heads)


def chunk_shape(spec: ParamSpec, parts: int) -> tuple[int, ...]:
    """Cut the sharded axis into up to `parts`, experts into up to 8; halve chunks still too large.

    Chunks below MIN_CHUNK_BYTES would cost more in files than they save in reading; those above
    MAX_CHUNK_BYTES would cost memory. Every chunk divides the shape.
    """
    chunks = list(spec.shape)
    item_bytes = np.dtype(spec.dtype).itemsize
    cuts = {i: parts for i, axis in enumerate(partition_spec(spec.axes)) if axis is not None}
    cuts |= {i: _EXPERT_PARTS for i, axis in enumerate(spec.axes) if axis == _EXPERT_AXIS}
    for axis, most in cuts.items():
        chunks[axis] //= _pieces(chunks[axis], most, math.prod(chunks) * item_bytes)
    for axis, extent in enumerate(chunks):
        while math.prod(chunks) * item_bytes > MAX_CHUNK_BYTES and extent % 2 == 0:
            extent = chunks[axis] = extent // 2
    return tuple(chunks)


def _pieces(extent: int, parts: int, size_bytes: int) -> int:
    """The most pieces of at least MIN_CHUNK_BYTES, a divisor of `parts` and of `extent`."""
    common = math.gcd(extent, parts)
    most = max(1, size_bytes // MIN_CHUNK_BYTES)
    return max(n for n in range(1, common + 1) if common % n == 0 and n <= most)
