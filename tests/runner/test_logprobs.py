"""Log probabilities against float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.runner.logprobs import logprobs, logprobs_if
from glmjax.types import MAX_LOGPROBS

compute = jax.jit(logprobs, static_argnames="most")


def logprobs_plainly(row):
    exact = row.astype(np.float64)
    return exact - exact.max() - np.log(np.exp(exact - exact.max()).sum())


@settings(max_examples=40)
@given(
    vocab=st.sampled_from([37, 1000]),
    most=st.sampled_from([0, 1, MAX_LOGPROBS]),
    levels=st.sampled_from([2, 10**6]),  # two levels: the ids go up among equals
    scale=st.sampled_from([0.1, 5.0, 80.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_are_those_of_float64(vocab, most, levels, scale, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.integers(0, levels, (3, vocab)) / levels * scale).astype(np.float32)
    chosen = rng.integers(0, vocab, 3)
    own, ids, top = compute(logits, jnp.asarray(chosen), most=most)
    assert (own.shape, ids.shape, top.shape) == ((3,), (3, most), (3, most))
    for s in range(3):
        exact = logprobs_plainly(logits[s])
        best = np.argsort(-logits[s], kind="stable")[:most]
        assert ids[s].tolist() == best.tolist()
        np.testing.assert_allclose(own[s], exact[chosen[s]], rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(top[s], exact[best], rtol=1e-5, atol=2e-5)


def test_a_chosen_token_has_the_same_number_among_the_likeliest():
    logits = np.random.default_rng(0).standard_normal((5, 100)).astype(np.float32)
    own, ids, top = compute(logits, logits.argmax(1))
    assert ids[:, 0].tolist() == logits.argmax(1).tolist()
    np.testing.assert_array_equal(own, top[:, 0])


def test_a_small_vocabulary_is_filled_up():
    own, ids, top = compute(jnp.array([[0.0, 1.0, -jnp.inf]]), jnp.array([2]), most=5)
    assert ids.tolist() == [[1, 0, 2, -1, -1]]
    assert np.isneginf(top[0, 2:]).all()
    assert own[0] == -np.inf
    np.testing.assert_allclose(np.exp(top[0, :2]).sum(), 1, rtol=1e-6)


def test_an_unknown_chosen_token_harms_nothing_else():
    logits = np.random.default_rng(0).standard_normal((2, 37)).astype(np.float32)
    first, second = (compute(logits, jnp.array([c, 3])) for c in (-1, 0))
    assert np.isfinite(np.asarray(first[0])).all()
    assert first[0][1] == second[0][1]
    jax.tree.map(np.testing.assert_array_equal, first[1:], second[1:])


@pytest.mark.parametrize("most", [3, MAX_LOGPROBS])
def test_zeros_where_they_are_not_wanted(most):
    logits = np.random.default_rng(0).standard_normal((4, 37)).astype(np.float32)
    chosen = jnp.arange(4)
    ask = jax.jit(partial(logprobs_if, most=most))
    expected = compute(logits, chosen, most=most)
    wanted, unwanted = (ask(jnp.array(w), logits, chosen) for w in (True, False))
    jax.tree.map(np.testing.assert_array_equal, wanted, expected)
    jax.tree.map(
        lambda u, e: np.testing.assert_array_equal(u, np.zeros(e.shape, e.dtype)),
        unwanted,
        expected,
    )
