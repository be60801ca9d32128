"""Choosing tokens against plain definitions, and against the distribution it should follow."""

from __future__ import annotations

import re
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.config import MeshConfig
from glmjax.model.spec import ParamSpec
from glmjax.plans import History
from glmjax.runner.sampling import (
    SCALARS,
    Scalars,
    adjust,
    constrain,
    count,
    enter_row,
    faults,
    pack_scalars,
    sample,
    table_row,
    table_specs,
    unpack_scalars,
)
from glmjax.sharding import make_mesh, shard_map
from glmjax.types import MAX_END_IDS, MAX_INT, MAX_LOGIT_BIAS, MAX_SEED, SamplingParams

SLOTS = 4
draw, change, add, enter = map(jax.jit, (sample, adjust, count, enter_row))


def scalars_of(*sampling, min_lens=None):
    min_lens = min_lens or [0] * len(sampling)
    rows = [pack_scalars(s, n) for s, n in zip(sampling, min_lens, strict=True)]
    return unpack_scalars(jnp.asarray(np.stack(rows)))


def draws(logits, times, **params):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (times, len(logits)))
    scalars = scalars_of(*[SamplingParams(**params)] * times)
    return np.asarray(draw(rows, scalars, jnp.arange(times)))


# The numbers


@given(
    temperature=st.floats(0, 100, width=32),
    top_p=st.floats(2**-20, 1, width=32),
    penalty=st.floats(-2, 2, width=32),
    seed=st.integers(0, MAX_SEED),
    min_len=st.integers(0, 2 * MAX_INT),
)
@settings(max_examples=30)
def test_numbers_cross_to_the_device_unchanged(temperature, top_p, penalty, seed, min_len):
    temperature = temperature if temperature > 1e-20 else 0.0
    sampling = SamplingParams(
        temperature=temperature,
        top_k=7,
        top_p=top_p,
        min_p=top_p,
        seed=seed,
        frequency_penalty=penalty,
        presence_penalty=-penalty,
        repetition_penalty=abs(penalty) + 0.5,
    )
    got = scalars_of(SamplingParams(), sampling, min_lens=[0, min_len])
    for name in SCALARS[:-1]:
        expected = np.array(getattr(sampling, name), getattr(got, name).dtype)
        assert getattr(got, name)[1] == expected, name
    assert got.min_len[1] == min(min_len, MAX_INT)
    assert (got.seed.dtype, got.top_k.dtype) == (jnp.uint32, jnp.int32)


def test_there_is_one_number_of_each_name():
    assert tuple(f.name for f in fields(Scalars)) == SCALARS
    assert pack_scalars(SamplingParams(), 0).shape == (len(SCALARS),)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(5e-324, 1e-20), (1e-30, 1e-20), (1e300, 1e20)]
)
def test_a_temperature_beyond_float32_is_kept_within(temperature, expected):
    assert scalars_of(SamplingParams(temperature=temperature)).temperature[0] == np.float32(
        expected
    )


def test_a_tiny_temperature_is_greedy():
    assert set(draws([3.0, 70.0, 69.0, -5.0], 20, temperature=1e-300, top_p=0.9)) == {1}


# The tables


def empty_tables(vocab):
    zeros = lambda spec: jnp.zeros(spec.shape, spec.dtype)  # noqa: E731
    specs = table_specs(SLOTS, vocab)
    return jax.tree.map(zeros, specs, is_leaf=lambda x: isinstance(x, ParamSpec))


def tables_of(vocab, entries):
    """Tables with (slot, history, sampling) entered."""
    tables = empty_tables(vocab)
    for slot, history, sampling in entries:
        row = table_row(history, sampling, vocab)
        tables = enter(tables, jnp.int32(slot), jnp.asarray(row))
    return tables


def test_specs_lie_on_slots():
    specs = table_specs(3, 37)
    assert specs.counts == ParamSpec((3, 37), "uint16", ("slots", None))
    assert specs.bias_ids.shape == specs.bias.shape == (3, MAX_LOGIT_BIAS)
    assert specs.end_ids.shape == (3, MAX_END_IDS)
    assert specs.changed == ParamSpec((3,), "int32", ("slots",))


