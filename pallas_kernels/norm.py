"""RMSNorm, alone and after a residual add."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] normalised in float32, cast back, times weight [D]: no +1 (HF Glm4MoeRMSNorm)."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * weight.astype(x.dtype)


def add_rms_norm(
    x: jax.Array, residual: jax.Array, weight: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Add x [T, D] to the residual stream [T, D]; return the sum's RMSNorm, and the sum."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual
