"""The one place that touches Pallas' Triton interface, which moves with each release of JAX."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

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
        _check_addresses(name, array)
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


def _check_addresses(name: str, array: Any) -> None:
    """Pallas takes 64-bit offsets from 2^32 bytes on, and signed 32-bit ones below."""
    elements, size = math.prod(array.shape), math.prod(array.shape) * array.dtype.itemsize
    if elements > 2**31 and size <= 2**32:
        raise ValueError(
            f"{name}: an array {list(array.shape)} of {array.dtype} has more than 2^31 elements in "
            "no more than 2^32 bytes, which a Triton kernel would address wrongly; shard it "
            "further, or choose another size"
        )


def _whole(array: Any, grid_axes: int) -> pl.BlockSpec:
    zeros = (0,) * len(array.shape)
    return pl.BlockSpec(array.shape, lambda *ids: zeros)
