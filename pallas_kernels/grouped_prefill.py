"""Grouped matmul of many rows an expert, on Hopper: bound by the tensor cores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import mosaic
from pallas_kernels.grouped_decode import carried, own_steps, place, tile_specs

COMPUTE = 2  # warpgroups that multiply; a third copies
COPY_REGISTERS = 40
PART_COLUMNS = 128  # of a product before it is added to its sums: both are in registers


def grouped_prefill(
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
    """`grouped_matmul` with a warpgroup that copies and two that multiply, 64 rows each.

    With blocks of 64 rows each multiplies half of the columns. One pipeline over (tile, k), as in
    `grouped_decode`; each step's product is added in float32, for FP8 products are summed in fewer
    bits. Arguments and result are those of `grouped_decode`; block_rows is 64 or 128.
    """
    P, N, K = x.shape[0], w.shape[1], w.shape[2]
    rows, columns = warpgroup_tile(block_rows, block_n)
    kernel = partial(
        _kernel,
        tile=(block_rows, block_n, block_k),
        grid=(N // block_n, K // block_k, processors),
        stages=stages,
        interpret=interpret,
    )
    return mosaic.launch(
        kernel,
        [experts, num_blocks, x, w, *scales],
        jax.ShapeDtypeStruct((P, N), out_dtype),
        name=f"grouped_prefill_{w.dtype.name}_{block_rows}x{block_n}x{block_k}",
        processors=processors,
        warpgroups=COMPUTE + 1,
        scratch={"staged": mosaic.SMEM((COMPUTE, rows, columns), out_dtype)},
        interpret=interpret,
    )


def warpgroup_tile(block_rows: int, block_n: int) -> tuple[int, int]:
    """Rows and columns of a tile that one warpgroup multiplies."""
    rows = mosaic.WARPGROUP_ROWS
    return rows, block_n * block_rows // (rows * COMPUTE)


def parts(columns: int) -> int:
    """In how many products a warpgroup's columns are multiplied."""
    return -(-columns // PART_COLUMNS)


def _kernel(experts, num_blocks, x, w, *refs, staged, tile, grid, stages, interpret):
    *scales, out = refs
    me, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
    block_rows, block_n, _ = tile
    rows, columns = warpgroup_tile(block_rows, block_n)
    row = warpgroup % (block_rows // rows) * rows
    column = warpgroup // (block_rows // rows) * columns
    count = parts(columns)
    width = columns // count

    def step(index, x_tile, w_tile, sums):
        b, n, k = place(index[0], me, grid)
        x_part = x_tile.at[pl.ds(row, rows)]
        sums = tuple(
            carried(s, k) + mosaic.product(x_part, w_tile.at[at], interpret=interpret)
            for s, at in zip(sums, _slices(column, width, count), strict=True)
        )

        @pl.when(k == grid[1] - 1)
        def _():
            here = pl.ds(b * block_rows + row, rows)
            left = n * block_n + column
            mosaic.wait_copied()
            for i, s in enumerate(sums):
                y = _scaled(s, scales, experts[b], here, pl.ds(left + i * width, width), interpret)
                staged[warpgroup, :, pl.ds(i * width, width)] = y.astype(out.dtype)
            mosaic.commit_smem()
            mosaic.copy_out(staged.at[warpgroup], out.at[here, pl.ds(left, columns)])

        return sums

    def compute(run):
        run(tuple(mosaic.zeros((rows, width), interpret=interpret) for _ in range(count)))
        mosaic.wait_copied()

    mosaic.emit_pipeline_warp_specialized(
        step,
        grid=(own_steps(num_blocks[0], me, grid),),
        in_specs=tile_specs(experts, me, grid, tile),
        max_concurrent_steps=stages,
        memory_registers=COPY_REGISTERS,
        num_compute_wgs=COMPUTE,
        wg_axis="warpgroup",
        compute_context=compute,
    )(x, w)


def _slices(start, width, count):
    return [pl.ds(start + i * width, width) for i in range(count)]


def _scaled(sums, scales, expert, rows, columns, interpret):
    """Sums [rows, columns] times their rows' and their columns' scales."""
    if not scales:
        return sums
    x_scale, w_scale = scales
    spread = partial(mosaic.spread, shape=sums.shape, interpret=interpret)
    sums = sums * spread(x_scale, (rows,), axis=0)
    return sums * spread(w_scale, (expert, columns), axis=1)
