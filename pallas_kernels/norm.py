"""RMSNorm, alone and after a residual add."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import norm_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import QuantRows, quantize_rows


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] normalised in float32, cast back, times weight [D]: no +1 (HF Glm4MoeRMSNorm)."""
    x32 = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(variance + eps)).astype(x.dtype) * weight.astype(x.dtype)


def add_rms_norm(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    eps: float,
    *,
    quantize: bool = False,
    backend: Backend = REF,
) -> tuple[jax.Array, QuantRows | None, jax.Array]:
    """Add x [T, D] to the residual stream [T, D], of the same dtype, and normalise the sum.

    Args:
        weight: [D].
        quantize: also give the result quantised by rows, for an FP8 product.

    Returns:
        The sum's RMSNorm [T, D]; that in FP8, or None; the sum [T, D].
    """
    if backend.kernels:
        y, residual, *q = norm_triton.add_rms_norm(
            x, residual, weight, eps, quantize=quantize, interpret=backend.interpret
        )
        return y, QuantRows(*q) if quantize else None, residual
    residual = residual + x
    y = rms_norm(residual, weight, eps)
    return y, quantize_rows(y) if quantize else None, residual
