"""Residual add, RMSNorm and FP8 quantisation in one Triton kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_triton import quantized, quantized_shapes
from pallas_kernels.row_tile import RowTile, row_tile
from pallas_kernels.triton import launch, load, store


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    eps: float,
    *,
    quantize: bool,
    interpret: bool,
) -> list[jax.Array]:
    """[y, residual], and the values and scales of y with `quantize`; as `norm.add_rms_norm`."""
    tokens, columns = x.shape
    tile = row_tile(columns)
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return launch(
        partial(_kernel, tile=tile, eps=eps),
        [x, residual, weight],
        [like_x, like_x, *(quantized_shapes(tokens, columns) if quantize else [])],
        grid=tile.grid(tokens),
        name="add_rms_norm",
        warps=tile.warps,
        interpret=interpret,
    )


def _kernel(
    x_ref, residual_ref, weight_ref, y_ref, sum_ref, *quantized_refs, tile: RowTile, eps: float
) -> None:
    tokens, columns = x_ref.shape
    dtype = x_ref.dtype
    row, column = tile.places()
    real = (row < tokens) & (column < columns)

    def read(ref) -> jax.Array:
        return load(ref.at[row, column], mask=real, other=0).astype(jnp.float32)

    weight = load(weight_ref.at[column], mask=column < columns, other=0).astype(dtype)
    total = (read(x_ref) + read(residual_ref)).astype(dtype)
    store(sum_ref.at[row, column], total, mask=real)

    total32 = total.astype(jnp.float32)
    variance = jnp.sum(jnp.square(total32), axis=1)[:, None] / columns
    normed = (total32 * jax.lax.rsqrt(variance + eps)).astype(dtype).astype(jnp.float32)
    y = (normed * weight.astype(jnp.float32)).astype(dtype)
    store(y_ref.at[row, column], y, mask=real)
    if quantized_refs:
        values_ref, scale_ref = quantized_refs
        values, scale = quantized(y.astype(jnp.float32))
        store(values_ref.at[row, column], values, mask=real)
        store(scale_ref.at[row, 0], scale, mask=row < tokens)
