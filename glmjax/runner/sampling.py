"""Choosing tokens on the device: penalties, bias, constraints, temperature, top-k, top-p, min-p.

Dims: S places that are sampled, B slots, V vocabulary, D drafts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.model.spec import ParamSpec
from glmjax.plans import History
from glmjax.types import MAX_END_IDS, MAX_INT, MAX_LOGIT_BIAS, SamplingParams

_DTYPES = {
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "min_p": np.float32,
    "seed": np.uint32,
    "frequency_penalty": np.float32,
    "presence_penalty": np.float32,
    "repetition_penalty": np.float32,
    "min_len": np.int32,
}
SCALARS = tuple(_DTYPES)

# Far beyond what changes a choice, and so near that products of them stay finite in float32.
_TEMPERATURES = (1e-20, 1e20)
_REPETITION_PENALTIES = (1e-6, 1e6)
_MAX_BIAS = 1e9

_IN_PROMPT = 1 << 15
_MAX_COUNT = _IN_PROMPT - 1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scalars:
    """The numbers of `SamplingParams`, one of each a place.

    Attributes:
        temperature, top_p, min_p: float32 [S]; temperature 0 is greedy.
        top_k: int32 [S]; -1: all.
        seed: uint32 [S].
        frequency_penalty, presence_penalty, repetition_penalty: float32 [S].
        min_len: int32 [S], position below which no end token is sampled.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    frequency_penalty: Any
    presence_penalty: Any
    repetition_penalty: Any
    min_len: Any


def pack_scalars(sampling: SamplingParams, min_len: int) -> np.ndarray:
    """A sequence's numbers as int32 [len(SCALARS)], floats and the seed as their bits."""
    temperature = sampling.temperature and np.clip(sampling.temperature, *_TEMPERATURES)
    special = {
        "temperature": temperature,
        "repetition_penalty": np.clip(sampling.repetition_penalty, *_REPETITION_PENALTIES),
        "min_len": min(min_len, MAX_INT),
    }
    values = (special.get(name, getattr(sampling, name, None)) for name in SCALARS)
    bits = [np.array(v, t).view(np.int32) for v, t in zip(values, _DTYPES.values(), strict=True)]
    return np.array(bits, np.int32)


def unpack_scalars(bits: jax.Array) -> Scalars:
    """Scalars of int32 [S, len(SCALARS)], rows that `pack_scalars` made."""
    columns = zip(_DTYPES.items(), bits.T, strict=True)
    return Scalars(**{n: jax.lax.bitcast_convert_type(c, dtype) for (n, dtype), c in columns})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tables:
    """What changes the logits of each slot. Ids of V or above change nothing.

    Attributes:
        counts: uint16 [B, V]; bit 15: the token is in the prompt; below: how often it was put out,
            to about 32,000.
        bias_ids, bias: int32 and float32 [B, MAX_LOGIT_BIAS].
        end_ids: int32 [B, MAX_END_IDS], barred at positions below `min_len`.
        changed: int32 [B]; 0: none of the others means anything.
    """

    counts: Any
    bias_ids: Any
    bias: Any
    end_ids: Any
    changed: Any


def table_specs(slots: int, vocab: int) -> Tables:
    """ParamSpecs of the tables; zeros are tables that change nothing."""
    axes = ("slots", None)
    return Tables(
        counts=ParamSpec((slots, vocab), "uint16", axes),
        bias_ids=ParamSpec((slots, MAX_LOGIT_BIAS), "int32", axes),
        bias=ParamSpec((slots, MAX_LOGIT_BIAS), "float32", axes),
        end_ids=ParamSpec((slots, MAX_END_IDS), "int32", axes),
        changed=ParamSpec((slots,), "int32", ("slots",)),
    )


def table_row(history: History | None, sampling: SamplingParams, vocab_size: int) -> np.ndarray:
    """One slot's part of `Tables`, flat, for `enter_row`.

    Args:
        history: None: nothing changes this sequence's logits.

    Returns:
        int32 [V + 2 * MAX_LOGIT_BIAS + MAX_END_IDS + 1]: one after another in the order of
        `Tables`, the bias as bits.

    Raises:
        ValueError: there are more than MAX_END_IDS end ids.
    """
    known = history or History((), (), ())
    outputs = np.bincount(np.array(known.output_ids, np.int64), minlength=vocab_size)
    counts = np.minimum(outputs, _MAX_COUNT).astype(np.int32)
    counts[list(known.prompt_ids)] |= _IN_PROMPT
    biases = np.clip(np.array(list(sampling.logit_bias.values())), -_MAX_BIAS, _MAX_BIAS)
    return np.concatenate(
        [
            counts,
            _filled(list(sampling.logit_bias), MAX_LOGIT_BIAS, vocab_size, "logit biases"),
            _filled(biases.astype(np.float32).view(np.int32), MAX_LOGIT_BIAS, 0, "logit biases"),
            _filled(sorted(set(known.end_ids)), MAX_END_IDS, vocab_size, "end ids"),
            np.array([history is not None], np.int32),
        ]
    )


