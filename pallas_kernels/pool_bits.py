"""KV pools that hold the bits of floats: on a CPU XLA would widen a whole pool at every access."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.fp8 import FP8, to_fp8

FLOATS = {jnp.dtype("uint16"): jnp.dtype("bfloat16"), jnp.dtype("uint8"): jnp.dtype(FP8)}
BITS = {kind.name: bits.name for bits, kind in FLOATS.items()}


def stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x as a pool of `dtype` holds it: rounded to its floats, FP8 clamped; integers are bits."""
    dtype = jnp.dtype(dtype)
    kind = FLOATS.get(dtype, dtype)
    rounded = to_fp8(x) if kind == FP8 else x.astype(kind)
    return rounded if kind == dtype else jax.lax.bitcast_convert_type(rounded, dtype)


def floats(x: jax.Array) -> jax.Array:
    """What a pool holds, as floats of the size it has there."""
    kind = FLOATS.get(x.dtype)
    return x if kind is None else jax.lax.bitcast_convert_type(x, kind)