def test_a_row_is_entered_in_its_slot_only():
    history = History((1, 2, 2), (2, 5, 5), (9, 3))
    tables = tables_of(37, [(2, history, SamplingParams(logit_bias={4: -1.5, 30: 2.0}))])
    expected = np.zeros((SLOTS, 37), np.uint16)
    expected[2, [1, 2, 5]] = [1 << 15, (1 << 15) + 1, 2]
    np.testing.assert_array_equal(tables.counts, expected)
    assert tables.changed.tolist() == [0, 0, 1, 0]
    assert tables.bias_ids[2].tolist() == [4, 30] + [37] * (MAX_LOGIT_BIAS - 2)
    assert tables.bias[2].tolist() == [-1.5, 2.0] + [0.0] * (MAX_LOGIT_BIAS - 2)
    assert tables.end_ids[2].tolist() == [3, 9] + [37] * (MAX_END_IDS - 2)


def test_a_row_outside_is_dropped_and_one_without_history_clears():
    entry = (1, History((1,), (2,), (3,)), SamplingParams(logit_bias={4: 5.0}))
    tables = tables_of(37, [entry])
    outside = tables_of(37, [entry, (SLOTS, History((7,), (8,), (9,)), SamplingParams())])
    jax.tree.map(np.testing.assert_array_equal, tables, outside)
    cleared = tables_of(37, [entry, (1, None, SamplingParams())])
    assert not cleared.counts.any()
    assert not cleared.changed.any()


def test_counts_and_biases_at_their_most():
    biases = dict.fromkeys(range(MAX_LOGIT_BIAS), 1e300)
    row = table_row(History((3,), (3,) * 40000, ()), SamplingParams(logit_bias=biases), 2000)
    assert row[3] == 0xFFFF
    tables = tables_of(
        2000, [(0, History((3,), (3,) * 40000, ()), SamplingParams(logit_bias=biases))]
    )
    assert np.isfinite(np.asarray(tables.bias)).all()
    with pytest.raises(ValueError, match="65 end ids"):
        table_row(History((), (), tuple(range(MAX_END_IDS + 1))), SamplingParams(), 2000)


def test_counts_what_was_put_out():
    entries = [(s, History((1,), (), ()), SamplingParams()) for s in (0, 2)]
    tables = tables_of(37, entries)
    valid = jnp.array([[True, True, True], [True, True, False], [True] * 3, [True] * 3])
    tokens = jnp.array([[5, 5, 1], [6, 36, 7], [8, 8, 8], [9, 9, 9]])
    got = add(tables, jnp.array([2, 0, 1, SLOTS]), tokens, valid).counts
    expected = np.zeros((SLOTS, 37), np.uint16)
    expected[[0, 2], 1] = 1 << 15
    expected[2, 5], expected[2, 1], expected[0, 6], expected[0, 36] = 2, (1 << 15) + 1, 1, 1
    np.testing.assert_array_equal(got, expected)  # slot 1 is not changed, slot 4 is none


def test_counts_never_carry_into_the_prompt_bit():
    tables = tables_of(37, [(0, History((), (4,) * 32760, ()), SamplingParams())])
    slots, tokens, valid = jnp.array([0]), jnp.array([[4, 4, 4]]), jnp.ones((1, 3), bool)
    for _ in range(6):
        tables = add(tables, slots, tokens, valid)
    assert 32760 < tables.counts[0, 4] < 1 << 15
    assert tables.counts.sum() == tables.counts[0, 4]


# Penalties, bias, minimal length


def adjusted_plainly(logits, sampling, min_len, history, position, pending):
    """The formulas, token by token: CTRL's, OpenAI's, a sum, and -inf."""
    out, outputs = list(map(float, logits)), [*history.output_ids, *(p for p in pending if p >= 0)]
    for t in range(len(out)):
        if t in outputs or t in history.prompt_ids:
            r = sampling.repetition_penalty
            out[t] = out[t] / r if out[t] > 0 else out[t] * r
        out[t] -= sampling.frequency_penalty * outputs.count(t)
        out[t] -= sampling.presence_penalty * (t in outputs)
        out[t] += sampling.logit_bias.get(t, 0.0)
        if t in history.end_ids and position < min_len:
            out[t] = -np.inf
    return out


