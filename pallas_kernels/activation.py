"""SwiGLU's middle."""

from __future__ import annotations

from typing import Literal, overload

import jax
import jax.numpy as jnp

from pallas_kernels import activation_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import QuantRows, quantize_rows


@overload
def silu_mul(
    gate_up: jax.Array, *, quantize: Literal[False] = False, backend: Backend = REF
) -> jax.Array: ...
@overload
def silu_mul(
    gate_up: jax.Array, *, quantize: Literal[True], backend: Backend = REF
) -> QuantRows: ...
@overload
def silu_mul(
    gate_up: jax.Array, *, quantize: bool, backend: Backend = REF
) -> jax.Array | QuantRows: ...
def silu_mul(
    gate_up: jax.Array, *, quantize: bool = False, backend: Backend = REF
) -> jax.Array | QuantRows:
    """silu(gate) * up of gate_up [T, 2, F], gate first -> [T, F].

    float32 inside, rounded to gate_up's dtype. With `quantize` what that gave is quantised by rows.
    """
    if backend.kernels:
        out = activation_triton.silu_mul(gate_up, quantize=quantize, interpret=backend.interpret)
        return QuantRows(*out) if quantize else out[0]
    gate, up = (gate_up[:, half].astype(jnp.float32) for half in (0, 1))
    hidden = (jax.nn.silu(gate) * up).astype(gate_up.dtype)
    return quantize_rows(hidden) if quantize else hidden
