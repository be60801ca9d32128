"""Grouped expert MLPs: every token through its chosen experts, no token dropped.

Here in plain jax.numpy, which is differentiable; from kernels in `moe_kernels`.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import moe_kernels
from pallas_kernels.activation import silu_mul
from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import QuantRows, quantize, split_blocks

MANY_TOKENS = 512
SLACKS = (1.25, 1.5, 2.0, 3.0)


def grouped_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    gate_up_scale: jax.Array | None = None,
    down_scale: jax.Array | None = None,
    *,
    shared: jax.Array | None = None,
    quantized: QuantRows | None = None,
    block: int | None = None,
    ways: int = 1,
    rows: int | None = None,
    backend: Backend = REF,
) -> jax.Array:
    """Sum over a token's experts e of weight * down_e(silu(gate_e x) * up_e x).

    In plain jax.numpy experts are computed as one batched product over buffers [E, C, D]. The
    capacity C is the smallest of a few that holds the busiest expert, chosen on the device for each
    call. With `rows` it is fixed, and the busiest expert takes as many rounds as it needs: then
    products have one shape, whoever shares the call. Not differentiable; nor are kernels.

    Args:
        x: [T, D].
        ids: int32 [T, k]; an id of E or more computes nothing (padding tokens).
        weights: float32 [T, k].
        gate_up: [E, 2, F, D], gate first.
        down: [E, D, F].
        gate_up_scale, down_scale: float32 [E, 2, F, B], [E, D, B] where the weights are FP8.
        shared: [T, D] in x's dtype, added to the sum once that is rounded to it.
        quantized: x by `quantize_rows(x, block)`, where the caller has it; kernels use it.
        block: columns that share a scale, as in `scaled_linear`.
        ways: devices that share out the experts; each has E of them and of the ids about a part
            in `ways`. A guess by which sizes are chosen: all of them may be here.
        rows: the fixed capacity; None: chosen. Kernels need none.

    Returns:
        [T, D], in x's dtype with `shared`, in float32 without.
    """
    experts = (gate_up, gate_up_scale, down, down_scale)
    if backend.kernels:
        return moe_kernels.grouped_mlp(
            x, ids, weights, experts, shared, quantized, block=block, ways=ways, backend=backend
        )
    routed = _grouped_mlp(x, ids, weights, experts, block=block, ways=ways, rows=rows)
    return routed if shared is None else routed.astype(x.dtype) + shared


def _grouped_mlp(
    x, ids, weights, experts, *, block: int | None, ways: int, rows: int | None
) -> jax.Array:
    gate_up, *_ = experts
    slots, load = _slots(ids, gate_up.shape[0])
    if rows is not None:
        return _in_rounds(x, ids, slots, weights, experts, load, rows=rows, block=block)
    capacities = _capacities(ids.shape[0], ids.shape[1] / (gate_up.shape[0] * ways))
    index = jnp.searchsorted(jnp.array(capacities), load)
    return _computed(capacities, block, (index, ids, slots), x, weights, experts)


def _slots(ids: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Place of each (token, choice) among those of its expert [T, k], and the busiest's load []."""
    one_hot = jax.nn.one_hot(ids.reshape(-1), num_experts, dtype=jnp.int32)
    before = jnp.cumsum(one_hot, axis=0) - one_hot
    slots = jnp.sum(before * one_hot, axis=-1).reshape(ids.shape)
    return slots, jnp.max(jnp.sum(one_hot, axis=0))


def _capacities(tokens: int, share: float) -> tuple[int, ...]:
    """Buffer rows an expert to choose from: 2, 8, 32, ... and as many as there are tokens.

    Of many tokens a balanced router gives each expert little more than its even `share`: then a
    buffer of the next power would be mostly padding.
    """
    powers = {2 * 4**i for i in range(12)}
    snug = {int(tokens * share * slack) for slack in SLACKS} if tokens >= MANY_TOKENS else set()
    return (*sorted(c for c in powers | snug if c < tokens), tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _computed(capacities, block, choice, x, weights, experts):
    index, ids, slots = choice
    run = [partial(_with_capacity, capacity=c, block=block) for c in capacities]
    return jax.lax.switch(index, run, x, ids, slots, weights, experts)


def _computed_forward(capacities, block, choice, x, weights, experts):
    out = _computed(capacities, block, choice, x, weights, experts)
    return out, (choice, x, weights, experts)


def _computed_backward(capacities, block, saved, cotangent):
    """Recompute within the chosen capacity: a differentiated switch keeps what each would."""
    (index, ids, slots), *inputs = saved

    def pull(capacity: int, *inputs):
        def run(x, weights, experts):
            return _with_capacity(x, ids, slots, weights, experts, capacity=capacity, block=block)

        return jax.vjp(run, *inputs)[1](cotangent)

    gradients = jax.lax.switch(index, [partial(pull, c) for c in capacities], *inputs)
    return None, *gradients


_computed.defvjp(_computed_forward, _computed_backward)


def _in_rounds(x, ids, slots, weights, experts, load, *, rows: int, block: int | None):
    """`_with_capacity`, `rows` of each expert at a time."""

    def visit(i: jax.Array, chosen: jax.Array) -> jax.Array:
        place = slots - i * rows
        here = (place >= 0) & (place < rows)
        inside = jnp.where(here, place, rows)
        out = _chosen(x, ids, inside, experts, capacity=rows, block=block)
        return jnp.where(here[..., None], out, chosen)

    start = jnp.zeros((*ids.shape, x.shape[1]), jnp.float32)
    chosen = jax.lax.fori_loop(0, -(-load // rows), visit, start)
    return jnp.sum(chosen * weights[..., None], axis=1)


def _with_capacity(x, ids, slots, weights, experts, *, capacity: int, block: int | None):
    chosen = _chosen(x, ids, slots, experts, capacity=capacity, block=block)
    return jnp.sum(chosen * weights[..., None], axis=1)


def _chosen(x, ids, slots, experts, *, capacity: int, block: int | None) -> jax.Array:
    """What each chosen expert makes of its token, float32 [T, k, D]; zeros where it has no slot."""
    gate_up, gate_up_scale, down, down_scale = experts
    num_experts, tokens = gate_up.shape[0], jnp.arange(x.shape[0])[:, None]
    buffers = jnp.zeros((num_experts, capacity, x.shape[1]), x.dtype)
    buffers = buffers.at[ids, slots].set(
        jnp.broadcast_to(x[tokens], (*ids.shape, x.shape[1])), mode="drop"
    )
    hidden = _batched(buffers, gate_up, gate_up_scale, block)
    hidden = silu_mul(hidden.reshape(-1, *hidden.shape[2:])).astype(x.dtype)
    hidden = hidden.reshape(num_experts, capacity, -1)
    out = _batched(hidden, down, down_scale, block)
    return out.at[ids, slots].get(mode="fill", fill_value=0)


def _batched(x: jax.Array, w: jax.Array, scale: jax.Array | None, block: int | None) -> jax.Array:
    """x [E, C, K] times w [E, ..., N, K] -> float32 [E, C, ..., N]."""
    if scale is None:
        return jnp.einsum("eck,e...nk->ec...n", x, w, preferred_element_type=jnp.float32)
    x_q, x_scale = quantize(x, block)
    w_q = split_blocks(w.astype(jnp.float32), block)
    out = jnp.einsum("ecbk,e...nbk->ec...nb", x_q.astype(jnp.float32), w_q)
    return jnp.einsum("ec...nb,e...nb,ecb->ec...n", out, scale, x_scale)
