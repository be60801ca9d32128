"""Rotary position embedding of the leading dims of a head, in the rotate-half layout."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