@st.composite
def places(draw, vocab):
    """A sequence's parameters, minimal length and history, a position and two drafts."""
    ids = st.integers(0, vocab - 1)
    penalty = st.sampled_from([0.0, 0.5, -1.25, 2.0])
    sampling = SamplingParams(
        frequency_penalty=draw(penalty),
        presence_penalty=draw(penalty),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.5, 10.0])),
        logit_bias=draw(st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=4)),
    )
    some = st.lists(ids, max_size=6).map(tuple)
    history = History(draw(some), draw(some), draw(some))
    pending = draw(st.lists(st.one_of(st.just(-1), ids), min_size=2, max_size=2))
    return sampling, draw(st.integers(8, 11)), history, draw(st.integers(8, 11)), pending


@settings(max_examples=40)
@given(data=st.data(), vocab=st.sampled_from([37, 1000]), seed=st.integers(0, 99))
def test_adjusts_by_the_formulas(data, vocab, seed):
    drawn = [data.draw(places(vocab)) for _ in range(3)]
    sampling, min_lens, histories, positions, pending = zip(*drawn, strict=True)
    slots = [3, 0, 2]
    tables = tables_of(vocab, zip(slots, histories, sampling, strict=True))
    logits = (np.random.default_rng(seed).standard_normal((5, vocab)) * 5).astype(np.float32)
    logits[:, ::7] = 0.0
    plain = SamplingParams(frequency_penalty=1.0)  # its slots are not changed, so nothing is
    got = change(
        logits,
        scalars_of(*sampling, plain, plain, min_lens=[*min_lens, 99, 99]),
        tables,
        jnp.array([*slots, 1, SLOTS]),
        jnp.array([*positions, 0, 0]),
        jnp.array([*pending, [5, 5], [5, 5]]),
    )
    for i in range(3):
        expected = adjusted_plainly(
            logits[i], sampling[i], min_lens[i], histories[i], positions[i], pending[i]
        )
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(got[3:], logits[3:])


@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 99))
def test_pending_drafts_count_like_tokens_put_out(data, seed):
    sampling, min_len, history, position, drafts = data.draw(places(37))
    logits = np.random.default_rng(seed).standard_normal((1, 37)).astype(np.float32)
    tables = tables_of(37, [(1, history, sampling)])
    scalars, slots = scalars_of(sampling, min_lens=[min_len]), jnp.array([1])
    position, drafts = jnp.array([position]), jnp.array([drafts])
    pending = change(logits, scalars, tables, slots, position, drafts)
    later = add(tables, slots, drafts, drafts >= 0)
    none = jnp.zeros((1, 0), jnp.int32)
    np.testing.assert_array_equal(pending, change(logits, scalars, later, slots, position, none))


def test_without_changed_slots_logits_stay_bit_by_bit():
    tables = jax.tree.map(lambda t: jnp.ones_like(t), empty_tables(37))
    tables = enter(tables, jnp.int32(1), jnp.asarray(table_row(None, SamplingParams(), 37)))
    logits = np.random.default_rng(0).standard_normal((2, 37)).astype(np.float32)
    logits[0, 3] = np.nan
    scalars = scalars_of(*[SamplingParams(presence_penalty=1.0)] * 2, min_lens=[9, 9])
    slots, none = jnp.array([1, SLOTS]), jnp.zeros((2, 0), jnp.int32)
    got = change(logits, scalars, tables, slots, jnp.zeros(2, jnp.int32), none)
    np.testing.assert_array_equal(got, logits)


def test_extreme_parameters_leave_something_to_choose():
    sampling = SamplingParams(
        temperature=1e-300, repetition_penalty=1e-300, logit_bias={1: 1e300, 2: -1e300}, top_p=0.5
    )
    tables = tables_of(37, [(0, History((3, 30), (4, 31), ()), sampling)])
    scalars, zero = scalars_of(sampling), jnp.array([0])
    logits = jnp.linspace(-5, 5, 37)[None]
    new = change(logits, scalars, tables, zero, zero, jnp.zeros((1, 0), jnp.int32))
    assert np.isfinite(np.asarray(new)).all()
    assert draw(new, scalars, zero).tolist() == [1]


