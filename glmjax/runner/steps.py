"""The jitted step: unpack, model, sample, verify, draft, update. One program a bucket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.model.attention import Batch, Rows, make_batch, split_rows
from glmjax.model.blocks import map_blocks
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.plans import Bucket, Limits
from glmjax.runner.blob import Fields, unpack
from glmjax.runner.drafts import draft, refresh
from glmjax.runner.logprobs import logprobs, logprobs_if
from glmjax.runner.outputs import pack_logprobs, prompt_logprobs
from glmjax.runner.sampling import adjust, constrain, count, faults, sample, unpack_scalars
from glmjax.runner.state import DeviceState
from glmjax.runner.verify import accept
from glmjax.sharding import crosses_hosts, gather_groups, placement, shard_map

QUERY_BLOCK = 32  # tokens of a chunk that attend together

Step = Callable[..., tuple[DeviceState, tuple[jax.Array, jax.Array, jax.Array]]]


@dataclass(frozen=True)
class Model:
    """The modules of one trace. `mtp` is None where nothing is drafted."""

    decoder: Decoder
    mtp: MTP | None


def make_step(
    model: ModelConfig, limits: Limits, bucket: Bucket, mesh: Mesh, params: Any, state: Any
) -> Step:
    """The step function of a bucket, over the whole mesh.

    With R = rows + chunk_rows, D the bucket's drafts, S = rows * (D + 1) + chunk_rows places that
    are sampled, N = MAX_LOGPROBS, and W words of a mask:

    Args:
        params, state: trees of arrays, real or abstract, for where their parts lie. `params` is
            {"model": tree of `Decoder`}, and with drafting "mtp": tree of `MTP`.

    Returns:
        step(params, state, blob int32 [groups, n], masks uint32 [groups, S, W]) -> (state, out):
        tokens int32 [groups, R, 2 D + 3]: how many count, whether logits were not finite, D + 1
        sampled tokens, D drafts; log probabilities float32 [groups, S, 1 + 2 N], as
        `pack_logprobs` has them; those of the prompt [groups, chunk_tokens, 1 + 2 N]. Over
        several hosts each of them has the outputs of all groups.
    """
    decoder_graph, mtp_graph = nnx.graphdef(Decoder(model)), None
    if limits.num_drafts:
        mtp_graph = nnx.graphdef(MTP(model))

    def step(params: Any, state: DeviceState, blob: jax.Array, masks: jax.Array) -> Any:
        decoder = nnx.merge(decoder_graph, nnx.State(params["model"]))
        mtp = mtp_graph and nnx.merge(mtp_graph, nnx.State(params["mtp"]))
        fields = unpack(blob[0], bucket, limits)
        run = GroupStep(Model(decoder, mtp), fields, bucket, limits)
        state, out = run(state, masks[0])
        return state, jax.tree.map(lambda x: gather_groups(x[None]) if gathers else x[None], out)

    specs = placement(state)
    gathers = limits.groups > 1 and crosses_hosts(mesh)
    rows = ("groups", None, None)
    outputs = (None, None, None) if gathers else rows
    return shard_map(
        step,
        mesh,
        in_axes=(placement(params), specs, ("groups", None), rows),
        out_axes=(specs, (outputs, outputs, outputs)),
    )


class GroupStep:
    """One data group's rows through the model. Padding rows have slots out of range."""

    def __init__(self, model: Model, fields: Fields, bucket: Bucket, limits: Limits):
        self.model, self.fields, self.bucket, self.limits = model, fields, bucket, limits
        self.width = bucket.drafts + 1  # places of a decode row
        self.decode_tokens = bucket.rows * self.width
        self.slots = jnp.concatenate([fields.slots, fields.chunk_slots])
        self.real = fields.slots < limits.slots

    def __call__(self, state: DeviceState, masks: jax.Array) -> tuple[DeviceState, Any]:
        """The state after the step, and its outputs."""
        state = self._enter(state)
        batch = self._batch(state)
        input_ids = self._input_ids(state)
        decoder = self.model.decoder
        hidden, kv, _ = decoder(input_ids, state.kv, batch)
        state = replace(state, kv=kv)
        raw = decoder.logits(hidden[self._places()])
        tokens, broken = self._sample(raw, state, batch, masks)
        wanted = self.fields.wanted
        probs = self._each(partial(self._logprobs, wanted[0] > 0), raw, tokens)
        following = self._following(tokens, input_ids)
        prompt = prompt_logprobs(
            wanted[1] > 0,
            partial(self._each, self._known_logprobs),
            hidden[self.decode_tokens :],
            following[self.decode_tokens :],
        )
        rows, counts, lens = self._settle(tokens, state, batch)
        state = self._update(state, rows, counts, lens)
        state, drafts = self._draft(state, batch, hidden, following, counts, lens)
        head = [counts[:, None], self._row_faults(broken, counts)[:, None], rows, drafts]
        return state, (jnp.concatenate(head, axis=1), probs, prompt)

    def _each(self, fn: Callable[..., Any], *arrays: jax.Array) -> Any:
        """`fn` of arrays [n, ...]; in blocks of one shape where no other place may matter."""
        if not self.model.decoder.config.deterministic:
            return fn(*arrays)
        count = arrays[0].shape[0]
        return map_blocks(lambda _, block: ((), fn(*block)), (), arrays, count)[1]

    def _logprobs(self, wanted: jax.Array, raw: jax.Array, tokens: jax.Array) -> jax.Array:
        return pack_logprobs(logprobs_if(wanted, raw, tokens))

    def _known_logprobs(self, hidden: jax.Array, following: jax.Array) -> jax.Array:
        return pack_logprobs(logprobs(self.model.decoder.logits(hidden), following))

    # what comes in

    def _enter(self, state: DeviceState) -> DeviceState:
        """New pages and, for chunks, how to sample."""
        f = self.fields
        table = _enter_pages(state.page_table, f.slots, f.page_index, f.page_count, f.new_pages)
        table = _enter_pages(
            table, f.chunk_slots, f.chunk_page_index, f.chunk_page_count, f.chunk_new_pages
        )
        plain = jnp.where(f.plain > 0, f.chunk_slots, self.limits.slots)
        changed = state.tables.changed.at[plain].set(0, mode="drop")
        return replace(
            state,
            page_table=table,
            scalars=state.scalars.at[f.chunk_slots].set(f.scalars, mode="drop"),
            tables=replace(state.tables, changed=changed),
        )

    def _batch(self, state: DeviceState) -> Batch:
        f, bucket = self.fields, self.bucket
        lens = state.seq_lens.at[f.slots].get(mode="fill", fill_value=0)
        parts = []
        if bucket.rows:
            q_lens = jnp.where(self.real, f.drafts + 1, 0)
            starts = jnp.arange(bucket.rows, dtype=jnp.int32) * self.width
            held = f.page_index + f.page_count
            ends = lens + q_lens
            sizes = 0, self.decode_tokens, self.width
            parts.append(Rows(f.slots, held, starts, q_lens, ends, *sizes))
        if bucket.chunk_rows:
            starts = jnp.cumsum(f.q_lens) - f.q_lens
            held = f.chunk_page_index + f.chunk_page_count
            sizes = self.decode_tokens, bucket.chunk_tokens, bucket.chunk_tokens
            ends = f.starts + f.q_lens
            rows = Rows(f.chunk_slots, held, starts, f.q_lens, ends, *sizes)
            parts.append(split_rows(rows, min(QUERY_BLOCK, bucket.chunk_tokens)))
        return make_batch(state.page_table, self.limits.page_size, tuple(parts))

    def _input_ids(self, state: DeviceState) -> jax.Array:
        """Query tokens [T]: the device's last tokens and drafts, then the host's chunks."""
        last = state.last_token.at[self.fields.slots].get(mode="fill", fill_value=0)
        known = jnp.concatenate([last[:, None], self._drafts(state)], axis=1)
        return jnp.concatenate([known.reshape(-1), self.fields.token_ids])

    def _drafts(self, state: DeviceState) -> jax.Array:
        """int32 [rows, D], what decode rows verify."""
        drafts = state.drafts.at[self.fields.slots].get(mode="fill", fill_value=0)
        return drafts[:, : self.bucket.drafts]

    # sampling

    def _places(self) -> jax.Array:
        """int32 [S]: tokens after which one is sampled."""
        decode = jnp.arange(self.decode_tokens, dtype=jnp.int32)
        return jnp.concatenate([decode, self._chunk_ends()])

    def _chunk_ends(self) -> jax.Array:
        """int32 [chunk_rows]: the last token of each chunk."""
        return self.decode_tokens + jnp.maximum(jnp.cumsum(self.fields.q_lens) - 1, 0)

    def _sample(
        self, raw: jax.Array, state: DeviceState, batch: Batch, masks: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Tokens int32 [S], and whether a place has logits from which none can be chosen."""
        slots = jnp.concatenate(
            [jnp.repeat(self.fields.slots, self.width), self.fields.chunk_slots]
        )
        positions = batch.positions[self._places()] + 1
        choose = partial(self._choose, state)
        return self._each(choose, raw, slots, positions, self._pending(state), masks)

    def _choose(
        self,
        state: DeviceState,
        raw: jax.Array,
        slots: jax.Array,
        positions: jax.Array,
        pending: jax.Array,
        masks: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        scalars = unpack_scalars(state.scalars.at[slots].get(mode="fill", fill_value=0))
        logits = adjust(raw, scalars, state.tables, slots, positions, pending)
        limited = self.fields.wanted[2] > 0
        logits = jax.lax.cond(limited, limit, lambda logits, *_: logits, logits, raw, masks)
        return sample(logits, scalars, positions), faults(raw) | faults(logits)

    def _pending(self, state: DeviceState) -> jax.Array:
        """int32 [S, D]: at place i of a decode row its first i drafts; else -1."""
        drafts = jnp.repeat(self._drafts(state), self.width, axis=0)
        place = jnp.arange(self.decode_tokens)[:, None] % self.width
        before = jnp.arange(self.bucket.drafts) < place
        none = jnp.full((self.bucket.chunk_rows, self.bucket.drafts), -1, jnp.int32)
        return jnp.concatenate([jnp.where(before, drafts, -1), none])

    def _settle(
        self, tokens: jax.Array, state: DeviceState, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Tokens [R, D + 1] of each row, how many of them count [R], and lengths after them."""
        f = self.fields
        decoded = tokens[: self.decode_tokens].reshape(-1, self.width)
        accepted = accept(decoded, self._drafts(state), f.drafts)
        sampled = tokens[self.decode_tokens :]
        single = jnp.pad(sampled[:, None], ((0, 0), (0, self.bucket.drafts)))
        counts = jnp.concatenate([jnp.where(self.real, accepted + 1, 0), f.sample])
        lens = state.seq_lens.at[f.slots].get(mode="fill", fill_value=0)
        ends = jnp.concatenate([lens + accepted + 1, f.starts + f.q_lens])
        return jnp.concatenate([decoded, single]), counts, ends

    def _row_faults(self, broken: jax.Array, counts: jax.Array) -> jax.Array:
        """int32 [R]: whether a token that counts came of logits that were not finite."""
        decoded = broken[: self.decode_tokens].reshape(-1, self.width)
        chunks = jnp.pad(broken[self.decode_tokens :, None], ((0, 0), (0, self.bucket.drafts)))
        real = jnp.arange(self.width) < counts[:, None]
        return jnp.any(jnp.concatenate([decoded, chunks]) & real, axis=1).astype(jnp.int32)

    def _update(
        self, state: DeviceState, tokens: jax.Array, counts: jax.Array, lens: jax.Array
    ) -> DeviceState:
        sampled = jnp.where(counts > 0, self.slots, self.limits.slots)
        last = jnp.take_along_axis(tokens, jnp.maximum(counts - 1, 0)[:, None], axis=1)[:, 0]
        real = jnp.arange(self.width) < counts[:, None]
        return replace(
            state,
            last_token=state.last_token.at[sampled].set(last, mode="drop"),
            seq_lens=state.seq_lens.at[self.slots].set(lens, mode="drop"),
            tables=count(state.tables, sampled, tokens, real),
        )

    # drafting

    def _following(self, tokens: jax.Array, input_ids: jax.Array) -> jax.Array:
        """int32 [T]: the token after each query token, known or just sampled."""
        f = self.fields
        if not self.bucket.chunk_tokens:  # a roll of nothing would cost kernels their code
            return tokens
        ends = self._chunk_ends() - self.decode_tokens
        sampled = tokens[self.decode_tokens :]
        last = jnp.where(f.sample > 0, sampled, f.next_tokens)
        at = jnp.where(f.q_lens > 0, ends, self.bucket.chunk_tokens)
        chunks = jnp.roll(input_ids[self.decode_tokens :], -1).at[at].set(last, mode="drop")
        return jnp.concatenate([tokens[: self.decode_tokens], chunks])

    def _draft(
        self,
        state: DeviceState,
        batch: Batch,
        hidden: jax.Array,
        following: jax.Array,
        counts: jax.Array,
        lens: jax.Array,
    ) -> tuple[DeviceState, jax.Array]:
        """The draft layer over this step's tokens; then, from each row's last, D drafts [R, D]."""
        model, drafts = self.model, self.bucket.drafts
        none = jnp.zeros((self.slots.shape[0], 0), jnp.int32)
        if model.mtp is None:
            return state, none
        hidden, kv = refresh(model.decoder, model.mtp, hidden, following, state.kv, batch)
        if not drafts:
            return replace(state, kv=kv), none
        decode = jnp.arange(self.bucket.rows) * self.width + jnp.maximum(
            counts[: self.bucket.rows] - 1, 0
        )
        last = jnp.concatenate([decode, self._chunk_ends()])
        f = self.fields
        held = jnp.concatenate(
            [f.page_index + f.page_count, f.chunk_page_index + f.chunk_page_count]
        )

        def layout(step: int) -> Batch:
            n = self.slots.shape[0]
            starts, q_lens = jnp.arange(n, dtype=jnp.int32), (counts > 0).astype(jnp.int32)
            rows = Rows(self.slots, held, starts, q_lens, lens + step, 0, n, 1)
            return make_batch(state.page_table, self.limits.page_size, (rows,))

        found, kv = draft(model.decoder, model.mtp, hidden[last], kv, layout, drafts)
        sampled = jnp.where(counts > 0, self.slots, self.limits.slots)
        kept = state.drafts.at[sampled].set(found, mode="drop")
        return replace(state, kv=kv, drafts=kept), found


def limit(logits: jax.Array, raw: jax.Array, masks: jax.Array) -> jax.Array:
    """`constrain`; where all that is allowed is barred otherwise, what is allowed of `raw`."""
    both = constrain(logits, masks)
    return jnp.where(faults(both)[:, None], constrain(raw, masks), both)


def _enter_pages(
    page_table: jax.Array, slots: jax.Array, index: jax.Array, count: jax.Array, pages: jax.Array
) -> jax.Array:
    """Write each row's new pages into its slot's page table."""
    place = jnp.arange(pages.shape[1])
    column = jnp.where(place < count[:, None], index[:, None] + place, page_table.shape[1])
    return page_table.at[slots[:, None], column].set(pages, mode="drop")
