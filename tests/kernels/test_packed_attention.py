"""Packed attention against a dense softmax in float64 numpy."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packed_attention import packed_attention
from pallas_kernels.paged_attention import paged_attention, write_kv

KV_HEADS, GROUP, HEAD_DIM, SCALE = 2, 3, 4, 0.6
# one block and less, a ragged second one, several
LENGTHS = [1, 9, 64, 65, 150]

attention = jax.jit(partial(packed_attention, scale=SCALE))


def dense(q, k, v, segments):
    """Every pair of tokens scored, and those that do not see each other struck out."""
    rows, tokens = segments.shape
    out = np.zeros(q.shape)
    earlier = np.tri(tokens, dtype=bool)
    for row in range(rows):
        seen = earlier & (segments[row][:, None] == segments[row])
        for head in range(q.shape[2]):
            scores = SCALE * q[row, :, head] @ k[row, :, head // GROUP].T
            scores = np.where(seen, scores, -np.inf)
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, :, head] = p / p.sum(-1, keepdims=True) @ v[row, :, head // GROUP]
    return out


def heads(rng, *shape):
    """q, k and v in float64."""
    counts = KV_HEADS * GROUP, KV_HEADS, KV_HEADS
    return [rng.standard_normal((*shape, count, HEAD_DIM)) for count in counts]


def run(q, k, v, segments) -> np.ndarray:
    f32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    return np.asarray(attention(*f32, jnp.asarray(segments, jnp.int32)))


@st.composite
def packings(draw, rows: int = 2):
    """Segments 1, 2, ... of any lengths, then padding; and a random generator."""
    segments = np.zeros((rows, draw(st.sampled_from(LENGTHS))), np.int32)
    for row in segments:
        start = 0
        lengths = draw(st.lists(st.integers(1, segments.shape[1]), max_size=4))
        for number, length in enumerate(lengths, 1):
            row[start : start + length] = number
            start += length
    return segments, np.random.default_rng(draw(st.integers(0, 2**16)))


@settings(max_examples=25)
@given(packings())
def test_equals_a_dense_softmax_within_segments(packing):
    segments, rng = packing
    q, k, v = heads(rng, *segments.shape)
    got = run(q, k, v, segments)
    kept = segments > 0
    np.testing.assert_allclose(got[kept], dense(q, k, v, segments)[kept], rtol=1e-4, atol=1e-5)
    assert np.isfinite(got).all(), "padding must not poison sums over all tokens"


def test_long_rows_are_cut_into_larger_blocks_of_which_the_last_is_ragged():
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 3]], [70, 480, 53], axis=1)
    q, k, v = heads(rng, *segments.shape)
    expected = dense(q, k, v, segments)
    np.testing.assert_allclose(run(q, k, v, segments), expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@given(packings(rows=2), st.data())
def test_nothing_leaks_from_the_future_or_from_other_segments(packing, data):
    segments, rng = packing
    row, place = (data.draw(st.integers(0, size - 1)) for size in segments.shape)
    before = heads(rng, *segments.shape)
    hidden = np.ones(segments.shape, bool)
    hidden[row, : place + 1] = segments[row, : place + 1] != segments[row, place]
    after = [
        np.where(hidden[..., None, None], 100 * rng.standard_normal(x.shape), x) for x in before
    ]
    outputs = [run(*tensors, segments)[row, place] for tensors in (before, after)]
    np.testing.assert_array_equal(*outputs)


def test_a_token_sees_itself_and_the_first_of_its_segment():
    segments = np.repeat([[1, 2]], [30, 60], axis=1)
    q, k, v = heads(np.random.default_rng(1), *segments.shape)
    base = run(q, k, v, segments)[0, 80]
    for place, seen in ((80, True), (30, True), (81, False), (29, False)):
        moved = v.copy()
        moved[0, place] += 5
        assert np.array_equal(run(q, k, moved, segments)[0, 80], base) != seen, place


def test_one_segment_is_what_the_paged_pool_gives():
    rng, tokens = np.random.default_rng(2), 90
    q, k, v = (jnp.asarray(x, jnp.float32) for x in heads(rng, tokens))
    page_size, pages = 16, 8
    table = rng.permutation(np.arange(1, pages))[None].astype(np.int32)
    places = np.arange(tokens)
    pool = jnp.zeros((1, pages, page_size, KV_HEADS, HEAD_DIM))
    where = jnp.asarray(table[0, places // page_size]), jnp.asarray(places % page_size)
    pools = write_kv(pool, pool, k, v, jnp.int32(0), *where)
    row = (jnp.asarray(x) for x in (table, [0], [0], [tokens], [tokens]))
    paged = paged_attention(q, *pools, jnp.int32(0), *row, max_q_len=tokens, scale=SCALE)
    packed = run(q[None], k[None], v[None], np.ones((1, tokens)))[0]
    np.testing.assert_allclose(packed, paged, rtol=1e-5, atol=1e-5)
