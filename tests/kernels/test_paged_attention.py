"""Paged attention against a dense softmax in float64 numpy."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import paged_attention, write_kv

LAYERS, KV_HEADS, GROUP, HEAD_DIM, PAGES = 2, 2, 3, 8, 40


def dense(q, k_seq, v_seq, start, scale):
    """q [n, H, h] at positions start.. against k, v [length, K, h]: plain causal softmax."""
    out = np.zeros_like(q, np.float64)
    for i in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys = k_seq[: start + i + 1, head // GROUP]
            scores = scale * (keys @ q[i, head])
            p = np.exp(scores - scores.max())
            out[i, head] = (p / p.sum()) @ v_seq[: start + i + 1, head // GROUP]
    return out


@st.composite
def batches(draw):
    page_size = draw(st.sampled_from([1, 4, 16]))
    rows = draw(st.integers(1, 4))
    lens = [draw(st.integers(1, 8 * page_size)) for _ in range(rows)]
    q_lens = [draw(st.integers(0, min(n, 5))) for n in lens]
    return page_size, lens, q_lens, draw(st.integers(0, 2**16))


@settings(max_examples=25, deadline=None)
@given(batches())
def test_equals_a_dense_softmax(batch):
    page_size, lens, q_lens, seed = batch
    rng = np.random.default_rng(seed)
    # inf wherever no sequence writes: it must not reach any row
    pools = [np.full((LAYERS, PAGES, page_size, KV_HEADS, HEAD_DIM), np.inf) for _ in "kv"]
    width, free = 8, list(rng.permutation(np.arange(1, PAGES)))
    slots = rng.permutation(len(lens) + 2)[: len(lens)]
    table = np.full((len(lens) + 2, width), PAGES - 1, np.int32)
    sequences = []
    for r, n in enumerate(lens):
        pages = [free.pop() for _ in range(-(-n // page_size))]
        table[slots[r], : len(pages)] = pages
        sequences.append([rng.standard_normal((n, KV_HEADS, HEAD_DIM)) for _ in pools])
        for pool, values in zip(pools, sequences[-1], strict=True):
            for i in range(n):
                pool[1, pages[i // page_size], i % page_size] = values[i]
    tokens = sum(q_lens) + 2
    q = rng.standard_normal((tokens, KV_HEADS * GROUP, HEAD_DIM))
    starts = np.cumsum([0, *q_lens[:-1]]).astype(np.int32)
    got = paged_attention(
        jnp.asarray(q, jnp.float32),
        *(jnp.asarray(pool, jnp.float32) for pool in pools),
        jnp.int32(1),
        jnp.asarray(table),
        jnp.asarray(slots),
        jnp.asarray(starts),
        jnp.asarray(q_lens, jnp.int32),
        jnp.asarray(lens, jnp.int32),
        max_q_len=5,
        scale=0.3,
    )
    expected = np.zeros_like(q)
    for r, n in enumerate(q_lens):
        part = slice(starts[r], starts[r] + n)
        expected[part] = dense(q[part], *sequences[r], lens[r] - n, 0.3)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_write_reaches_its_layer_page_and_offset_only():
    pool = jnp.zeros((LAYERS, 4, 2, KV_HEADS, HEAD_DIM))
    k = jnp.ones((2, KV_HEADS, HEAD_DIM)) * jnp.array([1.0, 2.0])[:, None, None]
    pages, offsets = jnp.array([3, 1]), jnp.array([0, 1])
    k_pages, v_pages = write_kv(pool, pool, k, -k, jnp.int32(1), pages, offsets)
    expected = np.zeros(pool.shape)
    expected[1, 3, 0], expected[1, 1, 1] = 1, 2
    np.testing.assert_array_equal(k_pages, expected)
    np.testing.assert_array_equal(v_pages, -expected)


def test_a_pool_of_bits_is_a_bfloat16_pool():
    rng = np.random.default_rng(0)
    k, v, q = (
        jnp.asarray(rng.standard_normal((6, KV_HEADS, HEAD_DIM)), jnp.bfloat16) for _ in "kvq"
    )
    pages, offsets = jnp.array([2, 2, 2, 2, 5, 5]), jnp.array([0, 1, 2, 3, 0, 1])
    outputs = []
    for dtype in (jnp.bfloat16, jnp.uint16):
        pool = jnp.zeros((1, 6, 4, KV_HEADS, HEAD_DIM), dtype)
        pools = write_kv(pool, pool, k, v, jnp.int32(0), pages, offsets)
        zero = jnp.array([0])
        row = (jnp.array([[2, 5]]), zero, zero, jnp.array([6]), jnp.array([6]))
        outputs.append(paged_attention(q, *pools, jnp.int32(0), *row, max_q_len=6, scale=0.3))
    np.testing.assert_array_equal(*(np.asarray(out, np.float32) for out in outputs))
    assert np.abs(np.asarray(outputs[0], np.float32)).max() > 0


def test_a_float8_pool_is_clamped():
    k = jnp.array([1.0, -3.5, 447.0, 500.0, -1e6, jnp.inf]).reshape(1, 1, 6)
    pool = jnp.zeros((1, 2, 1, 1, 6), jnp.float8_e4m3fn)
    zero = jnp.array([0])
    k_pages, v_pages = write_kv(pool, pool, k, -k, jnp.int32(0), zero + 1, zero)
    expected = np.array([1.0, -3.5, 448.0, 448.0, -448.0, 448.0])
    np.testing.assert_array_equal(k_pages[0, 1, 0, 0].astype(jnp.float32), expected)
    np.testing.assert_array_equal(v_pages[0, 1, 0, 0].astype(jnp.float32), -expected)


def test_a_float8_pool_is_one_of_its_values():
    rng = np.random.default_rng(1)
    k, v, q = (jnp.asarray(rng.standard_normal((3, 2, 8)), jnp.float32) for _ in "kvq")
    k, v = (x.astype(jnp.float8_e4m3fn).astype(jnp.float32) for x in (k, v))
    outputs = []
    for dtype in (jnp.float32, jnp.float8_e4m3fn):
        pool = jnp.zeros((1, 2, 4, 2, 8), dtype)
        places = jnp.full(3, 1), jnp.arange(3)
        pools = write_kv(pool, pool, k, v, jnp.int32(0), *places)
        zero, three = jnp.array([0]), jnp.array([3])
        row = (jnp.array([[1]]), zero, zero, three, three)
        outputs.append(paged_attention(q, *pools, jnp.int32(0), *row, max_q_len=3, scale=0.3))
    np.testing.assert_array_equal(*outputs)
    assert np.abs(outputs[0]).min() > 0


def test_a_row_of_nothing_writes_nothing():
    pool = jnp.full((1, 2, 4, KV_HEADS, HEAD_DIM), jnp.nan)
    q = jnp.ones((3, KV_HEADS * GROUP, HEAD_DIM))
    row = (jnp.array([[1]]), *(jnp.array([n]) for n in (1, 0, 3, 3)))
    out = paged_attention(q, pool, pool, jnp.int32(0), *row, max_q_len=3, scale=0.3)
    np.testing.assert_array_equal(out, 0)
