"""Drafting with the MTP block, after a step has sampled. T tokens, R rows, D model."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from glmjax.model.attention import Batch, KVPool
from glmjax.model.decoder import Decoder
from glmjax.model.layers import embed
from glmjax.model.mtp import MTP


def refresh(
    decoder: Decoder, mtp: MTP, hidden: jax.Array, following: jax.Array, kv: KVPool, batch: Batch
) -> tuple[jax.Array, KVPool]:
    """The block over a step's tokens, so that its KV is of the model's own states.

    Args:
        hidden: [T, D], the model's states after its final norm.
        following: int32 [T], the token after each. Behind the last one that counts it may be
            anything: the next step writes those positions anew before they are looked at.

    Returns:
        [T, D], ready for the first draft; the pool written.
    """
    embedded = embed(following, decoder.embed_tokens.get_value())
    hidden, kv, _ = mtp(embedded, hidden, kv, batch, mtp.config.num_hidden_layers)
    return hidden, kv


def draft(
    decoder: Decoder,
    mtp: MTP,
    hidden: jax.Array,
    kv: KVPool,
    layout: Callable[[int], Batch],
    steps: int,
) -> tuple[jax.Array, KVPool]:
    """Greedy chains of drafts, one a row.

    Args:
        hidden: [R, D], the block's states at each row's last token.
        layout: places of the tokens that draft 1, 2, ... add behind it.
        steps: drafts a chain, at least 1.

    Returns:
        int32 [R, steps], and the pool, written at positions that the next step writes anew.
    """
    found = [decoder.logits(hidden).argmax(-1).astype(jnp.int32)]
    for step in range(1, steps):
        hidden, kv = refresh(decoder, mtp, hidden, found[-1], kv, layout(step))
        found.append(decoder.logits(hidden).argmax(-1).astype(jnp.int32))
    return jnp.stack(found, axis=1), kv
