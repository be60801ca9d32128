"""Blocks of rows times the weights of their experts: one entry, its oracle, and which kernel runs.

Kernels: "decode" and "prefill", for Hopper, of few and of many rows an expert; "triton", for what
those cannot do. Tiles come from tiles.json, or else from the rules below.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import mosaic, tiles
from pallas_kernels.backend import REF, Backend
from pallas_kernels.grouped_decode import grouped_decode
from pallas_kernels.grouped_matmul_triton import grouped_triton
from pallas_kernels.grouped_prefill import grouped_prefill

log = logging.getLogger(__name__)

Shape = tuple[int, int, int]  # of weights: E, N, K

HOPPER = {"decode": grouped_decode, "prefill": grouped_prefill}
HOPPER_DTYPES = ("float8_e4m3fn", "bfloat16")
HOPPER_ROWS = {"decode": (8, 16, 32), "prefill": (64, 128)}
TRITON_ROWS = 16  # the fewest that Triton multiplies
INTERPRETED_BLOCKS = 1  # persistent blocks in the interpreter, which compiles each at each run

COLUMNS = {"decode": 64, "prefill": 16}  # a tile's are a multiple
DECODE_COLUMNS, MOST_COLUMNS = 128, 256
BUSY_TILES = 4 * mosaic.PROCESSORS  # so many leave few processors idle at the end

SWIZZLE_BYTES = 128  # shared memory is free of bank conflicts in rows of so many bytes
PRODUCT_BYTES = 32  # of a row, in one wgmma
STEP_BYTES = {"decode": 256, "prefill": 128}  # of a row, in a step
ODD_STEP_BYTES = {"decode": 384, "prefill": 192}  # where rows are no whole swizzles
MOST_STAGES = 8
BARRIER_BYTES, ALIGNMENT_BYTES = 16, 1024  # of a stage; of all


@dataclass(frozen=True)
class GroupedTile:
    """How a product is computed.

    Attributes:
        kernel: "triton", "decode" or "prefill".
        block_rows: rows of a tile, all of one expert.
        block_n: columns of a tile.
        block_k: columns of x and w in a step.
        stages: steps that are in shared memory at a time.
        warps: of a program, through Triton.
    """

    kernel: str
    block_rows: int
    block_n: int
    block_k: int
    stages: int
    warps: int = 4


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    experts: jax.Array,
    num_blocks: jax.Array,
    tile: GroupedTile,
    *,
    x_scale: jax.Array | None = None,
    w_scale: jax.Array | None = None,
    block: int | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    backend: Backend = REF,
) -> jax.Array:
    """out[p, n] = sum over b of (x[p, b] . w[e, n, b]) * x_scale[p, b] * w_scale[e, n, b].

    e is the expert of p's block, b a block of columns. Accumulated in float32.

    Args:
        x: [P, K], float32 or bfloat16, or float8_e4m3fn with scales.
        w: [E, N, K], of x's dtype.
        experts: int32 [P // block_rows], the expert of each block of rows.
        num_blocks: int32 [1]; blocks from there on are not computed.
        tile: of `choose_tiles`.
        x_scale: float32 [P, B], B = ceil(K / block).
        w_scale: float32 [E, N, B].
        block: columns that share a scale; None: all, so B is 1.

    Returns:
        [P, N]; rows that are not computed are undefined, zeros with the `ref` backend.

    Raises:
        ValueError: if x has not block_rows rows an entry of `experts`, or the kernel cannot
            multiply by these weights.
    """
    if x.shape[0] != experts.shape[0] * tile.block_rows:
        raise ValueError(
            f"{x.shape[0]} rows are not {experts.shape[0]} blocks of {tile.block_rows}"
        )
    scales = () if x_scale is None or w_scale is None else (x_scale, w_scale)
    if not backend.kernels:
        return _reference(x, w, experts, num_blocks, scales, block, out_dtype)
    common = {
        "block_rows": tile.block_rows,
        "block_n": tile.block_n,
        "block_k": tile.block_k,
        "stages": tile.stages,
        "out_dtype": out_dtype,
        "interpret": backend.interpret,
    }
    if tile.kernel == "triton":
        own = {"warps": tile.warps, "block": block}
        return grouped_triton(x, w, experts, num_blocks, scales, **common, **own)
    if fault := misfit(tile, (w.shape[0], w.shape[1], w.shape[2]), w.dtype, block):
        raise ValueError(f"the {tile.kernel} kernel cannot multiply by {w.shape}: {fault}")
    scales = tuple(scale[..., 0] for scale in scales)
    processors = INTERPRETED_BLOCKS if backend.interpret else mosaic.PROCESSORS
    common["stages"] = stages_that_fit(tile, w.dtype, out_dtype)
    run = HOPPER[tile.kernel]
    return run(x, w, experts, num_blocks, scales, **common, processors=processors)


def _reference(x, w, experts, num_blocks, scales, block, out_dtype) -> jax.Array:
    """A block at a time, dequantised: [P, N]."""
    blocks, (_, K) = experts.shape[0], x.shape

    def wide(values: jax.Array, scale: jax.Array | None) -> jax.Array:
        values = values.astype(jnp.float32)
        return values if scale is None else values * _of_columns(scale, block, K)

    def visit(of_block: tuple[Any, ...]) -> jax.Array:
        i, rows, *row_scales = of_block
        expert = experts[i]
        left = wide(rows, *row_scales or [None])
        right = wide(w[expert], *([scales[1][expert]] if scales else [None]))
        out = jnp.einsum("rk,nk->rn", left, right, precision="highest")
        return jnp.where(i < num_blocks[0], out, 0).astype(out_dtype)

    parts = [array.reshape(blocks, -1, array.shape[1]) for array in (x, *scales[:1])]
    return jax.lax.map(visit, (jnp.arange(blocks), *parts)).reshape(x.shape[0], -1)


def _of_columns(scale: jax.Array, block: int | None, K: int) -> jax.Array:
    """The scale of each of K columns, from that of each block: [..., B] to [..., K]."""
    return scale if block is None else jnp.repeat(scale, block, axis=-1)[..., :K]


def choose_tiles(
    rows: int,
    gate_up: Shape,
    down: Shape,
    dtype: DTypeLike,
    backend: Backend,
    block: int | None = None,
) -> tuple[GroupedTile, GroupedTile]:
    """Tiles of an MLP's two products, with the same block_rows.

    Args:
        rows: routed rows, tokens times experts of each.
        gate_up, down: [E, N, K] of the weights.
        dtype: of the weights.
        block: columns that share a scale.
    """
    dtype, shapes = jnp.dtype(dtype), (gate_up, down)
    listed = [_listed(rows, shape, dtype, backend, block) for shape in shapes]
    block_rows = next((t.block_rows for t in listed if t), _block_rows(rows / gate_up[0]))

    def pick(block_rows: int) -> tuple[GroupedTile, ...]:
        return tuple(
            tile
            if tile and tile.block_rows == block_rows
            else _by_rule(rows, block_rows, shape, dtype, backend, block)
            for tile, shape in zip(listed, shapes, strict=True)
        )

    chosen = pick(block_rows)
    if any(tile.kernel == "triton" for tile in chosen):
        chosen = pick(max(block_rows, TRITON_ROWS))
    return chosen[0], chosen[1]


def misfit(tile: GroupedTile, shape: Shape, dtype: DTypeLike, block: int | None) -> str:
    """Why a kernel for Hopper cannot multiply by such weights; empty if it can."""
    _, N, K = shape
    dtype, granule = jnp.dtype(dtype), COLUMNS[tile.kernel]
    faults = {
        f"weights are {dtype.name}": dtype.name not in HOPPER_DTYPES,
        f"scales are of blocks of {block} columns": block is not None,
        f"blocks have {tile.block_rows} rows": tile.block_rows not in HOPPER_ROWS[tile.kernel],
        f"tiles of {tile.block_n} columns are not {granule} times a number, or above"
        f" {MOST_COLUMNS}": tile.block_n % granule != 0 or tile.block_n > MOST_COLUMNS,
        f"N = {N} is not divisible by {tile.block_n}": N % tile.block_n != 0,
        f"K = {K} is not divisible by {tile.block_k}": K % tile.block_k != 0,
        f"steps of {tile.block_k} columns are no whole products": (
            tile.block_k * dtype.itemsize % PRODUCT_BYTES != 0
        ),
        "it needs more shared memory than there is": (stages_that_fit(tile, dtype) < tile.stages),
    }
    return next((text for text, found in faults.items() if found), "")


def _listed(
    rows: int, shape: Shape, dtype: jnp.dtype, backend: Backend, block: int | None
) -> GroupedTile | None:
    """The tile that tiles.json has, if its kernel runs here."""
    experts, n, k = shape
    key = {"dtype": dtype.name, "experts": experts, "n": n, "k": k, "rows": rows}
    found = tiles.find(backend.device, "grouped_matmul", **key, backend=backend.name)
    tile = GroupedTile(**found) if found else None
    if tile is None or tile.kernel == "triton":
        return tile if block is None else None
    fits = backend.name == "mosaic" and not misfit(tile, shape, dtype, block)
    return tile if fits else None


def _block_rows(average: float) -> int:
    """The fewest rows of a block that hold an expert's average: padding is computed too."""
    sizes = [size for kernel in HOPPER_ROWS.values() for size in kernel]
    return next((size for size in sizes if size >= average), sizes[-1])


def _by_rule(
    rows: int,
    block_rows: int,
    shape: Shape,
    dtype: jnp.dtype,
    backend: Backend,
    block: int | None,
) -> GroupedTile:
    if backend.name == "mosaic":
        tile = _hopper_tile(rows, block_rows, shape, dtype)
        fault = misfit(tile, shape, dtype, block)
        if not fault:
            return tile
        _log_fallback(shape, dtype.name, fault)
    return _triton_tile(block_rows, dtype, block)


def _hopper_tile(rows: int, block_rows: int, shape: Shape, dtype: jnp.dtype) -> GroupedTile:
    """A tile that may not fit: see `misfit`."""
    experts, N, K = shape
    kernel = next((k for k, sizes in HOPPER_ROWS.items() if block_rows in sizes), "prefill")
    most = MOST_COLUMNS if kernel == "prefill" else DECODE_COLUMNS
    if kernel == "decode" and min(rows, experts) * N < DECODE_COLUMNS * BUSY_TILES:
        most //= 2  # few tiles: smaller ones share out better
    block_n = _divisor(N, COLUMNS[kernel], most)
    block_k = _step(K * dtype.itemsize, kernel) // dtype.itemsize
    tile = GroupedTile(kernel, block_rows, block_n, block_k, stages=MOST_STAGES)
    return replace(tile, stages=max(stages_that_fit(tile, dtype), 2))


def _triton_tile(block_rows: int, dtype: jnp.dtype, block: int | None) -> GroupedTile:
    rows, step = max(block_rows, TRITON_ROWS), SWIZZLE_BYTES // dtype.itemsize
    step = step if block is None else math.gcd(step, block)
    return GroupedTile("triton", rows, 128, step, stages=3, warps=8 if rows > 64 else 4)


def _divisor(size: int, granule: int, most: int) -> int:
    """The largest multiple of `granule` up to `most` that divides `size`; granule if none does."""
    return next((n for n in range(most, granule, -granule) if size % n == 0), granule)


def _step(row_bytes: int, kernel: str) -> int:
    """Bytes of a row in a step: whole swizzles where they divide it, else as many as do."""
    if row_bytes % SWIZZLE_BYTES == 0:
        return _divisor(row_bytes, SWIZZLE_BYTES, STEP_BYTES[kernel])
    return _divisor(row_bytes, PRODUCT_BYTES, ODD_STEP_BYTES[kernel])


def stages_that_fit(
    tile: GroupedTile, dtype: DTypeLike, out_dtype: DTypeLike = jnp.bfloat16
) -> int:
    """How many of a tile's stages shared memory holds beside the output."""
    step = (tile.block_rows + tile.block_n) * tile.block_k * jnp.dtype(dtype).itemsize
    out = tile.block_rows * tile.block_n * jnp.dtype(out_dtype).itemsize
    left = mosaic.SHARED_BYTES - out - ALIGNMENT_BYTES
    return min(left // (step + BARRIER_BYTES), tile.stages)


@cache
def _log_fallback(shape: Shape, dtype: str, fault: str) -> None:
    log.info("product by %s weights %s runs through Triton: %s", dtype, list(shape), fault)
