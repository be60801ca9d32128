"""Choosing tokens on the device: greedy, temperature, top-k, top-p."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample(
    logits: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """One token a row; what is drawn depends on the row's seed and position alone.

    Logits are divided by the temperature, cut to the `top_k` largest, then to the smallest set
    whose probability reaches `top_p`; a Gumbel maximum draws from what is left.

    Args:
        logits: float32 [R, V].
        temperature: float32 [R]; 0 is greedy.
        top_k: int32 [R]; -1: all.
        top_p: float32 [R].
        seeds: uint32 [R].
        positions: int32 [R], the position that the token will take.

    Returns:
        int32 [R].
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_: None) -> jax.Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        cuts = jnp.any((temperature > 0) & ((top_k > 0) | (top_p < 1.0)))
        kept = jax.lax.cond(cuts, lambda x: keep_likely(x, top_k, top_p), lambda x: x, scaled)
        drawn = jnp.argmax(kept + _gumbel(seeds, positions, logits.shape[-1]), axis=-1)
        return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, None)


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf outside the `top_k` largest and, of those, the fewest that reach `top_p`. [R, V]."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    rank = jnp.arange(logits.shape[-1])
    allowed = jnp.where(top_k > 0, top_k, logits.shape[-1])[:, None]
    descending = jnp.take_along_axis(logits, order, axis=-1)
    probs = jax.nn.softmax(jnp.where(rank < allowed, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (rank == 0) | ((before < top_p[:, None]) & (rank < allowed))
    masked = jnp.where(kept, descending, -jnp.inf)
    return jnp.put_along_axis(logits, order, masked, axis=-1, inplace=False)


def _gumbel(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(seeds, positions)
