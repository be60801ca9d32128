"""Log probabilities on the device. Dims: S places, V vocabulary, N = `most`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glmjax.types import MAX_LOGPROBS

Logprobs = tuple[jax.Array, jax.Array, jax.Array]


def logprobs(logits: jax.Array, chosen: jax.Array, most: int = MAX_LOGPROBS) -> Logprobs:
    """Log probabilities of chosen tokens and of the likeliest.

    Args:
        logits: float32 [S, V].
        chosen: int32 [S]; an id outside of 0 to V - 1 gives a number that means nothing.

    Returns:
        float32 [S] of `chosen`; int32 [S, N] the likeliest ids, most likely first and lower ids
        first among equals; float32 [S, N] theirs. Where V < N the rest is id -1 at -inf.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, chosen[:, None], axis=-1, mode="clip")
    top, ids = jax.lax.top_k(logits, min(most, logits.shape[-1]))
    rest = ((0, 0), (0, most - top.shape[-1]))
    top = jnp.pad(top - total, rest, constant_values=-jnp.inf)
    return (own - total)[:, 0], jnp.pad(ids, rest, constant_values=-1), top


def logprobs_if(
    wanted: jax.Array, logits: jax.Array, chosen: jax.Array, most: int = MAX_LOGPROBS
) -> Logprobs:
    """`logprobs` where `wanted`, bool [], is true; else zeros, and nothing is computed."""

    def zeros() -> Logprobs:
        places = logits.shape[0]
        return (
            jnp.zeros(places, jnp.float32),
            jnp.zeros((places, most), jnp.int32),
            jnp.zeros((places, most), jnp.float32),
        )

    return jax.lax.cond(wanted, lambda: logprobs(logits, chosen, most), zeros)
