"""Dense projections: BF16 or float32, and FP8 with dynamically quantised activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0
CPU_BF16_ROWS = 8


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K] times weight [..., N, K] -> [T, ..., N] in x's dtype, accumulated in float32."""
    return dot("tk,...nk->t...n", x, weight).astype(x.dtype)


def dot(formula: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum accumulated in float32. Rows of x are its axis before the last.

    On a CPU few rows of bfloat16 are widened first: XLA's own path for them is many times slower,
    and the conversion fuses. Elsewhere, and with more rows, the product is the hardware's.
    """

    def narrow(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, weight, preferred_element_type=jnp.float32)

    def wide(x: jax.Array, weight: jax.Array) -> jax.Array:
        return narrow(x.astype(jnp.float32), weight.astype(jnp.float32))

    if x.dtype == jnp.float32 or x.shape[-2] >= CPU_BF16_ROWS:
        return narrow(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=wide, default=narrow)


def scaled_linear(
    x: jax.Array, values: jax.Array, scale: jax.Array, block: int | None = None
) -> jax.Array:
    """FP8 product: out = sum over blocks b of (x_q[b] . w_q[b]) * s_x[b] * s_w[b].

    Args:
        x: [T, K]; quantised here, a scale for each token and block (compressed-tensors' "dynamic
            token" with one block; groups of 128 columns in block FP8).
        values: float8_e4m3fn [..., N, K].
        scale: float32 [..., N, B].
        block: columns that share a scale; None: all K, so B is 1.

    Returns:
        [T, ..., N] in x's dtype, accumulated in float32.
    """
    x_q, x_scale = quantize(x, block)
    w_q = split_blocks(values.astype(jnp.float32), block)
    out = jnp.einsum("tbk,...nbk->t...nb", x_q.astype(jnp.float32), w_q)
    out = jnp.einsum("t...nb,...nb,tb->t...n", out, scale, x_scale)
    return out.astype(x.dtype)


def quantize(x: jax.Array, block: int | None = None) -> tuple[jax.Array, jax.Array]:
    """x [..., K] to float8_e4m3fn [..., B, block] and float32 scales [..., B].

    The scale is max|x| / 448. Values are clamped before the cast: XLA on a CPU makes a NaN of what
    a GPU saturates.
    """
    grouped = split_blocks(x.astype(jnp.float32), block)
    peak = jnp.max(jnp.abs(grouped), axis=-1)
    scale = jnp.where(peak > 0, peak / FP8_MAX, 1.0)
    q = jnp.clip(grouped / scale[..., None], -FP8_MAX, FP8_MAX).astype(FP8)
    return q, scale


def split_blocks(x: jax.Array, block: int | None) -> jax.Array:
    """[..., K] to [..., B, block], the last block padded with zeros; None: one block of K."""
    if block is None:
        return x[..., None, :]
    missing = -x.shape[-1] % block
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return padded.reshape(*x.shape[:-1], -1, block)