def _filled(values: Any, size: int, unused: int, what: str) -> np.ndarray:
    if len(values) > size:
        raise ValueError(f"{len(values)} {what}, but a slot's table holds {size}")
    row = np.full(size, unused, np.int32)
    row[: len(values)] = values
    return row


def enter_row(tables: Tables, slot: jax.Array, row: jax.Array) -> Tables:
    """Write what `table_row` made, int32 [n], to `slot`, int32 []; B or above: to none."""
    ends = np.cumsum([tables.counts.shape[1], MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, MAX_END_IDS])
    counts, bias_ids, bias, end_ids, changed = jnp.split(row, ends)
    values = Tables(
        counts=counts.astype(jnp.uint16),
        bias_ids=bias_ids,
        bias=jax.lax.bitcast_convert_type(bias, jnp.float32),
        end_ids=end_ids,
        changed=changed[0],
    )
    return jax.tree.map(lambda table, new: table.at[slot].set(new, mode="drop"), tables, values)


def count(tables: Tables, slots: jax.Array, tokens: jax.Array, valid: jax.Array) -> Tables:
    """Add tokens that were put out, where anything is changed by them.

    Args:
        slots: int32 [R]; B or above: none.
        tokens: int32 [R, n].
        valid: bool [R, n], which of them were put out.
    """
    changed = tables.changed.at[slots].get(mode="fill", fill_value=0) > 0
    at = jnp.broadcast_to(slots[:, None], tokens.shape), tokens
    before = tables.counts.at[at].get(mode="fill", fill_value=0) & _MAX_COUNT
    # One more of each of these may not carry into bit 15.
    fits = before < _MAX_COUNT - tokens.shape[1]
    more = (valid & changed[:, None] & fits).astype(jnp.uint16)
    return replace(tables, counts=tables.counts.at[at].add(more, mode="drop"))


def adjust(
    logits: jax.Array,
    scalars: Scalars,
    tables: Tables,
    slots: jax.Array,
    positions: jax.Array,
    pending: jax.Array,
) -> jax.Array:
    """Penalties, then bias, then -inf for end tokens below `min_len`; free where none is changed.

    Args:
        logits: float32 [S, V].
        slots: int32 [S]; B or above: nothing changes.
        positions: int32 [S], the position that the token will take.
        pending: int32 [S, D], drafts of the same step that stand before the place, and so count as
            put out; -1: none.

    Returns:
        float32 [S, V].
    """
    changed = tables.changed.at[slots].get(mode="fill", fill_value=0) > 0

    def change(logits: jax.Array) -> jax.Array:
        counts = tables.counts.at[slots].get(mode="fill", fill_value=0)
        outputs = _add_at((counts & _MAX_COUNT).astype(jnp.int32), pending, 1)
        seen = (outputs > 0) | (counts >= _IN_PROMPT)
        new = _penalise(logits, scalars, outputs, seen)
        new = _add_at(new, *_rows(slots, tables.bias_ids, tables.bias))
        (end_ids,) = _rows(slots, tables.end_ids)
        barred = jnp.where((positions < scalars.min_len)[:, None], end_ids, -1)
        new = _add_at(new, barred, -jnp.inf)
        return jnp.where(changed[:, None], new, logits)

    return jax.lax.cond(jnp.any(changed), change, lambda logits: logits, logits)


def _penalise(
    logits: jax.Array, scalars: Scalars, outputs: jax.Array, seen: jax.Array
) -> jax.Array:
    repetition = scalars.repetition_penalty[:, None]
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    frequency = scalars.frequency_penalty[:, None] * outputs
    presence = scalars.presence_penalty[:, None] * (outputs > 0)
    return jnp.where(seen, repeated, logits) - frequency - presence


def _rows(slots: jax.Array, *tables: jax.Array) -> list[jax.Array]:
    return [table.at[slots].get(mode="clip") for table in tables]


def _add_at(values: jax.Array, ids: jax.Array, amount: jax.Array | float) -> jax.Array:
    """Add to values [S, V] at ids [S, n]; those outside of 0 to V - 1 are dropped."""
    places = jnp.arange(values.shape[0])[:, None]
    columns = jnp.where(ids < 0, values.shape[1], ids)
    return values.at[places, columns].add(amount, mode="drop")


