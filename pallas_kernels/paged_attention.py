"""Attention over a paged KV pool: decode, verify and chunked prefill in one contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import paged_attention_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.pool_bits import floats, stored

NEG_INF = -1e30
BLOCK_TOKENS = 128  # positions looked at together: large enough to amortise the loop


def write_kv(
    k_pages: jax.Array,
    v_pages: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array,
    page_ids: jax.Array,
    offsets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Store k and v [T, K, h] of one layer at (page_ids, offsets) int32 [T] of the pools.

    Pools are [L, P, S, K, h]; donated, they are written in place. Padding goes to page 0. A uint16
    pool holds the bits of bfloat16: on a CPU, XLA would convert a whole bfloat16 pool to float32
    and back at every access. A float8_e4m3fn pool has no scale: what lies beyond its range, +-448,
    is clamped.
    """
    k_pages = k_pages.at[layer, page_ids, offsets].set(stored(k, k_pages.dtype))
    v_pages = v_pages.at[layer, page_ids, offsets].set(stored(v, v_pages.dtype))
    return k_pages, v_pages


def paged_attention(
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
    backend: Backend = REF,
) -> jax.Array:
    """Causal grouped-query attention of packed query tokens against their sequences' pages.

    Query i of a row stands at position seq_len - q_len + i and sees positions up to its own, which
    are in the pool already. Blocks of pages are visited up to the longest sequence, with an online
    softmax in float32. The table is read a block at a time: its width costs nothing.

    Args:
        q: [T, H, h]; a row's tokens lie together from q_starts on. H = K * G.
        k_pages, v_pages: [L, P, S, K, h].
        layer: int32 [].
        page_table: int32 [B, W], ids in the pool.
        slots: int32 [R], each row's place in the table; B or above: a row of nothing.
        q_starts, q_lens, seq_lens: int32 [R]; seq_lens count the query tokens.
        max_q_len: static bound of q_lens.
        scale: multiplies the scores.
        backend: "mosaic" runs the Triton kernel too.

    Returns:
        [T, H, h] in q's dtype; zeros where no row reaches.

    Raises:
        ValueError: for sizes that the backend's kernel cannot run.
    """
    arrays = (q, k_pages, v_pages, layer, page_table, slots, q_starts, q_lens, seq_lens)
    sizes = {"max_q_len": max_q_len, "scale": scale}
    if backend.kernels:
        return paged_attention_triton.attend(*arrays, **sizes, backend=backend)
    return _attend(*arrays, **sizes)


def _attend(
    q, k_pages, v_pages, layer, page_table, slots, q_starts, q_lens, seq_lens, *, max_q_len, scale
) -> jax.Array:
    kv_heads, page_size = k_pages.shape[3], k_pages.shape[2]
    index = q_starts[:, None] + jnp.arange(max_q_len)
    queries = q.at[index].get(mode="clip")
    rows, _, heads, head_dim = queries.shape
    queries = queries.reshape(rows, max_q_len, kv_heads, heads // kv_heads, head_dim)
    q_positions = (seq_lens - q_lens)[:, None] + jnp.arange(max_q_len)

    pages_per_block = min(max(BLOCK_TOKENS // page_size, 1), page_table.shape[1])
    table = _pad_columns(page_table, pages_per_block)
    block_tokens = pages_per_block * page_size

    def visit(i: jax.Array, carry):
        block = jax.lax.dynamic_slice_in_dim(table, i * pages_per_block, pages_per_block, axis=1)
        pages = block.at[slots].get(mode="fill", fill_value=0)
        k, v = (_gather(pool, layer, pages) for pool in (k_pages, v_pages))
        k_positions = i * block_tokens + jnp.arange(block_tokens)
        seen = (k_positions <= q_positions[..., None]) & (k_positions < seq_lens[:, None, None])
        return _online_softmax(carry, queries, k, v, seen, scale)

    blocks = -(-jnp.max(seq_lens, initial=0) // block_tokens)
    shape = (rows, kv_heads, heads // kv_heads, max_q_len)
    start = (
        jnp.full(shape, NEG_INF, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    _, total, acc = jax.lax.fori_loop(0, blocks, visit, start)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    out = jnp.moveaxis(out, 3, 1).reshape(rows, max_q_len, heads, head_dim).astype(q.dtype)
    q_lens = jnp.where(slots < page_table.shape[0], q_lens, 0)
    target = jnp.where(jnp.arange(max_q_len) < q_lens[:, None], index, q.shape[0])
    return jnp.zeros_like(q).at[target].set(out, mode="drop")


def table_width(pages: int, page_size: int) -> int:
    """Columns of a page table for sequences of `pages` pages: whole blocks are not copied."""
    return pages + -pages % max(BLOCK_TOKENS // page_size, 1)


def _pad_columns(table: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(table, ((0, 0), (0, -table.shape[1] % multiple)))


def _gather(pool: jax.Array, layer: jax.Array, pages: jax.Array) -> jax.Array:
    """Pages [R, n] of one layer as float32 [R, n * S, K, h]."""
    taken = pool[layer, pages]
    if pool.dtype == jnp.uint16:
        # the same numbers as of `floats`, many times faster on a CPU
        taken = jax.lax.bitcast_convert_type(taken.astype(jnp.uint32) << 16, jnp.float32)
    taken = floats(taken).astype(jnp.float32)
    return taken.reshape(pages.shape[0], -1, *pool.shape[3:])


def _online_softmax(carry, queries, k, v, seen, scale):
    """Fold one block into (max, sum, weighted values); seen is bool [R, Q, block]."""
    peak, total, acc = carry
    scores = scale * jnp.einsum("rqkgh,rskh->rkgqs", queries.astype(jnp.float32), k)
    scores = jnp.where(seen[:, None, None], scores, NEG_INF)
    new_peak = jnp.maximum(peak, scores.max(-1))
    p = jnp.where(seen[:, None, None], jnp.exp(scores - new_peak[..., None]), 0.0)
    fade = jnp.exp(peak - new_peak)
    # 0 * inf is NaN: what a page's earlier owner left must not reach this row
    v = jnp.where(jnp.any(seen, axis=1)[..., None, None], v, 0.0)
    acc = acc * fade[..., None] + jnp.einsum("rkgqs,rskh->rkgqh", p, v)
    return new_peak, total * fade + p.sum(-1), acc