# Constraints


@settings(max_examples=20)
@given(vocab=st.sampled_from([37, 64, 1000]), seed=st.integers(0, 2**32 - 1))
def test_constrains_to_the_bits(vocab, seed):
    rng = np.random.default_rng(seed)
    masks = rng.integers(0, 2**32, (3, -(-vocab // 32)), np.uint32)
    logits = rng.standard_normal((3, vocab)).astype(np.float32)
    got = np.asarray(constrain(jnp.asarray(logits), jnp.asarray(masks)))
    for s in range(3):
        for t in range(vocab):
            allowed = int(masks[s, t // 32]) >> (t % 32) & 1
            assert got[s, t] == (logits[s, t] if allowed else -np.inf)


def test_a_constrained_row_samples_what_is_allowed():
    masks = jnp.array([[1 << 3 | 1 << 31, 1 << 4]] * 200, jnp.uint32)
    logits = constrain(jnp.zeros((200, 37)), masks)
    scalars = scalars_of(*[SamplingParams(top_k=20, top_p=0.99)] * 200)
    assert set(draw(logits, scalars, jnp.arange(200)).tolist()) == {3, 31, 36}


def test_faults_are_rows_without_a_finite_maximum():
    rows = [[0, 1, -np.inf], [0, np.nan, 1], [np.inf, 0, 0], [-np.inf] * 3]
    assert faults(jnp.array(rows)).tolist() == [False, True, True, True]


# Sampling


@jax.jit
def sample_plainly(logits, temperature, top_k, top_p, seed, position):
    """One row [V], its cuts by a stable argsort of everything."""
    scaled = logits / jnp.where(temperature > 0, temperature, 1.0)
    order = jnp.argsort(scaled, descending=True)
    descending, rank = scaled[order], jnp.arange(len(logits))
    allowed = jnp.where(top_k > 0, top_k, len(logits))
    probs = jax.nn.softmax(jnp.where(rank < allowed, descending, -jnp.inf))
    before = jnp.cumsum(probs) - probs
    kept = (rank == 0) | ((before < top_p) & (rank < allowed))
    likely = jnp.empty_like(scaled).at[order].set(jnp.where(kept, descending, -jnp.inf))
    likely = jnp.where((top_k > 0) | (top_p < 1), likely, scaled)
    key = jax.random.fold_in(jax.random.key(seed), position)
    drawn = jnp.argmax(likely + jax.random.gumbel(key, logits.shape, jnp.float32))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([-1, 1, 3, 36, 37, 50, 5000]),
    top_p=st.sampled_from([1e-3, 0.31, 0.87, 0.95, 1.0]),
    seed=st.integers(0, MAX_SEED),
)


@settings(max_examples=60)
@given(
    params=st.lists(PARAMS, min_size=4, max_size=4),
    vocab=st.sampled_from([37, 1000]),
    levels=st.sampled_from([3, 20, 10**6]),  # few levels: many ties
    position=st.integers(0, 10**6),
    seed=st.integers(0, 2**32 - 1),
)
def test_samples_what_a_whole_argsort_samples(params, vocab, levels, position, seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-levels, levels + 1, (4, vocab)) * np.float32(4 / levels)
    logits[:, ::2] *= -1.0  # zeros of both signs are ties
    scalars = scalars_of(*params)
    positions = jnp.arange(position, position + 4)
    numbers = scalars.temperature, scalars.top_k, scalars.top_p, scalars.seed, positions
    expected = [sample_plainly(logits[r], *(n[r] for n in numbers)) for r in range(4)]
    assert draw(logits, scalars, positions).tolist() == np.array(expected).tolist()


def kept_by_sort(logits, top_k, top_p, min_p=0.0):
    """Indices kept by top-k, then by top-p among what is left, then by min-p."""
    order = np.argsort(-logits, kind="stable")[: top_k if top_k > 0 else None]
    probs = np.exp(logits[order] - logits[order].max()).astype(np.float64)
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    kept = ((before < top_p) | (np.arange(len(order)) == 0)) & (probs >= min_p)
    return set(order[kept].tolist())


def test_the_sampler_sorts_nothing():
    scalars = scalars_of(*[SamplingParams(top_k=5, top_p=0.9)] * 2)
    program = draw.lower(jnp.zeros((2, 1000)), scalars, jnp.arange(2))
    for text in (program.as_text(), program.compile().as_text()):
        assert not re.search(r"\bsort\b|top_?k\b.*custom_call_target|TopK", text)
    sorts = jax.jit(jnp.sort).lower(jnp.zeros(1000)).compile().as_text()
    assert re.search(r"\bsort\b", sorts), "a sort is not recognised"


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.45},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    sampling, times = SamplingParams(**params), 20000
    scaled = np.array([1.0, 0.2, -0.5, 0.7, -2.0, 0.0], np.float32) / sampling.temperature
    kept = sorted(kept_by_sort(scaled, sampling.top_k, sampling.top_p, sampling.min_p))
    probs = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    seen = np.bincount(draws(scaled * sampling.temperature, times, **params), minlength=6)
    assert seen[kept].sum() == times
    chi_square = ((seen[kept] - times * probs) ** 2 / (times * probs)).sum()
    assert chi_square < 25, "beyond the 99.9th percentile of 5 degrees of freedom"


def test_min_p_of_one_keeps_only_equals_of_the_likeliest():
    assert set(draws([1.0, 2.0, 2.0, 1.99], 100, min_p=1.0)) == {1, 2}


def test_temperature_zero_is_greedy_with_the_lowest_index_first():
    greedy = draws([0.0, 2.0, 2.0, 1.0], 3, temperature=0.0, top_k=2, min_p=0.5)
    assert greedy.tolist() == [1, 1, 1]


def test_a_draw_depends_on_its_own_row_only():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((5, 50)) * 3).astype(np.float32)
    logits[4] = np.nan
    params = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, top_p=0.7),
        SamplingParams(seed=3, temperature=0.0),
        SamplingParams(seed=4, top_k=5, min_p=0.1),
        SamplingParams(seed=5, top_p=0.5),
    ]
    positions = jnp.array([9, 8, 7, 6, 5])
    together = draw(logits, scalars_of(*params), positions)
    for r in range(4):
        alone = draw(logits[r : r + 1], scalars_of(params[r]), positions[r : r + 1])
        assert alone[0] == together[r]


