"""Sampling against a sort in numpy, and against the distribution it should follow."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.runner.sampling import keep_likely, sample

draw = jax.jit(sample)


def kept_by_sort(logits, top_k, top_p):
    """Indices kept by top-k, then by top-p among what is left."""
    order = np.argsort(-logits, kind="stable")[: top_k if top_k > 0 else None]
    probs = np.exp(logits[order] - logits[order].max()).astype(np.float64)
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    return set(order[(before < top_p) | (np.arange(len(order)) == 0)].tolist())


@settings(max_examples=60, deadline=None)
@given(
    # steps of 1/4: ties are common and sums are far from the threshold's rounding
    logits=st.lists(st.integers(-8, 8).map(lambda i: i / 4), min_size=8, max_size=8),
    top_k=st.sampled_from([-1, 1, 3, 8, 20]),
    top_p=st.sampled_from([0.013, 0.317, 0.871, 1.0]),
)
def test_keeps_what_a_sort_keeps(logits, top_k, top_p):
    row = np.array(logits, np.float32)
    kept = keep_likely(jnp.asarray(row)[None], jnp.array([top_k]), jnp.array([top_p]))[0]
    assert set(np.flatnonzero(np.isfinite(kept)).tolist()) == kept_by_sort(row, top_k, top_p)


def draws(logits, count, temperature=1.0, top_k=-1, top_p=1.0, seed=0):
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    full = [jnp.full(count, v, d) for v, d in ((temperature, "f4"), (top_k, "i4"), (top_p, "f4"))]
    return np.asarray(draw(rows, *full, jnp.full(count, seed, "u4"), jnp.arange(count)))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, -1, 1.0), (0.5, -1, 1.0), (2.0, 3, 1.0), (1, -1, 0.8)]
)
def test_draws_follow_the_distribution(temperature, top_k, top_p):
    logits, count = np.array([1.0, 0.2, -0.5, 0.7, -2.0, 0.0], np.float32), 20000
    scaled = logits / temperature
    kept = sorted(kept_by_sort(scaled, top_k, top_p))
    probs = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    seen = np.bincount(draws(logits, count, temperature, top_k, top_p), minlength=6)
    assert seen[kept].sum() == count
    chi_square = ((seen[kept] - count * probs) ** 2 / (count * probs)).sum()
    assert chi_square < 25, "beyond the 99.9th percentile of 5 degrees of freedom"


def test_temperature_zero_is_greedy_with_the_lowest_index_first():
    assert draws([0.0, 2.0, 2.0, 1.0], 3, temperature=0.0, top_k=2).tolist() == [1, 1, 1]


def test_a_draw_depends_on_seed_and_position_only():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((4, 50)), jnp.float32)
    seeds, positions = jnp.array([1, 2, 3, 4], "u4"), jnp.array([9, 8, 7, 6])
    full = (jnp.ones(4), jnp.full(4, -1), jnp.ones(4))
    together = draw(logits, *full, seeds, positions)
    for r in range(4):
        one = [a[r : r + 1] for a in (logits, *full, seeds, positions)]
        assert draw(*one)[0] == together[r]
    assert len(set(draws(logits[0], 30, seed=5))) > 1, "positions differ, draws may not be equal"
    assert (draws(logits[0], 30, seed=5) != draws(logits[0], 30, seed=2**32 - 1)).any()
