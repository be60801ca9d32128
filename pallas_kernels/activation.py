"""SwiGLU's middle."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def silu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, elementwise; float32 inside, gate's dtype out."""
    gate32 = gate.astype(jnp.float32)
    return (jax.nn.silu(gate32) * up.astype(jnp.float32)).astype(gate.dtype)
