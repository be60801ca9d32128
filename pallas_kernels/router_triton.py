"""The router as one Triton kernel: a warp a token, `top_k` times the best of what is left."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.triton import launch, load, store


def route(
    logits: jax.Array,
    bias: jax.Array,
    valid: jax.Array,
    *,
    top_k: int,
    norm: bool,
    scaling: float,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`router.route` without groups. valid: bool [T]."""
    tokens, experts = logits.shape
    kernel = partial(_kernel, experts=experts, top_k=top_k, norm=norm, scaling=scaling)
    shape = tokens, top_k
    ids, weights = launch(
        kernel,
        [logits, bias, valid.astype(jnp.int32)],
        [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)],
        grid=(tokens,),
        warps=1,
        interpret=interpret,
        name="route",
    )
    return ids, weights


def _kernel(
    logits_ref, bias_ref, valid_ref, ids_ref, weights_ref, *, experts, top_k, norm, scaling
):
    token = pl.program_id(0)
    lanes = jnp.arange(pl.next_power_of_2(experts), dtype=jnp.int32)
    real = lanes < experts
    logits = load(logits_ref.at[token, lanes], mask=real, other=0.0)
    scores = jnp.where(real, jax.nn.sigmoid(logits), 0.0)
    choice = scores + load(bias_ref.at[lanes], mask=real, other=0.0)
    ids, weights = _best(jnp.where(real, choice, -jnp.inf), scores, lanes, experts, top_k)
    if norm:
        weights = weights / (jnp.sum(weights) + 1e-20)
    ids = jnp.where(valid_ref[token] > 0, ids, experts)
    places = jnp.arange(ids.shape[0], dtype=jnp.int32)
    store(ids_ref.at[token, places], ids, mask=places < top_k)
    store(weights_ref.at[token, places], weights * scaling, mask=places < top_k)


def _best(choice, scores, lanes, experts: int, top_k: int):
    """Ids and scores of the largest, in lanes for the next power of two; zeros beyond `top_k`."""
    places = jnp.arange(pl.next_power_of_2(top_k), dtype=jnp.int32)
    ids, weights = jnp.zeros_like(places), jnp.zeros(places.shape, jnp.float32)
    for place in range(top_k):
        # The lowest of equals; of NaNs, which equal nothing, none: then the id is padding's.
        best = jnp.min(jnp.where(choice == jnp.max(choice), lanes, experts))
        ids = jnp.where(places == place, best, ids)
        weight = jnp.sum(jnp.where(lanes == best, scores, 0.0))
        weights = jnp.where(places == place, weight, weights)
        choice = jnp.where(lanes == best, -jnp.inf, choice)
    return ids, weights
