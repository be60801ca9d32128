"""Token dispatch as Triton kernels.

`align` has a program an expert, which reads all ids and places its own rows: no program waits for
another. Where an expert begins follows from the counts of those before it. Few ids are counted by
every program for itself; many by a launch of their own, a program an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from pallas_kernels.triton import launch, load, store

COUNTED_BY_ALL = 1024  # routed rows up to which one launch does
CHUNK = 1024
COUNTED_CHUNK = 16
FILL = 128
COMBINE_COLUMNS = 1024


def _lanes(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def align(
    ids: jax.Array, num_experts: int, block_rows: int, places: int, *, interpret: bool = False
) -> list[jax.Array]:
    """The parts of an `Alignment` with P = `places`."""
    flat = ids.reshape(-1)
    how: dict[str, Any] = {"warps": 4, "interpret": interpret}
    inputs = [flat]
    if flat.size > COUNTED_BY_ALL:
        inputs += launch(
            _count_kernel, [flat], [_int32(num_experts)], grid=(num_experts,), name="count", **how
        )
    rows, placed, experts, num_blocks = launch(
        partial(_align_kernel, experts=num_experts, block_rows=block_rows),
        inputs,
        [_int32(places), _int32(flat.size), _int32(places // block_rows), _int32(1)],
        grid=(num_experts + 1,),  # the last has the ids that are no expert's, and the end of P
        name="align",
        **how,
    )
    return [rows, placed.reshape(ids.shape), experts, num_blocks]


def _count_kernel(ids_ref, counts_ref):
    expert, size = pl.program_id(0), ids_ref.shape[0]

    def add(i, found):
        at = i * CHUNK + _lanes(CHUNK)
        ids = load(ids_ref.at[at], mask=at < size, other=-1)
        return found + (ids == expert).astype(jnp.int32)

    chunks = pl.cdiv(size, CHUNK)
    counts_ref[expert] = jnp.sum(lax.fori_loop(0, chunks, add, jnp.zeros(CHUNK, jnp.int32)))


def _align_kernel(ids_ref, *refs, experts: int, block_rows: int):
    *counts_ref, rows_ref, places_ref, experts_ref, num_blocks_ref = refs
    expert, lanes = pl.program_id(0), _lanes(pl.next_power_of_2(experts))
    if counts_ref:
        counts = load(counts_ref[0].at[lanes], mask=lanes < experts, other=0)
    else:
        counts = _count_all(ids_ref, lanes, experts)
    blocks = (counts + block_rows - 1) // block_rows
    first = jnp.sum(jnp.where(lanes < expert, blocks, 0))
    # What lies behind the last expert is the last program's: blocks without rows.
    own = jnp.sum(jnp.where(lanes == expert, blocks, 0))
    own = jnp.where(expert < experts, own, experts_ref.shape[0] - first)
    count = jnp.sum(jnp.where(lanes == expert, counts, 0))
    start, end = first * block_rows, (first + own) * block_rows
    _place(ids_ref, rows_ref, places_ref, expert, experts, start)
    _fill(rows_ref, start + count, end, ids_ref.shape[0])
    _fill(experts_ref, first, first + own, jnp.minimum(expert, experts - 1))

    @pl.when(expert == experts)
    def _():
        num_blocks_ref[0] = first


def _count_all(ids_ref, lanes, experts: int):
    """Rows of each expert, int32 [lanes]."""
    size = ids_ref.shape[0]

    def add(i, found):
        at = i * COUNTED_CHUNK + _lanes(COUNTED_CHUNK)
        ids = load(ids_ref.at[at], mask=at < size, other=-1)
        return found + (ids[:, None] == lanes[None, :]).astype(jnp.int32)

    zeros = jnp.zeros((COUNTED_CHUNK, lanes.shape[0]), jnp.int32)
    counts = jnp.sum(lax.fori_loop(0, pl.cdiv(size, COUNTED_CHUNK), add, zeros), axis=0)
    return jnp.where(lanes < experts, counts, 0)


def _place(ids_ref, rows_ref, places_ref, expert, experts: int, start):
    """Write an expert's rows from `start` on, and where they went; ids of E or more go to P."""
    size = ids_ref.shape[0]

    def visit(i, start):
        at = i * CHUNK + _lanes(CHUNK)
        ids = load(ids_ref.at[at], mask=at < size, other=-1)
        mine = jnp.where(expert < experts, ids == expert, ids >= experts)
        ranks = jnp.cumsum(mine.astype(jnp.int32))
        placed = mine & (expert < experts)
        # Lanes that are masked need places that no other writes: the interpreter writes them all.
        places = jnp.where(placed, start + ranks - 1, rows_ref.shape[0])
        store(places_ref.at[at], places, mask=mine)
        store(rows_ref.at[places], at, mask=placed)
        return start + jnp.sum(mine.astype(jnp.int32))

    lax.fori_loop(0, pl.cdiv(size, CHUNK), visit, start)