def test_seeds_and_positions_give_different_draws():
    logits = np.random.default_rng(0).standard_normal(50)
    assert len(set(draws(logits, 30, seed=5))) > 1
    assert (draws(logits, 30, seed=5) != draws(logits, 30, seed=MAX_SEED)).any()


def test_the_same_inside_shard_map():
    sampling = [SamplingParams(seed=s, top_p=0.8, presence_penalty=1.0) for s in range(4)]
    scalars, mesh = scalars_of(*sampling), make_mesh(MeshConfig(data=2, tensor=1))
    tables = tables_of(37, [(s, History((s,), (7,), ()), sampling[s]) for s in range(4)])
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((4, 37)), jnp.float32)
    slots, positions = jnp.array([0, 1, 0, 1]), jnp.arange(4)

    def choose(logits, scalars, tables, slots, positions):
        pending = jnp.full((len(slots), 1), 7)
        tokens = sample(
            adjust(logits, scalars, tables, slots, positions, pending), scalars, positions
        )
        return tokens, count(tables, slots, tokens[:, None], jnp.ones((len(slots), 1), bool))

    first = ("rows", None), jax.tree.map(lambda _: ("rows",), scalars)
    specs = jax.tree.map(lambda t: ("slots", None)[: t.ndim], tables)
    split = shard_map(choose, mesh, (*first, specs, ("rows",), ("rows",)), (("rows",), specs))
    tokens, counts = jax.jit(split)(logits, scalars, tables, slots, positions)
    expected = jax.jit(choose)(logits, scalars, tables, jnp.arange(4), positions)
    assert tokens.tolist() == expected[0].tolist()
    np.testing.assert_array_equal(counts.counts, expected[1].counts)
