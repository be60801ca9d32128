"""Grouped matmul of few rows an expert, on Hopper: bound by how fast weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic


def grouped_decode(
    x: jax.Array,
    w: jax.Array,
    experts: jax.Array,
    num_blocks: jax.Array,
    scales: Sequence[jax.Array] = (),
    *,
    block_rows: int,
    block_n: int,
    block_k: int,
    stages: int,
    out_dtype: Any = jnp.bfloat16,
    processors: int = mosaic.PROCESSORS,
    interpret: bool = False,
) -> jax.Array:
    """`grouped_matmul` as one pipeline over (tile, k), which never drains between tiles.

    Operands change places: weights are the tall one, so that few rows fill the tensor cores. Each
    step's product is added in float32, for FP8 products are summed in fewer bits.

    Args:
        x: [P, K].
        w: [E, N, K], N divisible by block_n, K by block_k.
        experts: int32 [P / block_rows].
        num_blocks: int32 [1].
        scales: of FP8, x's float32 [P] and w's float32 [E, N].

    Returns:
        [P, N]; rows beyond the first num_blocks blocks are undefined.
    """
    P, N, K = x.shape[0], w.shape[1], w.shape[2]
    kernel = partial(
        _kernel,
        rows=block_rows,
        columns=block_n,
        tile_k=block_k,
        grid=(N // block_n, K // block_k, processors),
        stages=stages,
        interpret=interpret,
    )
    return mosaic.launch(
        kernel,
        [experts, num_blocks, x, w, *scales],
        jax.ShapeDtypeStruct((P, N), out_dtype),
        name=f"grouped_decode_{w.dtype.name}_{block_rows}x{block_n}x{block_k}",
        processors=processors,
        scratch={"staged": mosaic.SMEM((block_rows, block_n), out_dtype)},
        interpret=interpret,
    )


def place(step: Any, block: Any, grid: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """A step's (block of rows, tile of columns, step along K), of a block's own steps.

    grid: tiles of columns, steps along K, blocks that run. Tiles are dealt out one after another,
    columns first: tiles that run at one time share rows, or experts.
    """
    tiles_n, steps_k, processors = grid
    tile = block + (step // steps_k) * processors
    return tile // tiles_n, tile % tiles_n, step % steps_k


def own_steps(num_blocks: Any, block: Any, grid: tuple[int, int, int]) -> Any:
    """How many steps a block has."""
    tiles_n, steps_k, processors = grid
    tiles = (num_blocks * tiles_n - block + processors - 1) // processors
    return jnp.maximum(tiles, 0) * steps_k


def tile_specs(
    experts: Any, block: Any, grid: tuple[int, int, int], tile: tuple[int, int, int]
) -> list[Any]:
    """Which rows of x and of its expert's w a step reads; tile: block_rows, block_n, block_k."""
    rows, columns, tile_k = tile

    def x_place(step: Any) -> tuple[Any, Any]:
        b, _, k = place(step, block, grid)
        return b, k

    def w_place(step: Any) -> tuple[Any, Any, Any]:
        b, n, k = place(step, block, grid)
        return experts[b], n, k

    return [
        mosaic.BlockSpec((rows, tile_k), x_place),
        mosaic.BlockSpec((None, columns, tile_k), w_place),
    ]


def carried(sums: jax.Array, k: Any) -> jax.Array:
    """Sums so far, none at a tile's first step: zeros by selection, for 0 * NaN would be NaN."""
    return jnp.where(jnp.broadcast_to(k == 0, sums.shape), jnp.float32(0), sums)


def _kernel(
    experts, num_blocks, x, w, *refs, staged, rows, columns, tile_k, grid, stages, interpret
):
    *scales, out = refs
    me = lax.axis_index("block")

    def step(index, x_tile, w_tile, sums):
        b, n, k = place(index[0], me, grid)
        sums = carried(sums, k) + mosaic.product(w_tile, x_tile, interpret=interpret)

        @pl.when(k == grid[1] - 1)
        def _():
            here = (pl.ds(b * rows, rows), pl.ds(n * columns, columns))
            y = _scaled(sums, scales, experts[b], here, interpret=interpret)
            mosaic.wait_copied()
            mosaic.store_transposed(staged, y, interpret=interpret)
            mosaic.commit_smem()
            mosaic.copy_out(staged, out.at[here])

        return sums

    mosaic.emit_pipeline(
        step,
        grid=(own_steps(num_blocks[0], me, grid),),
        in_specs=tile_specs(experts, me, grid, (rows, columns, tile_k)),
        max_concurrent_steps=stages,
        init_carry=mosaic.zeros((columns, rows), interpret=interpret),
    )(x, w)
    mosaic.wait_copied()


def _scaled(sums, scales, expert, here, *, interpret):
    """Sums [columns, rows] times their rows' and their columns' scales."""
    if not scales:
        return sums
    x_scale, w_scale = scales
    spread = partial(mosaic.spread, shape=sums.shape, interpret=interpret)
    sums = sums * spread(w_scale, (expert, here[1]), axis=0)
    return sums * spread(x_scale, (here[0],), axis=1)
