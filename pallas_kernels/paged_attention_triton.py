"""Paged attention as Triton kernels: decode, verify and chunked prefill in one.

A program has a tile of one row's queries, packed as (token, head of the group), all of one KV head:
those that look at the same keys share a matrix product. Few rows alone would leave most of the GPU
idle, so each row's keys are cut into splits, whose outputs a second kernel merges.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import tiles
from pallas_kernels.backend import PROCESSORS, Backend
from pallas_kernels.pool_bits import floats
from pallas_kernels.triton import check_addresses, launch, load, store

NEG_INF = -1e30
MAX_SPLITS = 16


@dataclass(frozen=True)
class Plan:
    """Static sizes of one launch."""

    group: int  # G
    max_q_len: int
    page_size: int
    scale: float  # that makes scores exponents of 2
    block_rows: int  # packed queries a program
    block_keys: int
    tiles: int  # of a row's packed queries
    splits: int


def attend(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    slots: jax.Array,
    q_starts: jax.Array,
    q_lens: jax.Array,
    seq_lens: jax.Array,
    *,
    max_q_len: int,
    scale: float,
    backend: Backend,
    tile: tiles.Tile | None = None,
    splits: int | None = None,
) -> jax.Array:
    """`paged_attention`, which see.

    Args:
        tile: {"rows", "keys", "warps", "stages"}: packed queries of a program, which takes so many
            keys at a time; None for what tiles.json has for the backend's device.
        splits: of each row's keys, a power of two; None for as many as fill the device.

    Raises:
        ValueError: for a page size or head_dim that is no power of two, for sizes without a tile,
            and for pools that a kernel cannot address.
    """
    check_pool(k_pages.shape, k_pages.dtype)
    rows, kv_heads = slots.shape[0], k_pages.shape[3]
    tile = tile or find_tile(backend.device, max_q_len * q.shape[1] // kv_heads, k_pages.dtype)
    plan = _plan(q, k_pages, page_table, rows, max_q_len, scale, tile, splits)
    places = (page_table, slots, q_starts, q_lens, seq_lens, layer.reshape(1))
    how = {"warps": tile["warps"], "stages": tile["stages"], "interpret": backend.interpret}
    how["grid"] = (plan.tiles * plan.splits, kv_heads, rows)
    run = _whole if plan.splits == 1 else _in_splits
    return run(plan, places, q, (k_pages, v_pages), how)


def _plan(q, k_pages, page_table, rows, max_q_len, scale, tile, splits) -> Plan:
    _, _, page_size, kv_heads, _ = k_pages.shape
    group = q.shape[1] // kv_heads
    row_tiles = pl.cdiv(max_q_len * group, tile["rows"])
    if splits is None:
        blocks = pl.cdiv(page_table.shape[1] * page_size, tile["keys"])
        splits = split_count(rows * kv_heads * row_tiles, blocks)
    sizes = tile["rows"], tile["keys"], row_tiles, splits
    return Plan(group, max_q_len, page_size, scale * math.log2(math.e), *sizes)


def find_tile(device: str, queries: int, pool_dtype: Any) -> tiles.Tile:
    """The tile for rows of so many packed queries; ValueError where there is none."""
    key = {"queries": queries, "pool": jnp.dtype(pool_dtype).name}
    tile = tiles.find(device, "paged_attention", **key)
    if tile is None:
        raise ValueError(f"tiles.json has no tile of paged_attention for {key}")
    return tile


def split_count(items: int, blocks: int) -> int:
    """Splits of `items` programs that make 2 to 4 a processor: a power of two, at most 16.

    More than the longest sequence has `blocks` of keys would be idle.
    """
    wanted = min(2 * PROCESSORS / items, MAX_SPLITS, blocks)
    return 1 << max(0, math.ceil(math.log2(wanted)))


def check_pool(shape: tuple[int, ...], dtype: Any) -> None:
    """Raise ValueError for a pool that these kernels cannot read.

    Pages and heads are powers of two, and `check_addresses` bounds the whole.
    """
    _, _, page_size, _, head_dim = shape
    for name, size in (("page_size", page_size), ("head_dim", head_dim)):
        if size & (size - 1):
            raise ValueError(f"{name} is {size}, expected a power of two")
    check_addresses("paged_attention", shape, dtype)


def _whole(plan: Plan, places, q, pools, how) -> jax.Array:
    """Without splits: straight into zeros, which stay where no row reaches."""
    inputs = (*places, q, *pools, jnp.zeros_like(q))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    aliases = {len(inputs) - 1: 0}
    kernel = partial(_attend, plan=plan)
    return launch(kernel, inputs, [out], name="paged_attention", aliases=aliases, **how)[0]


def _in_splits(plan: Plan, places, q, pools, how) -> jax.Array:
    """Each split's output and weight, in float32, then their merge."""
    tokens, heads, head_dim = q.shape
    parts = (tokens, heads, plan.splits)
    outputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*parts, head_dim), parts)]
    kernel = partial(_attend, plan=plan)
    partials = launch(kernel, (*places, q, *pools), outputs, name="paged_attention", **how)
    return launch(
        partial(_merge, plan=plan),
        (*places[:4], *partials),
        [jax.ShapeDtypeStruct(q.shape, q.dtype)],
        grid=(tokens, heads),
        name="merge_splits",
        warps=1,
        interpret=how["interpret"],
    )[0]


