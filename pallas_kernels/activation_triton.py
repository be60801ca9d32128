"""SwiGLU's middle and FP8 quantisation in one Triton kernel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_triton import quantized, quantized_shapes
from pallas_kernels.row_tile import RowTile, row_tile
from pallas_kernels.triton import launch, load, store


def silu_mul(gate_up: jax.Array, *, quantize: bool, interpret: bool) -> list[jax.Array]:
    """[hidden], or with `quantize` its values and scales; as `activation.silu_mul`."""
    tokens, _, width = gate_up.shape
    tile = row_tile(width)
    plain = [jax.ShapeDtypeStruct((tokens, width), gate_up.dtype)]
    return launch(
        partial(_kernel, tile=tile),
        [gate_up],
        quantized_shapes(tokens, width) if quantize else plain,
        grid=tile.grid(tokens),
        name="silu_mul",
        warps=tile.warps,
        interpret=interpret,
    )


def _kernel(gate_up_ref, out_ref, *scale_refs, tile: RowTile) -> None:
    tokens, _, width = gate_up_ref.shape
    row, column = tile.places()
    real = (row < tokens) & (column < width)
    gate, up = (
        load(gate_up_ref.at[row, half, column], mask=real, other=0).astype(jnp.float32)
        for half in (0, 1)
    )
    hidden = (jax.nn.silu(gate) * up).astype(gate_up_ref.dtype)
    if scale_refs:
        hidden, scale = quantized(hidden.astype(jnp.float32))
        store(scale_refs[0].at[row, 0], scale, mask=row < tokens)
    store(out_ref.at[row, column], hidden, mask=real)
