"""The 8-bit float of weights, activations and cached keys: 4 bits of exponent, 3 of mantissa."""

from __future__ import annotations

import jax
import jax.numpy as jnp

FP8 = jnp.float8_e4m3fn
FP8_MAX = 448.0


def to_fp8(x: jax.Array) -> jax.Array:
    """Clamped before the cast: XLA on a CPU makes a NaN of what a GPU saturates."""
    return jnp.clip(x, -FP8_MAX, FP8_MAX).astype(FP8)