def _fill(ref, start, end, value):
    def visit(i, carry):
        at = start + i * FILL + _lanes(FILL)
        store(ref.at[at], jnp.broadcast_to(value, (FILL,)).astype(jnp.int32), mask=at < end)
        return carry

    lax.fori_loop(0, (end - start + FILL - 1) // FILL, visit, 0)


def gather(
    parts: Sequence[jax.Array], rows: jax.Array, k: int, *, interpret: bool = False
) -> list[jax.Array]:
    """Rows of [T, K] arrays, of all in one launch; padding is 0 in the first and 1 in the next."""
    shapes = [jax.ShapeDtypeStruct((rows.shape[0], p.shape[1]), p.dtype) for p in parts]
    return launch(
        partial(_gather_kernel, parts=len(parts), k=k),
        [rows, *parts],
        shapes,
        grid=(rows.shape[0],),
        warps=8,
        interpret=interpret,
        name="gather_rows",
    )


def _gather_kernel(rows_ref, *refs, parts: int, k: int):
    place = pl.program_id(0)
    token = rows_ref[place] // k
    for source, target, fill in zip(refs[:parts], refs[parts:], (0.0, 1.0), strict=False):
        width = source.shape[1]
        lanes = _lanes(pl.next_power_of_2(width))
        real = lanes < width
        live = real & (token < source.shape[0])
        values = load(source.at[token, lanes], mask=live, other=fill)
        store(target.at[place, lanes], values, mask=real)


def combine(
    out: jax.Array,
    places: jax.Array,
    weights: jax.Array,
    shared: jax.Array | None,
    *,
    dtype: DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """`dispatch.combine`: a program has some columns of one token."""
    tokens, width = places.shape[0], out.shape[1]
    columns = min(COMBINE_COLUMNS, pl.next_power_of_2(width))
    [combined] = launch(
        partial(_combine_kernel, columns=columns),
        [out, places, weights] + ([] if shared is None else [shared]),
        [jax.ShapeDtypeStruct((tokens, width), dtype)],
        grid=(tokens, pl.cdiv(width, columns)),
        warps=4,
        interpret=interpret,
        name="combine",
    )
    return combined


def _combine_kernel(out_ref, places_ref, weights_ref, *refs, columns: int):
    *shared_ref, result_ref = refs
    token, (size, width) = pl.program_id(0), out_ref.shape
    lanes = pl.program_id(1) * columns + _lanes(columns)
    real, total = lanes < width, jnp.zeros(columns, jnp.float32)
    for j in range(places_ref.shape[1]):
        place = places_ref[token, j]
        live = real & (place < size)  # what lies elsewhere may be NaN, and so may its weight
        row = load(out_ref.at[place, lanes], mask=live, other=0.0).astype(jnp.float32)
        total += jnp.where(live, weights_ref[token, j] * row, 0.0)
    result = total.astype(result_ref.dtype)
    if shared_ref:
        result += load(shared_ref[0].at[token, lanes], mask=real, other=0.0)
    store(result_ref.at[token, lanes], result, mask=real)
