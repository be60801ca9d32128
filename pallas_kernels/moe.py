"""Grouped expert MLPs: every token through its chosen experts, no token dropped."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.activation import silu_mul
from pallas_kernels.linear import quantize, split_blocks


def grouped_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    gate_up_scale: jax.Array | None = None,
    down_scale: jax.Array | None = None,
    *,
    block: int | None = None,
) -> jax.Array:
    """Sum over a token's experts e of weight * down_e(silu(gate_e x) * up_e x).

    Experts are computed as one batched product over buffers [E, C, D]. The capacity C is the
    smallest of a few that holds the busiest expert, chosen on the device for each call.

    Args:
        x: [T, D].
        ids: int32 [T, k]; an id of E or more computes nothing (padding tokens).
        weights: float32 [T, k].
        gate_up: [E, 2, F, D], gate first.
        down: [E, D, F].
        gate_up_scale, down_scale: float32 [E, 2, F, B], [E, D, B] where the weights are FP8.
        block: columns that share a scale, as in `scaled_linear`.

    Returns:
        float32 [T, D].
    """
    num_experts = gate_up.shape[0]
    slots, load = _slots(ids, num_experts)
    capacities = _capacities(x.shape[0])
    run = [partial(_with_capacity, capacity=c, block=block) for c in capacities]
    index = jnp.searchsorted(jnp.array(capacities), load)
    experts = (gate_up, gate_up_scale, down, down_scale)
    return jax.lax.switch(index, run, x, ids, slots, weights, experts)


def _slots(ids: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Place of each (token, choice) among those of its expert [T, k], and the busiest's load []."""
    one_hot = jax.nn.one_hot(ids.reshape(-1), num_experts, dtype=jnp.int32)
    before = jnp.cumsum(one_hot, axis=0) - one_hot
    slots = jnp.sum(before * one_hot, axis=-1).reshape(ids.shape)
    return slots, jnp.max(jnp.sum(one_hot, axis=0))


def _capacities(tokens: int) -> list[int]:
    """Buffer rows an expert to choose from: 2, 8, 32, ... and as many as there are tokens."""
    powers = [2 * 4**i for i in range(12)]
    return [c for c in powers if c < tokens] + [tokens]


def _with_capacity(x, ids, slots, weights, experts, *, capacity: int, block: int | None):
    gate_up, gate_up_scale, down, down_scale = experts
    num_experts, tokens = gate_up.shape[0], jnp.arange(x.shape[0])[:, None]
    buffers = jnp.zeros((num_experts, capacity, x.shape[1]), x.dtype)
    buffers = buffers.at[ids, slots].set(
        jnp.broadcast_to(x[tokens], (*ids.shape, x.shape[1])), mode="drop"
    )
    hidden = _batched(buffers, gate_up, gate_up_scale, block)
    hidden = silu_mul(hidden[:, :, 0], hidden[:, :, 1]).astype(x.dtype)
    out = _batched(hidden, down, down_scale, block)
    chosen = out.at[ids, slots].get(mode="fill", fill_value=0)
    return jnp.sum(chosen * weights[..., None], axis=1)


def _batched(x: jax.Array, w: jax.Array, scale: jax.Array | None, block: int | None) -> jax.Array:
    """x [E, C, K] times w [E, ..., N, K] -> float32 [E, C, ..., N]."""
    if scale is None:
        return jnp.einsum("eck,e...nk->ec...n", x, w, preferred_element_type=jnp.float32)
    x_q, x_scale = quantize(x, block)
    w_q = split_blocks(w.astype(jnp.float32), block)
    out = jnp.einsum("ecbk,e...nbk->ec...nb", x_q.astype(jnp.float32), w_q)
    return jnp.einsum("ec...nb,e...nb,ecb->ec...n", out, scale, x_scale)
