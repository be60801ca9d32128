"""Where top-k and top-p cut a row, against a sort of everything."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.runner.sampling import keep_likely

cut = jax.jit(keep_likely)


def cut_by_sort(logits, top_k, top_p, slack=0.0):
    """How many of the order by logit, then by id, are kept: with `slack` of probability less, more.

    As the sampler did it before: a sort of everything, in float64.
    """
    descending = np.sort(logits.astype(np.float64))[::-1][: top_k if top_k > 0 else None]
    probs = np.exp(descending - descending[0])
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    reach = [np.inf] * 2 if top_p >= 1 else [top_p - slack, top_p + slack]
    return [max(1, int(np.sum(before < edge))) for edge in reach]


def draw_row(rng, kind, vocab):
    """Logits with many ties, with -inf, with extreme values, or as they come."""
    row = (4 * rng.standard_normal(vocab)).astype(np.float32)
    if kind == "ties":
        row = np.round(row)  # zeros of both signs among them
    if kind == "barred":
        row[rng.random(vocab) < 0.7] = -np.inf
        row[rng.integers(vocab)] = 1.0
    if kind == "extreme":
        row *= np.float32(10.0) ** rng.integers(-38, 37, vocab).astype(np.float32)
    if kind == "equal":
        row[:] = row[0]
    return row


CUTS = st.tuples(
    st.sampled_from(["plain", "ties", "barred", "extreme", "equal"]),
    st.sampled_from([-1, 1, 3, 8, 36, 37, 2**31 - 1]),
    st.sampled_from([2**-20, 0.013, 0.317, 0.871, 0.9999, 1.0]),
)


@settings(max_examples=60)
@given(
    rows=st.lists(CUTS, min_size=4, max_size=4),
    vocab=st.sampled_from([37, 1000]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_search_ends_where_a_sort_does(rows, vocab, seed):
    rng = np.random.default_rng(seed)
    logits = np.stack([draw_row(rng, kind, vocab) for kind, _, _ in rows])
    _, top_k, top_p = zip(*rows, strict=True)
    likely = np.asarray(cut(jnp.asarray(logits), jnp.array(top_k), jnp.array(top_p)))
    for row, got, k, p in zip(logits, likely, top_k, top_p, strict=True):
        least, most = cut_by_sort(row, k, p, slack=2e-6)
        order = np.argsort(-row, kind="stable")
        kept = np.isfinite(got)
        finite = np.isfinite(row).sum()
        assert min(least, finite) <= kept.sum() <= most
        assert set(np.flatnonzero(kept)) == set(order[: kept.sum()])
        np.testing.assert_array_equal(got[kept], row[kept])
        assert np.all(got[~kept] == -np.inf)


def kept_ids(row, top_k, top_p):
    kept = cut(jnp.array([row], jnp.float32), jnp.array([top_k]), jnp.array([top_p]))[0]
    return np.flatnonzero(np.isfinite(kept)).tolist()


def test_of_equals_the_lowest_ids_are_kept():
    assert kept_ids([1.0, 2.0, 1.0, 1.0, 2.0], 3, 1.0) == [0, 1, 4]
    assert kept_ids([1.0] * 6, 2, 1.0) == [0, 1]
    assert kept_ids([1.0] * 4, -1, 0.6) == [0, 1, 2]
    assert kept_ids([1.0] * 6, 2, 0.999) == [0, 1]


def test_zeros_of_both_signs_are_equal():
    assert kept_ids([-0.0, 0.0, -1.0, 0.0], 2, 1.0) == [0, 1]
    assert kept_ids([-1.0, -0.0, 0.0, 0.0], -1, 0.5) == [1, 2]


def test_a_top_p_of_one_drops_nothing_that_rounds_away():
    logits = jnp.array([[0.0, -40.0, -41.0, -42.0]] * 2)
    kept = cut(logits, jnp.array([3, -1]), jnp.array([1.0, 1.0]))
    np.testing.assert_array_equal(kept, [[0.0, -40.0, -41.0, -np.inf], logits[1]])


def test_a_top_p_of_zero_keeps_the_likeliest():
    kept = cut(jnp.array([[1.0, 3.0, 3.0, 2.0]]), jnp.array([-1]), jnp.array([0.0]))
    assert np.flatnonzero(np.isfinite(kept[0])).tolist() == [1]


def test_no_row_is_cut_by_its_neighbours():
    rng = np.random.default_rng(0)
    logits = np.stack([draw_row(rng, kind, 300) for kind in ("plain", "ties", "barred", "equal")])
    logits = jnp.asarray(np.vstack([logits, np.full(300, np.nan, np.float32)]))
    top_k, top_p = jnp.array([5, -1, 2, 50, 7]), jnp.array([1.0, 0.9, 0.5, 0.3, 0.1])
    together = cut(logits, top_k, top_p)
    for r in range(4):
        alone = cut(logits[r : r + 1], top_k[r : r + 1], top_p[r : r + 1])
        np.testing.assert_array_equal(alone[0], together[r])
