"""How many drafts of a step stand."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def accept(tokens: jax.Array, drafts: jax.Array, num_drafts: jax.Array) -> jax.Array:
    """How many leading drafts of each row equal the token that was sampled in their place.

    This changes nothing of what is put out. A draft is one token and no distribution, and the
    token of a place is drawn with noise of (seed, position) alone, from logits after the drafts
    before it. Where those drafts were accepted they are the true tokens, so it is the very token
    that would have been drawn without drafts: equal, the draft stands; unequal, the sampled token
    takes its place and the rest is dropped. Rows go on with `tokens[:, : accepted + 1]`.

    Args:
        tokens: int32 [R, D + 1]; token i was sampled after the last token and i drafts.
        drafts: int32 [R, D].
        num_drafts: int32 [R], how many of each row's drafts are real.

    Returns:
        int32 [R], at most `num_drafts`.
    """
    real = jnp.arange(drafts.shape[1]) < num_drafts[:, None]
    equal = (tokens[:, : drafts.shape[1]] == drafts) & real
    return jnp.cumprod(equal.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
