"""Drafts change how soon tokens come, never which: exactly, and in distribution."""

from __future__ import annotations

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from glmjax.runner.sampling import pack_scalars, sample, unpack_scalars
from glmjax.runner.verify import accept
from glmjax.types import SamplingParams

V, D = 4, 2
# A language model of one token of context: logits of the next token, by the last.
MODEL = (np.random.default_rng(5).standard_normal((V, V)) * 1.5).astype(np.float32)


@given(
    st.integers(0, 3).flatmap(
        lambda drafts: st.tuples(
            st.lists(st.integers(0, 1), min_size=drafts + 1, max_size=drafts + 1),
            st.lists(st.integers(0, 1), min_size=drafts, max_size=drafts),
            st.integers(0, drafts),
        )
    )
)
def test_accepts_the_equal_ones_at_the_front(row):
    tokens, drafts, real = row
    pairs = list(zip(tokens, drafts, strict=False))[:real]
    expected = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    first = jnp.array([tokens, tokens]), jnp.array([drafts, drafts], jnp.int32)
    got = accept(*first, jnp.array([real, 0]))
    assert got.dtype == jnp.int32
    assert got.tolist() == [expected, 0]


def test_a_match_after_a_mismatch_does_not_count():
    got = jax.jit(accept)(jnp.array([[1, 2, 3, 4]]), jnp.array([[1, 9, 3]]), jnp.array([3]))
    assert got.tolist() == [1]


def scalars_of(sampling, rows):
    """Row r has seed r."""
    bits = np.tile(pack_scalars(sampling, 0), (rows, 1))
    return replace(unpack_scalars(jnp.asarray(bits)), seed=jnp.arange(rows, dtype=jnp.uint32))


@jax.jit
def verify_step(scalars, last, drafts, num_drafts, lens):
    """Sample after `last` and each draft, at positions from `lens` on. Returns tokens, accepted."""
    before = jnp.concatenate([last[:, None], drafts], axis=1)
    positions = lens[:, None] + jnp.arange(before.shape[1])
    places = jax.tree.map(lambda x: jnp.repeat(x, before.shape[1]), scalars)
    logits = jnp.asarray(MODEL)[before.reshape(-1)]
    tokens = sample(logits, places, positions.reshape(-1)).reshape(before.shape)
    return tokens, accept(tokens, drafts, num_drafts)


def generate(sampling, rows, length, guess):
    """`length` tokens of each of `rows` seeds, with the drafts that `guess(last)` makes [R, D].

    Returns tokens [R, length], and how many drafts were accepted of how many.
    """
    scalars, out = scalars_of(sampling, rows), [[0] for _ in range(rows)]
    accepted = drafted = 0
    while min(map(len, out)) <= length:
        last, lens = (np.array([f(o) for o in out], np.int32) for f in (lambda o: o[-1], len))
        drafts, num_drafts = guess(last)
        tokens, took = map(np.asarray, verify_step(scalars, last, drafts, num_drafts, lens))
        for o, row, n in zip(out, tokens, took, strict=True):
            o.extend(row[: n + 1].tolist())
        accepted, drafted = accepted + took.sum(), drafted + num_drafts.sum()
    return np.array([o[1 : length + 1] for o in out]), accepted, drafted


def no_drafts(last):
    return np.zeros((len(last), D), np.int32), np.zeros(len(last), np.int32)


def likeliest(last):
    """What the model itself finds likeliest after `last`, and after that."""
    first = MODEL.argmax(1)[last]
    drafts = np.stack([first, MODEL.argmax(1)[first]], 1).astype(np.int32)
    return drafts, np.full(len(last), D, np.int32)


def anything(last):
    rng = np.random.default_rng(int(last @ np.arange(len(last))))  # another at each step
    drafts = rng.integers(0, V, (len(last), D)).astype(np.int32)
    return drafts, rng.integers(0, D + 1, len(last)).astype(np.int32)


SAMPLING = [
    SamplingParams(),
    SamplingParams(temperature=0.7, top_k=3),
    SamplingParams(top_p=0.8, min_p=0.05),
    SamplingParams(temperature=0.0),
]


@pytest.mark.parametrize("guess", [likeliest, anything])
@pytest.mark.parametrize("sampling", SAMPLING, ids=["plain", "top_k", "top_p", "greedy"])
def test_the_very_tokens_of_a_run_without_drafts(sampling, guess):
    expected, _, _ = generate(sampling, 3000, 8, no_drafts)
    got, accepted, drafted = generate(sampling, 3000, 8, guess)
    np.testing.assert_array_equal(got, expected)
    assert 0 < accepted <= drafted
    assert (accepted < drafted) == (sampling.temperature > 0 or guess is anything)


def chain(sampling):
    """P(next token | last token) [V, V] in float64, by the definitions of top-k, top-p, min-p."""
    probs = np.exp(MODEL.astype(np.float64) / sampling.temperature)
    probs /= probs.sum(1, keepdims=True)
    for row in probs:
        order = np.argsort(-row)
        allowed = order[: sampling.top_k if sampling.top_k > 0 else V]
        before = np.cumsum(row[allowed]) / row[allowed].sum() - row[allowed] / row[allowed].sum()
        kept = allowed[(before < sampling.top_p) & (row[allowed] >= sampling.min_p * row.max())]
        row[np.setdiff1d(order, kept)] = 0
    return probs / probs.sum(1, keepdims=True)


@pytest.mark.parametrize("guess", [likeliest, anything])
@pytest.mark.parametrize("sampling", SAMPLING[:3], ids=["plain", "top_k", "top_p"])
def test_three_tokens_follow_their_joint_distribution(sampling, guess):
    rows = 20000
    tokens, accepted, _ = generate(sampling, rows, 3, guess)
    next_of = chain(sampling)
    joint = np.einsum("a,ab,bc->abc", next_of[0], next_of, next_of).ravel()
    seen = np.bincount(np.ravel_multi_index(tuple(tokens.T), (V, V, V)), minlength=V**3)
    assert accepted > 0
    assert not seen[joint == 0].any()
    rare = (joint > 0) & (joint * rows < 10)
    common = joint * rows >= 10
    expected, found = joint[common] * rows, seen[common]
    if rare.any():
        expected = np.append(expected, joint[rare].sum() * rows)
        found = np.append(found, seen[rare].sum())
    assert chisquare(found, expected).pvalue > 1e-4
