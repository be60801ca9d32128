"""What the host packs, the device unpacks."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.plans import Bucket, ChunkRow, DecodeRow, GroupRows, History, Limits, StepPlan
from glmjax.runner.blob import (
    blob_size,
    constrained,
    early_pages,
    mask_shape,
    masks,
    new_pages,
    pack,
    unpack,
)
from glmjax.runner.sampling import pack_scalars
from glmjax.types import SamplingParams

VOCAB, WORDS = 70, 3
BUCKETS = (Bucket(3, 0, 0, 0), Bucket(3, 2, 0, 0), Bucket(0, 2, 1, 8), Bucket(3, 2, 2, 8))
LIMITS = Limits(2, 5, 99, 4, 96, 2, VOCAB, BUCKETS)
MASKED = st.integers(0, 2**32 - 1)

sampling = st.builds(
    SamplingParams,
    temperature=st.floats(0, 10, width=32),
    top_k=st.sampled_from([-1, 1, 2**31 - 1]),
    top_p=st.floats(0.0625, 1, width=32),
    presence_penalty=st.floats(-2, 2, width=32),
    seed=st.integers(0, 2**32 - 1),
)


def mask_rows(n: int):
    return st.none() | st.lists(MASKED, min_size=WORDS * n, max_size=WORDS * n).map(
        lambda words: np.array(words, np.uint32).reshape(n, WORDS)
    )


def pages(most: int):
    return st.lists(st.integers(1, 98), max_size=most).map(tuple)


@st.composite
def decode_rows(draw, bucket: Bucket) -> DecodeRow:
    drafts = draw(st.integers(0, bucket.drafts))
    most = new_pages(bucket, LIMITS)[0]
    slot, index = draw(st.integers(0, 4)), draw(st.integers(0, 20))
    return DecodeRow(slot, drafts, index, draw(pages(most)), draw(mask_rows(drafts + 1)))


@st.composite
def chunk_rows(draw, tokens: int) -> ChunkRow:
    ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=tokens))
    sample = draw(st.booleans())
    return ChunkRow(
        slot=draw(st.integers(0, 4)),
        start=draw(st.integers(0, 80)),
        token_ids=np.array(ids, np.int32),
        next_token=-1 if sample else draw(st.integers(0, VOCAB - 1)),
        sample=sample,
        page_index=draw(st.integers(0, 3)),
        new_pages=draw(pages(20)),
        sampling=draw(sampling),
        min_len=draw(st.integers(0, 99)),
        history=draw(st.none() | st.just(History((1,), (2,), (3,)))),
        mask=draw(mask_rows(1)),
    )


@st.composite
def plans(draw) -> StepPlan:
    bucket = draw(st.sampled_from(BUCKETS))
    each = bucket.chunk_tokens // max(bucket.chunk_rows, 1)
    group = st.builds(
        GroupRows,
        st.lists(decode_rows(bucket), max_size=bucket.rows).map(tuple),
        st.lists(chunk_rows(max(each, 1)), max_size=bucket.chunk_rows).map(tuple),
    )
    groups = draw(st.tuples(group, group))
    return StepPlan(bucket, groups, draw(st.booleans()), draw(st.booleans()))


def check_decode(fields, rows: tuple[DecodeRow, ...]) -> None:
    for r, row in enumerate(rows):
        assert fields.slots[r] == row.slot
        assert fields.drafts[r] == row.drafts
        assert fields.page_index[r] == row.page_index
        assert tuple(fields.new_pages[r, : fields.page_count[r]]) == row.new_pages
    padding = slice(len(rows), None)
    assert (fields.slots[padding] == LIMITS.slots).all()
    assert (fields.page_count[padding] == 0).all()


def check_chunks(fields, rows: tuple[ChunkRow, ...], bucket: Bucket) -> None:
    first = 0
    for c, row in enumerate(rows):
        early = early_pages(row, bucket, LIMITS)
        assert early == row.new_pages[: len(early)]
        assert fields.chunk_page_index[c] == row.page_index + len(early)
        late = fields.chunk_new_pages[c, : fields.chunk_page_count[c]]
        assert (*early, *late) == row.new_pages
        assert fields.chunk_slots[c] == row.slot
        assert fields.starts[c] == row.start
        assert fields.sample[c] == row.sample
        assert fields.next_tokens[c] == row.next_token
        assert fields.plain[c] == (row.page_index == 0 and row.history is None)
        np.testing.assert_array_equal(fields.scalars[c], pack_scalars(row.sampling, row.min_len))
        last = first + fields.q_lens[c]
        np.testing.assert_array_equal(fields.token_ids[first:last], row.token_ids)
        first = last
    padding = slice(len(rows), None)
    assert (fields.chunk_slots[padding] == LIMITS.slots).all()
    assert not fields.q_lens[padding].any()
    assert not fields.sample[padding].any()


@given(plans())
def test_every_field_arrives(plan):
    blob = pack(plan, LIMITS)
    assert blob.shape == (LIMITS.groups, blob_size(plan.bucket, LIMITS))
    for group, rows in enumerate(plan.groups):
        fields = jax.tree.map(np.asarray, unpack(blob[group], plan.bucket, LIMITS))
        assert fields.wanted.tolist() == [plan.logprobs, plan.prompt_logprobs, constrained(plan)]
        check_decode(fields, rows.decode)
        check_chunks(fields, rows.chunks, plan.bucket)


@given(plans())
def test_every_mask_stands_at_its_place_and_all_else_is_allowed(plan):
    bucket, found = plan.bucket, masks(plan, LIMITS)
    assert found.shape == mask_shape(bucket, LIMITS)
    assert found.dtype == np.uint32
    for group, rows in zip(found, plan.groups, strict=True):
        expected = np.full_like(group, 2**32 - 1)
        for r, row in enumerate(rows.decode):
            for i in range(row.drafts + 1 if row.masks is not None else 0):
                expected[r * (bucket.drafts + 1) + i] = row.masks[i]
        for c, row in enumerate(rows.chunks):
            if row.mask is not None:
                expected[bucket.rows * (bucket.drafts + 1) + c] = row.mask[0]
        np.testing.assert_array_equal(group, expected)
    assert constrained(plan) or (found == 2**32 - 1).all()


def test_more_pages_than_a_decode_row_can_reserve_are_an_error():
    bucket = BUCKETS[1]
    most = new_pages(bucket, LIMITS)[0]
    row = DecodeRow(0, 0, 0, tuple(range(1, most + 2)))
    plan = StepPlan(bucket, (GroupRows((row,)), GroupRows()))
    with pytest.raises(ValueError, match=f"{most + 1} new pages in a row of {most}"):
        pack(plan, LIMITS)
