"""The grouped expert MLP from kernels: two grouped matmuls, and what carries rows there and back.

    align -> gather_rows -> grouped_matmul -> silu_mul -> grouped_matmul -> combine

Rows of blocks without an expert are computed by nobody: they hold anything, and no place names
them. FP8 weights get quantised rows, in one kernel with what makes them where that can be.
"""

from __future__ import annotations

from functools import partial

import jax

from pallas_kernels.activation import silu_mul
from pallas_kernels.backend import Backend
from pallas_kernels.dispatch import align, combine, gather_rows
from pallas_kernels.grouped_matmul import choose_tiles, grouped_matmul
from pallas_kernels.linear import QuantRows, quantize_rows

Experts = tuple[jax.Array, jax.Array | None, jax.Array, jax.Array | None]


def grouped_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    experts: Experts,
    shared: jax.Array | None,
    quantized: QuantRows | None,
    *,
    block: int | None,
    ways: int,
    backend: Backend,
) -> jax.Array:
    """`moe.grouped_mlp`; experts are (gate_up, its scale, down, its scale).

    Between kernels rows are in x's dtype; each sum is accumulated in float32.
    """
    gate_up, gate_up_scale, down, down_scale = experts
    num_experts, _, width, hidden = gate_up.shape
    joined = gate_up.reshape(num_experts, 2 * width, hidden)
    shapes = (num_experts, 2 * width, hidden), (num_experts, hidden, width)
    expected_rows = -(-ids.size // ways)
    tiles = choose_tiles(expected_rows, *shapes, gate_up.dtype, backend, block)
    alignment = align(ids, num_experts, tiles[0].block_rows, backend=backend)
    product = partial(
        _product, alignment=alignment, block=block, out_dtype=x.dtype, backend=backend
    )
    rows: jax.Array | QuantRows = x
    if gate_up_scale is not None:
        gate_up_scale = gate_up_scale.reshape(num_experts, 2 * width, -1)
        rows = quantize_rows(x, block, backend=backend) if quantized is None else quantized
    rows = gather_rows(rows, alignment, ids.shape[1], backend=backend)
    both = product(rows, joined, gate_up_scale, tile=tiles[0]).reshape(-1, 2, width)
    activated = _activate(both, down_scale is not None, block, backend)
    out = product(activated, down, down_scale, tile=tiles[1])
    dtype = out.dtype if shared is not None else "float32"
    return combine(out, alignment.places, weights, shared, dtype=dtype, backend=backend)


def _activate(
    gate_up: jax.Array, quantize: bool, block: int | None, backend: Backend
) -> jax.Array | QuantRows:
    if not quantize or block is None:
        return silu_mul(gate_up, quantize=quantize, backend=backend)
    return quantize_rows(silu_mul(gate_up, backend=backend), block, backend=backend)


def _product(rows, weight, scale, *, alignment, tile, block, out_dtype, backend) -> jax.Array:
    values, x_scale = rows if isinstance(rows, QuantRows) else (rows, None)
    return grouped_matmul(
        values,
        weight,
        alignment.experts,
        alignment.num_blocks,
        tile,
        x_scale=x_scale,
        w_scale=scale,
        block=block,
        out_dtype=out_dtype,
        backend=backend,
    )
