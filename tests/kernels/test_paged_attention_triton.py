"""The Triton kernel of paged attention, interpreted on the CPU, against plain jax.numpy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention_triton import attend, check_pool, find_tile, split_count

INTERPRETED = Backend("triton", interpret=True)
LAYERS, ROWS, SLOTS, WIDTH, HEAD_DIM = 2, 3, 4, 6, 16
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    """One shape of the kernel."""

    page_size: int
    kv_heads: int
    group: int
    max_q_len: int
    rows: int  # of a tile
    keys: int
    splits: int
    pool: Any = jnp.float32

    @property
    def tokens(self) -> int:
        return ROWS * (self.max_q_len + 1)  # some of which no row reaches


CASES = [
    Case(page_size=4, kv_heads=2, group=12, max_q_len=1, rows=16, keys=8, splits=4),
    Case(page_size=4, kv_heads=2, group=12, max_q_len=5, rows=16, keys=16, splits=1),
    Case(page_size=16, kv_heads=1, group=3, max_q_len=5, rows=16, keys=8, splits=2),
    Case(page_size=1, kv_heads=2, group=2, max_q_len=3, rows=4, keys=2, splits=2),
    # a chunk that is longer than a page, in several tiles
    Case(page_size=4, kv_heads=1, group=3, max_q_len=16, rows=16, keys=8, splits=1),
    Case(
        page_size=8,
        kv_heads=2,
        group=4,
        max_q_len=2,
        rows=8,
        keys=8,
        splits=2,
        pool=jnp.float8_e4m3fn,
    ),
    Case(page_size=8, kv_heads=2, group=4, max_q_len=2, rows=8, keys=8, splits=1, pool=jnp.uint16),
]
IDS = ["decode", "verify", "three_heads", "page_of_one", "chunk", "fp8_pool", "bits_pool"]


@st.composite
def batches(draw, case: Case):
    """Lengths, queries, the place before each row's, and whether a row is one of nothing."""
    return [
        (
            length := draw(st.integers(1, WIDTH * case.page_size)),
            draw(st.integers(0, min(length, case.max_q_len))),
            draw(st.integers(0, 1)),
            draw(st.integers(0, 5)) == 0,
        )
        for _ in range(ROWS)
    ]


def arrays(case: Case, batch, seed: int):
    """What `paged_attention` takes, with NaN or inf wherever no row looks."""
    rng = np.random.default_rng(seed)
    pages = rng.permutation(np.arange(1, 1 + SLOTS * WIDTH)).astype(np.int32)
    table = pages.reshape(SLOTS, WIDTH)
    slots = rng.permutation(SLOTS)[:ROWS]
    shape = (LAYERS, 1 + SLOTS * WIDTH, case.page_size, case.kv_heads, HEAD_DIM)
    pools = [np.full(shape, junk, np.float32) for junk in (np.nan, np.inf)]
    for slot, (length, *_) in zip(slots, batch, strict=True):
        page_ids, offsets = np.divmod(np.arange(length), case.page_size)
        for pool in pools:
            values = rng.standard_normal((length, case.kv_heads, HEAD_DIM), np.float32)
            pool[1, table[slot, page_ids], offsets] = values
    lens, q_lens, gaps, nothing = (np.asarray(x, np.int32) for x in zip(*batch, strict=True))
    starts = np.cumsum(gaps) + np.cumsum(q_lens) - q_lens
    q = rng.standard_normal((case.tokens, case.kv_heads * case.group, HEAD_DIM), np.float32)
    slots = np.where(nothing, SLOTS + 3, slots)
    places = (jnp.asarray(x, jnp.int32) for x in (table, slots, starts, q_lens, lens))
    return jnp.asarray(q), *(_pool(x, case.pool) for x in pools), jnp.int32(1), *places


def _pool(values, dtype):
    if dtype == jnp.uint16:
        return jax.lax.bitcast_convert_type(jnp.asarray(values, jnp.bfloat16), jnp.uint16)
    return jnp.asarray(values).astype(dtype)


