"""The one place that touches Pallas' Triton interface, which moves with each release of JAX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

load, store = plgpu.load, plgpu.store


def launch(
    kernel: Callable[..., None],
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    name: str,
    warps: int = 4,
    stages: int = 1,
    aliases: Mapping[int, int] | None = None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Run a kernel whose references are whole arrays: programs find their part by their ids.

    Args:
        kernel: (*input references, *output references) -> None.
        aliases: inputs by place that are updated in place, to the outputs that they become.
        interpret: run on a CPU. There blocks are whole arrays, copied for each program: keep small.

    Raises:
        ValueError: an array that a kernel could not address.
    """
    for array in (*inputs, *outputs):
        check_addresses(name, array.shape, array.dtype)
    call = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[_whole(array, len(grid)) for array in inputs],
        out_specs=[_whole(array, len(grid)) for array in outputs],
        out_shape=list(outputs),
        input_output_aliases=dict(aliases or {}),
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )
    return call(*inputs)


def check_addresses(name: str, shape: tuple[int, ...], dtype: DTypeLike) -> None:
    """Raise ValueError for an array of whose elements a kernel would miss some.

    Pallas computes offsets, in elements, with 64 bits where an array is larger than 2^32 bytes, and
    with 32 bits and a sign where it is not.
    """
    elements, dtype = math.prod(shape), jnp.dtype(dtype)
    if elements > 2**31 and elements * dtype.itemsize <= 2**32:
        raise ValueError(
            f"{name}: an array {list(shape)} of {dtype} has more than 2^31 elements in "
            "no more than 2^32 bytes, which a Triton kernel would address wrongly; shard it "
            "further, or of a pool take fewer pages, or more"
        )


def _whole(array: Any, grid_axes: int) -> pl.BlockSpec:
    zeros = (0,) * len(array.shape)
    return pl.BlockSpec(array.shape, lambda *ids: zeros)
