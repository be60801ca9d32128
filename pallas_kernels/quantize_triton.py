"""Rows to FP8 in one Triton kernel, and the step of it that other kernels end with."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.fp8 import FP8, FP8_MAX, to_fp8
from pallas_kernels.row_tile import RowTile, row_tile
from pallas_kernels.triton import launch, load, store


def quantize_rows(
    x: jax.Array, block: int | None, *, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    """x [T, K] to float8_e4m3fn [T, K] and float32 scales [T, B]; as `linear.quantize_rows`."""
    tokens, columns = x.shape
    block = min(block or columns, columns)
    groups = pl.cdiv(columns, block)
    tile = row_tile(block)
    values, scale = launch(
        partial(_kernel, tile=tile, block=block),
        [x],
        quantized_shapes(tokens, columns, groups),
        grid=tile.grid(tokens * groups),
        name="quantize_rows",
        warps=tile.warps,
        interpret=interpret,
    )
    return values, scale


def quantized_shapes(tokens: int, columns: int, groups: int = 1) -> list[jax.ShapeDtypeStruct]:
    """Of values [T, K] and scales [T, B]."""
    return [
        jax.ShapeDtypeStruct((tokens, columns), FP8),
        jax.ShapeDtypeStruct((tokens, groups), jnp.float32),
    ]


def quantized(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In a kernel: float32 [R, W], zero where there is nothing, to values [R, W], scales [R, 1]."""
    peak = jnp.max(jnp.abs(rows), axis=1)[:, None]
    scale = jnp.where(peak > 0, peak / FP8_MAX, 1.0)
    return to_fp8(rows / scale), scale


def _kernel(x_ref, values_ref, scale_ref, *, tile: RowTile, block: int) -> None:
    """A row of the tile is one group of `block` columns of one token."""
    tokens, columns = x_ref.shape
    groups = scale_ref.shape[1]
    row, place = tile.places()
    token, group = row // groups, row % groups
    column = group * block + place
    real = (token < tokens) & (place < block) & (column < columns)
    x = load(x_ref.at[token, column], mask=real, other=0).astype(jnp.float32)
    values, scale = quantized(x)
    store(values_ref.at[token, column], values, mask=real)
    store(scale_ref.at[token, group], scale, mask=token < tokens)
