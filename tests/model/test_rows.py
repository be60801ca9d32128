"""How query tokens are laid out in rows."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.model.attention import Rows, make_batch, split_rows
from pallas_kernels.paged_attention import paged_attention

PAGE_SIZE, PAGES, TOKENS, ROWS = 4, 40, 24, 4


@st.composite
def rows(draw) -> Rows:
    q_lens = draw(st.lists(st.integers(0, 12), min_size=ROWS, max_size=ROWS))
    while sum(q_lens) > TOKENS:
        q_lens.pop(0)
        q_lens.append(0)
    before = draw(st.lists(st.integers(0, 9), min_size=ROWS, max_size=ROWS))
    q_lens, before = np.array(q_lens, np.int32), np.array(before, np.int32)
    held = -(-(before + q_lens) // PAGE_SIZE) - draw(st.integers(0, 1))
    slots = draw(st.permutations(range(6)))[:ROWS]
    starts = np.cumsum(q_lens) - q_lens
    arrays = (slots, held, starts, q_lens, before + q_lens)
    return Rows(*(jnp.asarray(a, jnp.int32) for a in arrays), 0, TOKENS, TOKENS)


TABLE = jnp.asarray(np.random.default_rng(0).permutation(PAGES)[:36].reshape(6, 6), jnp.int32)


@settings(max_examples=60, deadline=None)
@given(rows(), st.sampled_from([1, 5, 8, TOKENS]))
def test_split_rows_are_the_same_tokens(whole, size):
    split = split_rows(whole, size)
    assert int(split.q_lens.max()) <= size
    longest = (whole.seq_lens * (whole.q_lens > 0)).max()
    assert int(split.seq_lens.max()) == int(longest), "attention goes as far as the longest"
    assert bool((jnp.diff(split.q_starts) >= 0).all())
    one, other = (make_batch(TABLE, PAGE_SIZE, (part,)) for part in (whole, split))
    for name in ("positions", "valid", "page_ids", "offsets"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), name)


@settings(max_examples=8, deadline=None)
@given(rows())
def test_split_rows_see_the_same(whole):
    rng = np.random.default_rng(1)
    pools = [
        jnp.asarray(rng.standard_normal((1, PAGES, PAGE_SIZE, 2, 8)), jnp.float32) for _ in "kv"
    ]
    q = jnp.asarray(rng.standard_normal((TOKENS, 4, 8)), jnp.float32)
    outputs = []
    for part in (whole, split_rows(whole, 5)):
        places = (part.slots, part.q_starts, part.q_lens, part.seq_lens)
        sizes = {"max_q_len": part.max_q_len, "scale": 0.3}
        outputs.append(paged_attention(q, *pools, jnp.int32(0), TABLE, *places, **sizes))
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
