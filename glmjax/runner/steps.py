"""The jitted step: unpack, model, sample, update. One program a bucket, for prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.model.attention import make_batch
from glmjax.model.decoder import Decoder
from glmjax.runner.blob import Fields, unpack
from glmjax.runner.sampling import sample
from glmjax.runner.state import DeviceState
from glmjax.sharding import placement, shard_map
from glmjax.types import Bucket, Limits

Step = Callable[[Any, DeviceState, jax.Array], tuple[DeviceState, jax.Array]]


def make_step(
    model: ModelConfig, limits: Limits, bucket: Bucket, mesh: Mesh, params: Any, state: Any
) -> Step:
    """The step function of a bucket, over the whole mesh.

    Args:
        params, state: trees of arrays, real or abstract, for where their parts lie.

    Returns:
        step(params, state, blob int32 [groups, n]) -> (state, out int32 [groups, 2, rows]): row 0
        of `out` the sampled tokens, row 1 how many of them count.
    """
    graph = nnx.graphdef(Decoder(model))

    def step(params: Any, state: DeviceState, blob: jax.Array) -> tuple[DeviceState, jax.Array]:
        decoder = nnx.merge(graph, nnx.State(params))
        fields = unpack(blob[0], bucket, limits)
        state, out = _group_step(decoder, state, fields, bucket, limits)
        return state, out[None]

    state_specs = placement(state)
    return shard_map(
        step,
        mesh,
        in_axes=(placement(params), state_specs, ("groups", None)),
        out_axes=(state_specs, ("groups", None, None)),
    )


def _group_step(
    decoder: Decoder, state: DeviceState, fields: Fields, bucket: Bucket, limits: Limits
) -> tuple[DeviceState, jax.Array]:
    """One data group's rows through the model. Padding rows have slots out of range."""
    slots = fields.slots
    page_table = _enter_pages(state.page_table, fields)
    lens = state.seq_lens.at[slots].get(mode="fill", fill_value=0)
    seq_lens = jnp.where(fields.starts < 0, lens, fields.starts) + fields.q_lens
    batch = make_batch(
        page_table.at[slots].get(mode="fill", fill_value=0),
        fields.q_lens,
        seq_lens,
        limits.page_size,
        bucket.tokens,
        bucket.max_q_len,
    )
    input_ids = _input_ids(state.last_token, fields, batch.q_starts)
    hidden, kv, _ = decoder(input_ids, state.kv, batch)
    last = hidden.at[batch.q_starts + fields.q_lens - 1].get(mode="clip")
    tokens = sample(
        decoder.logits(last),
        fields.temperature,
        fields.top_k,
        fields.top_p,
        jax.lax.bitcast_convert_type(fields.seeds, jnp.uint32),
        seq_lens,
    )
    sampled = jnp.where(fields.sample > 0, slots, limits.slots)
    state = replace(
        state,
        last_token=state.last_token.at[sampled].set(tokens, mode="drop"),
        seq_lens=state.seq_lens.at[slots].set(seq_lens, mode="drop"),
        page_table=page_table,
        kv=kv,
    )
    return state, jnp.stack([tokens, fields.sample])


def _enter_pages(page_table: jax.Array, fields: Fields) -> jax.Array:
    """Write each row's new pages into its slot's page table."""
    place = jnp.arange(fields.new_pages.shape[1])
    real = place < fields.page_count[:, None]
    column = jnp.where(real, fields.page_index[:, None] + place, page_table.shape[1])
    return page_table.at[fields.slots[:, None], column].set(fields.new_pages, mode="drop")


def _input_ids(last_token: jax.Array, fields: Fields, q_starts: jax.Array) -> jax.Array:
    """Query tokens [T]: the host's, and in their places those that only the device knows."""
    tokens = last_token.at[fields.slots].get(mode="fill", fill_value=0)
    target = jnp.where(fields.from_device > 0, q_starts, fields.token_ids.shape[0])
    return fields.token_ids.at[target].set(tokens, mode="drop")
