"""Causal attention of whole packed sequences, without a KV pool: what a trainer computes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

NEG_INF = -1e30
# Queries together, whose keys end where the block does: more blocks do less, and compile longer.
MIN_BLOCK_TOKENS, MAX_BLOCKS = 64, 8


def packed_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, scale: float
) -> jax.Array:
    """Grouped-query attention within the segments of each row, softmax in float32.

    Args:
        q: [R, S, H, h], H = K * G.
        k, v: [R, S, K, h].
        segments: int32 [R, S]; a token sees the earlier ones of its own segment, and itself.
        scale: multiplies the scores.

    Returns:
        [R, S, H, h] in q's dtype.
    """
    rows, tokens, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = jnp.moveaxis(q.reshape(rows, tokens, kv_heads, -1, head_dim), 1, 3)
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    block = max(MIN_BLOCK_TOKENS, -(-tokens // MAX_BLOCKS))
    out = [
        _block(q[:, :, :, start:end], k[:, :, :end], v[:, :, :end], segments, start, scale)
        for start in range(0, tokens, block)
        for end in [min(start + block, tokens)]
    ]
    return jnp.moveaxis(jnp.concatenate(out, axis=3), 3, 1).reshape(rows, tokens, heads, head_dim)


def _block(q, k, v, segments, start: int, scale: float) -> jax.Array:
    """q [R, K, G, Q, h] over k and v [R, K, s, h], whose last Q tokens are q's own."""
    queries, keys = q.shape[3], k.shape[2]
    q_places, k_places = start + jnp.arange(queries), jnp.arange(keys)
    same = segments[:, start : start + queries, None] == segments[:, None, :keys]
    seen = same & (k_places <= q_places[:, None])
    scores = jnp.einsum("rkgqh,rksh->rkgqs", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * scale, NEG_INF)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("rkgqs,rksh->rkgqh", probabilities, v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