def _attend(table, slots, starts, q_lens, seq_lens, layer, q_ref, k_ref, v_ref, *out, plan: Plan):
    """A tile of a row's packed queries against a split of its keys."""
    tile, split = (f(pl.program_id(0), plan.tiles) for f in (lax.rem, lax.div))
    kv_head, row = pl.program_id(1), pl.program_id(2)
    slot, q_len = _slot(table, slots[row], q_lens[row], plan)
    context = seq_lens[row] - q_lens[row]
    packed = tile * plan.block_rows + jnp.arange(plan.block_rows, dtype=jnp.int32)
    token, head = lax.div(packed, plan.group), lax.rem(packed, plan.group)
    live = token < q_len
    place = starts[row] + token, kv_head * plan.group + head

    q = _load(q_ref, place, live)
    first, end = _span(tile, split, context, q_len, plan)

    def visit(i, carry):
        keys = first + i * plan.block_keys + jnp.arange(plan.block_keys, dtype=jnp.int32)
        held = keys < end
        page = load(table.at[slot, lax.div(keys, plan.page_size)], mask=held, other=0)
        at = layer[0], page, lax.rem(keys, plan.page_size), kv_head
        # 0 * NaN is NaN: what a page's earlier owner left is not even loaded
        k, v = (floats(_load(ref, at, held)).astype(q.dtype) for ref in (k_ref, v_ref))
        seen = held[None] & (keys <= (context + token)[:, None])
        return _online_softmax(carry, q, k, v, seen, plan.scale)

    blocks = lax.div(jnp.maximum(end - first, 0) + plan.block_keys - 1, plan.block_keys)
    start = (
        jnp.full(packed.shape, NEG_INF, jnp.float32),
        jnp.zeros(packed.shape, jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )
    peak, total, acc = lax.fori_loop(0, blocks, visit, start)
    total = jnp.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    if plan.splits == 1:
        _store(out[-1], place, acc, live)  # out[0] is the zeros that it is an alias of
    else:
        _store(out[0], (*place, split), acc, live & (first < end))
        store(out[1].at[*place, split], peak + jnp.log2(total), mask=live)


def _slot(table, slot, q_len, plan: Plan):
    """A row's place in the table and its queries; a row of nothing has a place too, and none."""
    slots = table.shape[0]
    q_len = jnp.where(slot < slots, jnp.minimum(q_len, plan.max_q_len), 0)
    return jnp.minimum(slot, slots - 1), q_len


def _span(tile, split, context, q_len, plan: Plan):
    """Positions [first, end) of a split that some query of the tile sees; none in a dead tile."""
    begin, queries = tile * plan.block_rows, q_len * plan.group
    last = lax.div(jnp.minimum(begin + plan.block_rows, queries) - 1, plan.group)
    blocks = pl.cdiv(context + q_len, plan.block_keys)
    share = pl.cdiv(blocks, plan.splits) * plan.block_keys
    first = split * share
    end = jnp.minimum(first + share, context + last + 1)
    return first, jnp.where(begin < queries, end, 0)


def _online_softmax(carry, q, k, v, seen, scale: float):
    """Fold a block of keys into (max, sum, weighted values); scores are exponents of 2.

    A query that has seen no key yet counts keys that it does not see: the first that it sees fades
    them to nothing, and without one its peak says that there was none.
    """
    peak, total, acc = carry
    scores = jnp.where(seen, _dot(q, k.T) * scale, NEG_INF)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    p = jnp.exp2(scores - new_peak[:, None])
    fade = jnp.exp2(peak - new_peak)
    acc = acc * fade[:, None] + _dot(p.astype(v.dtype), v)
    return new_peak, total * fade + jnp.sum(p, axis=1), acc


def _merge(table, slots, starts, q_lens, acc_ref, peak_ref, out, *, plan: Plan):
    """One head of one token: its splits, weighted by the sums of their exponentials."""
    token, head = pl.program_id(0), pl.program_id(1)
    peak = peak_ref[token, head]
    split = jnp.arange(plan.splits, dtype=jnp.int32)
    acc = _load(acc_ref, (token, head, split), peak > NEG_INF)  # others had no keys
    weight = jnp.exp2(peak - jnp.max(peak))
    merged = jnp.sum(acc * weight[:, None], axis=0) / jnp.sum(weight)
    reached = _reached(table, slots, starts, q_lens, token, plan)
    # what no row reaches was not written: it may be anything
    out[token, head] = jnp.where(reached, merged, 0.0).astype(out.dtype)


def _reached(table, slots, starts, q_lens, token, plan: Plan):
    """Whether a token is some row's."""
    rows = slots.shape[0]
    place = jnp.arange(pl.next_power_of_2(rows), dtype=jnp.int32)
    slot, start, q_len = (
        load(ref.at[place], mask=place < rows, other=fill)
        for ref, fill in ((slots, table.shape[0]), (starts, 0), (q_lens, 0))
    )
    _, q_len = _slot(table, slot, q_len, plan)
    return jnp.max(jnp.where((start <= token) & (token < start + q_len), 1, 0)) > 0


def _load(ref, place, mask) -> jax.Array:
    """Vectors [n, h] at n places, 0 where the mask is false."""
    at, wide = _vectors(ref, place, mask)
    zero = 0 if jnp.issubdtype(ref.dtype, jnp.integer) else 0.0
    return load(ref.at[at], mask=wide, other=zero)


def _store(ref, place, x, mask) -> None:
    at, wide = _vectors(ref, place, mask)
    store(ref.at[at], x.astype(ref.dtype), mask=wide)


def _vectors(ref, place, mask):
    columns = jnp.arange(ref.shape[-1], dtype=jnp.int32)
    rows = (axis[:, None] if axis.ndim else axis for axis in place)
    wide = jnp.broadcast_to(mask[:, None], (*mask.shape, *columns.shape))
    return (*rows, columns[None]), wide


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
