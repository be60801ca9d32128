"""Shapes: which are compiled, and which of them a step gets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.plans import Bucket
from glmjax.scheduler.buckets import make_buckets, smallest

SIZES = {
    "slots": st.integers(1, 300),
    "chunk": st.integers(2, 4096),
    "drafts": st.integers(0, 5),
}


@given(**SIZES)
def test_shapes_are_few_and_within_bounds(slots, chunk, drafts):
    buckets = make_buckets(slots, chunk, drafts)
    assert len(set(buckets)) == len(buckets) <= 24
    for b in buckets:
        assert b.rows or b.chunk_tokens
        assert b.rows <= slots
        assert b.chunk_rows <= min(slots, b.chunk_tokens)
        assert (b.chunk_rows > 0) == (b.chunk_tokens > 0)
        assert b.chunk_tokens <= chunk
        assert b.drafts in (0, drafts)
        assert b.drafts == drafts or not b.chunk_tokens, "chunks always make drafts"


@given(**SIZES, data=st.data())
def test_every_step_has_a_shape_and_no_other_is_cheaper(slots, chunk, drafts, data):
    buckets = make_buckets(slots, chunk, drafts)
    chunk_rows = data.draw(st.integers(0, max(b.chunk_rows for b in buckets)))
    chunk_tokens = data.draw(st.integers(chunk_rows, chunk)) if chunk_rows else 0
    rows = data.draw(st.integers(0 if chunk_rows else 1, slots))
    wanted = Bucket(rows, drafts, chunk_rows, chunk_tokens)
    found = smallest(buckets, *wanted)
    for b in (b for b in buckets if b.drafts == drafts):
        if all(n >= least for n, least in zip(b, wanted, strict=True)):
            assert _tokens(found) <= _tokens(b)
    assert all(n >= least for n, least in zip(found, wanted, strict=True))
    assert found.drafts == drafts


def _tokens(bucket: Bucket) -> int:
    return bucket.rows * (bucket.drafts + 1) + bucket.chunk_tokens


def test_decoding_alone_is_never_padded_with_chunks_nor_drafts():
    buckets = make_buckets(64, 1024, 3)
    assert smallest(buckets, 5, 0, 0, 0) == Bucket(8, 0, 0, 0)
    assert smallest(buckets, 9, 3, 0, 0) == Bucket(64, 3, 0, 0)
    assert smallest(buckets, 0, 3, 1, 65) == Bucket(0, 3, 8, 256)
    assert smallest(buckets, 1, 3, 1, 1) == Bucket(64, 3, 32, 1024)


def test_what_no_shape_holds_is_named():
    with pytest.raises(ValueError, match=r"no bucket holds Bucket\(rows=5, drafts=0"):
        smallest(make_buckets(4, 8, 0), 5, 0, 0, 0)
