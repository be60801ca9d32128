"""Rotary position embedding of the leading dims of a head, in the rotate-half layout."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from pallas_kernels import rope_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.norm import rms_norm
from pallas_kernels.paged_attention import write_kv


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rotation:
    """What happens to a projection's heads before attention.

    Attributes:
        bias: [K, G + 2, h], added to all, or None.
        q_norm, k_norm: [h], weights of the RMSNorms of query and key heads, or both None.
        cos, sin: float32 [T, r / 2], from `rope_table`.
        eps: static, of the norms.
    """

    bias: jax.Array | None
    q_norm: jax.Array | None
    k_norm: jax.Array | None
    cos: jax.Array
    sin: jax.Array
    eps: float = field(metadata={"static": True})


def rope_table(positions: jax.Array, rotary_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [T, rotary_dim / 2], of position / theta**(2 i / rotary_dim)."""
    exponent = jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim
    angles = positions.astype(jnp.float32)[:, None] / theta**exponent
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn dims (i, i + r/2) of x [T, heads, h] for i below r/2; dims from r on pass through.

    Args:
        cos, sin: float32 [T, r/2], from `rope_table`.
    """
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, [half, 2 * half], axis=-1)
    cos, sin = cos[:, None].astype(x.dtype), sin[:, None].astype(x.dtype)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest], axis=-1)


def rotate(qkv: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bias, QK-norm and RoPE of qkv [T, K, G + 2, h]: each KV head's queries, key and value.

    Returns:
        q [T, K * G, h], k and v [T, K, h], in qkv's dtype.
    """
    r = rotation
    if r.bias is not None:
        qkv = qkv + r.bias
    q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
    q = q.reshape(qkv.shape[0], -1, qkv.shape[-1])
    if r.q_norm is not None and r.k_norm is not None:
        q, k = rms_norm(q, r.q_norm, r.eps), rms_norm(k, r.k_norm, r.eps)
    return apply_rope(q, r.cos, r.sin), apply_rope(k, r.cos, r.sin), v


def rotate_and_store(
    qkv: jax.Array,
    rotation: Rotation,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array,
    page_ids: jax.Array,
    offsets: jax.Array,
    *,
    backend: Backend = REF,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`rotate`, then `write_kv`. Pools that are donated are written in place.

    Args:
        qkv: [T, K, G + 2, h].
        k_pages, v_pages: [L, P, S, K, h]; what is written to float8_e4m3fn is clamped.
        layer: int32 [], traced or not.
        page_ids, offsets: int32 [T], where each token's K and V go; padding to page 0.

    Returns:
        q [T, K * G, h] in qkv's dtype, and the pools.
    """
    if backend.kernels:
        named = ("bias", "q_norm", "k_norm", "cos", "sin")
        vectors = {name: getattr(rotation, name) for name in named}
        return rope_triton.rotate_and_store(
            qkv,
            {name: array for name, array in vectors.items() if array is not None},
            rotation.eps,
            k_pages,
            v_pages,
            jnp.asarray(layer, jnp.int32),
            page_ids,
            offsets,
            interpret=backend.interpret,
        )
    q, k, v = rotate(qkv, rotation)
    return q, *write_kv(k_pages, v_pages, k, v, layer, page_ids, offsets)