@partial(jax.jit, static_argnums=0)
def kernel(case: Case, args):
    tile = {"rows": case.rows, "keys": case.keys, "warps": 4, "stages": 1}
    how = {"backend": INTERPRETED, "tile": tile, "splits": case.splits}
    return attend(*args, max_q_len=case.max_q_len, scale=SCALE, **how)


@partial(jax.jit, static_argnums=0)
def reference(case: Case, args):
    return paged_attention(*args, max_q_len=case.max_q_len, scale=SCALE)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_the_reference(case):
    @settings(max_examples=10, deadline=None)
    @given(batches(case), st.integers(0, 2**16))
    def check(batch, seed):
        args = arrays(case, batch, seed)
        expected = reference(case, args)
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(kernel(case, args), expected, rtol=2e-5, atol=2e-5)

    check()


def test_keys_past_the_last_whole_block_count():
    """Rows as long as the table is wide, so that every split has keys, and one of one key."""
    case = replace(CASES[0], splits=2)
    whole = WIDTH * case.page_size
    args = arrays(case, [(whole, 1, 0, False), (whole - 1, 1, 0, False), (1, 1, 0, False)], 0)
    expected = reference(case, args)
    assert np.abs(expected[:3]).min(axis=(1, 2)).max() > 0
    np.testing.assert_allclose(kernel(case, args), expected, rtol=2e-5, atol=2e-5)


def test_bfloat16_queries_give_bfloat16():
    case = replace(CASES[1], splits=2)
    q, *rest = arrays(case, [(9, 5, 0, False), (24, 2, 1, False), (3, 3, 0, True)], 1)
    args = (q.astype(jnp.bfloat16), *rest)
    got, expected = kernel(case, args), reference(case, args)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, expected)), atol=0.03)


@pytest.mark.parametrize(("group", "max_q_len"), [(2, 1), (2, 32), (12, 4)])
def test_tiles_of_the_table(group, max_q_len):
    """The entry alone: its own tiles and splits."""
    case = Case(64, 1, group, max_q_len, rows=0, keys=0, splits=0)
    batch = [(200, max_q_len, 0, False), (64, 1, 1, False), (384, max_q_len, 0, False)]
    args, sizes = arrays(case, batch, 2), {"max_q_len": max_q_len, "scale": SCALE}
    got = jax.jit(partial(paged_attention, **sizes, backend=INTERPRETED))(*args)
    np.testing.assert_allclose(got, reference(case, args), rtol=2e-5, atol=2e-5)


@given(st.integers(1, 10_000), st.integers(1, 2048))
def test_splits_fill_the_processors_two_to_four_times(items, blocks):
    splits = split_count(items, blocks)
    assert splits in (1, 2, 4, 8, 16)
    assert splits == 1 or splits < 2 * blocks  # no split is idle for want of keys
    assert splits == 1 or items * splits < 4 * 132
    assert items * splits >= 2 * 132 or splits == 16 or splits >= blocks


@pytest.mark.parametrize("pool", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 16, 32])
def test_every_row_has_a_tile(pool, tokens):
    tile = find_tile("h100", tokens * 12, pool)
    assert tile["rows"] >= min(tokens * 12, 128)
    assert all(tile[name] & (tile[name] - 1) == 0 for name in ("rows", "keys", "warps"))


def test_pools_that_the_kernel_cannot_read_are_refused():
    with pytest.raises(ValueError, match="page_size is 48"):
        check_pool((1, 4, 48, 1, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="head_dim is 96"):
        check_pool((1, 4, 64, 1, 96), jnp.bfloat16)
    pages = 2**31 // (92 * 64 * 128)
    check_pool((92, pages, 64, 1, 128), jnp.float8_e4m3fn)
    check_pool((92, 3 * pages, 64, 1, 128), jnp.float8_e4m3fn)
    check_pool((92, 2 * pages - 2, 64, 1, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="fewer pages"):
        check_pool((92, pages + 1, 64, 1, 128), jnp.float8_e4m3fn)
