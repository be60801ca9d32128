"""A quantised weight is a pytree, and one `matmul` understands it: layers never ask for a dtype."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax

from pallas_kernels.linear import linear, scaled_linear


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantArray:
    """FP8 weights with their scales.

    Attributes:
        values: float8_e4m3fn [..., out, in].
        scale: float32 [..., out, ceil(in / block)].
        block: columns of one output channel that share a scale; None: all of them.
    """

    values: Any
    scale: Any
    block: int | None = field(default=None, metadata={"static": True})


Weight = jax.Array | QuantArray


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """x [T, in] times weight [..., out, in] -> [T, ..., out] in x's dtype."""
    if isinstance(weight, QuantArray):
        return scaled_linear(x, weight.values, weight.scale, weight.block)
    return linear(x, weight)