def constrain(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """-inf for tokens that are not allowed.

    Args:
        logits: float32 [S, V].
        masks: uint32 [S, ceil(V / 32)]; bit t % 32 of word t // 32 is 1 where token t is allowed.
    """
    bits = masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
    allowed = bits.reshape(masks.shape[0], -1)[:, : logits.shape[1]]
    return jnp.where(allowed > 0, logits, -jnp.inf)


def faults(logits: jax.Array) -> jax.Array:
    """bool [S]: rows of float32 [S, V] from which nothing can be chosen: NaN, inf or all -inf."""
    return ~jnp.isfinite(jnp.max(logits, axis=-1))


def sample(logits: jax.Array, scalars: Scalars, positions: jax.Array) -> jax.Array:
    """One token a place; what is drawn depends on the row's seed and position alone.

    Logits are divided by the temperature, cut to the `top_k` largest, then to the smallest set
    whose probability reaches `top_p`, then to those at least `min_p` times as likely as the
    likeliest; a Gumbel maximum draws from what is left.

    Args:
        logits: float32 [S, V]; a row that is not finite does not harm the others.
        positions: int32 [S], the position that the token will take.

    Returns:
        int32 [S].
    """
    temperature, top_k, top_p = scalars.temperature, scalars.top_k, scalars.top_p
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(_: None) -> jax.Array:
        scaled = logits / jnp.where(temperature > 0, temperature, 1.0)[:, None]
        cuts = jnp.any((temperature > 0) & ((top_k > 0) | (top_p < 1.0)))
        kept = jax.lax.cond(cuts, lambda x: keep_likely(x, top_k, top_p), lambda x: x, scaled)
        kept = _keep_near(kept, scalars.min_p)
        drawn = jnp.argmax(kept + _gumbel(scalars.seed, positions, logits.shape[-1]), axis=-1)
        return jnp.where(temperature > 0, drawn.astype(jnp.int32), greedy)

    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda _: greedy, None)


def keep_likely(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """-inf outside the `top_k` largest and, of those, the fewest that reach `top_p`. [S, V].

    Both keep the first of the order by logit, among equals by id. Where they end is searched for,
    because a sort of the vocabulary is slow. A row without cuts keeps all: what a request samples
    may not depend on its neighbours' cuts.
    """
    vocab_size, keys = logits.shape[-1], _keys(logits)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    many = jnp.where(top_k > 0, jnp.minimum(top_k, vocab_size), vocab_size)
    lowest = _reach(keys, 1, many)
    above, _, weight = _around(keys, weights, lowest)
    room = many - jnp.sum(keys > lowest[:, None], axis=-1)  # for equals of the lowest
    target = top_p * (above + room * weight)
    # Of a top_p of 1 rounded sums fall short, and a top_p of 0 keeps the likeliest.
    target = jnp.where(top_p < 1, jnp.maximum(target, jnp.finfo(jnp.float32).tiny), jnp.inf)
    cut = jnp.maximum(lowest, _reach(keys, weights, target))
    above, equal, weight = _around(keys, weights, cut)
    before = jnp.cumsum(equal, axis=-1) - 1
    room = jnp.where(cut == lowest, room, vocab_size)
    some = (before < room[:, None]) & (before * weight[:, None] < (target - above)[:, None])
    return jnp.where((keys > cut[:, None]) | (equal & some), logits, -jnp.inf)


def _keys(values: jax.Array) -> jax.Array:
    """uint32 in the order of float32; zeros of both signs are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(values == 0, 0.0, values), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits < sign, bits | sign, ~bits)


def _reach(keys: jax.Array, weights: jax.Array | int, target: jax.Array) -> jax.Array:
    """The largest key, uint32 [S], from which on `weights` add up to `target`; 0: they never do.

    Found bit by bit. Rounding does no harm: a sum in one order never falls as its terms rise.
    """

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        raised = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(keys >= raised[:, None], weights, 0), axis=-1)
        return jnp.where(reached >= target, raised, found)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros_like(keys[:, 0]))


def _around(keys: jax.Array, weights: jax.Array, key: jax.Array) -> tuple[jax.Array, ...]:
    """Sum of weights above `key` [S], what equals it [S, V], and the weight of one of those [S]."""
    equal = keys == key[:, None]
    above = jnp.sum(jnp.where(keys > key[:, None], weights, 0), axis=-1)
    return above, equal, jnp.max(jnp.where(equal, weights, 0), axis=-1)


def _keep_near(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    below = logits - jnp.max(logits, axis=-1, keepdims=True)
    return jnp.where(below >= jnp.log(min_p)[:, None], logits, -jnp.inf)


def _gumbel(seeds: jax.Array, positions: jax.Array, vocab_size: int) -> jax.Array:
    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, (vocab_size,), jnp.float32)

    return jax.vmap(row)(seeds, positions)
