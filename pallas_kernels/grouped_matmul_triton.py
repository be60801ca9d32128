"""Grouped matmul through Triton: any sizes and dtypes, and scales of blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.triton import launch, load, store


def grouped_triton(
    x: jax.Array,
    w: jax.Array,
    experts: jax.Array,
    num_blocks: jax.Array,
    scales: tuple[jax.Array, ...] = (),
    *,
    block_rows: int,
    block_n: int,
    block_k: int,
    stages: int,
    warps: int,
    block: int | None = None,
    out_dtype: Any = jnp.bfloat16,
    interpret: bool = False,
) -> jax.Array:
    """`grouped_matmul` with a program for each tile of the output.

    Args:
        x: [P, K].
        w: [E, N, K], of x's dtype.
        experts: int32 [P / block_rows].
        num_blocks: int32 [1].
        scales: of FP8, x's float32 [P, B] and w's float32 [E, N, B].
        block: columns that share a scale, divisible by block_k; None: B = 1.

    Returns:
        [P, N]; rows beyond the first num_blocks blocks are undefined.
    """
    P, N = x.shape[0], w.shape[1]
    if block is not None and block % block_k:
        raise ValueError(f"steps of {block_k} columns do not divide blocks of {block}")
    kernel = partial(_kernel, tile=(block_rows, block_n, block_k), block=block)
    [out] = launch(
        kernel,
        [experts, num_blocks, x, w, *scales],
        [jax.ShapeDtypeStruct((P, N), out_dtype)],
        # Tiles of a block of rows run one after another: its rows stay in the cache.
        grid=(pl.cdiv(N, block_n), P // block_rows),
        name=f"grouped_triton_{w.dtype.name}_{block_rows}x{block_n}x{block_k}",
        warps=warps,
        stages=stages,
        interpret=interpret,
    )
    return out


def _kernel(experts, num_blocks, x, w, *refs, tile, block):
    *scales, out = refs
    block_rows, block_n, block_k = tile
    N, K = w.shape[1:]
    n, b = pl.program_id(0), pl.program_id(1)

    @pl.when(b < num_blocks[0])
    def _():
        expert = experts[b]
        rows = b * block_rows + _range(block_rows)
        columns = n * block_n + _range(block_n)
        real = columns < N

        def step(i, sums):
            k = i * block_k + _range(block_k)
            inside = k < K
            x_tile = _read(x, (rows[:, None], k[None, :]), inside[None, :])
            w_tile = _read(w, (expert, columns[:, None], k[None, :]), real[:, None] & inside)
            part = _product(x_tile, w_tile)
            if block is None:
                return sums + part
            return sums + _scaled(part, scales, expert, rows, columns, i * block_k // block)

        sums = jnp.zeros((block_rows, block_n), jnp.float32)
        sums = jax.lax.fori_loop(0, pl.cdiv(K, block_k), step, sums)
        if block is None:
            sums = _scaled(sums, scales, expert, rows, columns, 0)
        at = out.at[rows[:, None], columns[None, :]]
        store(at, sums.astype(out.dtype), mask=jnp.broadcast_to(real[None, :], sums.shape))


def _range(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def _read(ref: Any, index: tuple[Any, ...], mask: jax.Array) -> jax.Array:
    shape = jnp.broadcast_shapes(*(jnp.shape(i) for i in index))
    return load(ref.at[index], mask=jnp.broadcast_to(mask, shape), other=0.0)


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [R, K] times w [C, K] transposed, float32; of float32 in full, not in TF32."""
    return jax.lax.dot_general(
        x,
        w,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _scaled(
    sums: jax.Array, scales: Any, expert: Any, rows: jax.Array, columns: jax.Array, block: Any
) -> jax.Array:
    """Sums [R, C] times their rows' and their columns' scales of a block."""
    if not scales:
        return sums
    x_scale, w_scale = scales
    real = columns < w_scale.shape[1]
    of_rows = load(x_scale.at[rows, block])
    of_columns = load(w_scale.at[expert, columns, block], mask=real, other=0.0)
    return sums * of_rows[:, None] * of_columns[None, :]
