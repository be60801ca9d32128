"""Launches as data: what a plan becomes, and that it passes a wire unharmed or not at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from answers import ask
from hypothesis import given
from hypothesis import strategies as st

from glmjax.engine import Engine
from glmjax.plans import Bucket, ChunkRow, DecodeRow, GroupRows, History, Limits, StepPlan
from glmjax.runner.blob import blob_size, mask_shape, new_pages
from glmjax.runner.commands import (
    HEADER,
    EnterPages,
    EnterTables,
    Launch,
    Step,
    WireError,
    decode,
    encode,
    launch_of,
    row_size,
)
from glmjax.runner.sampling import table_row
from glmjax.types import Request, SamplingParams

VOCAB = 70
BUCKETS = (Bucket(3, 0, 0, 0), Bucket(3, 2, 0, 0), Bucket(3, 2, 2, 8))
LIMITS = Limits(2, 5, 99, 4, 96, 2, VOCAB, BUCKETS)
INT32 = st.integers(-(2**31), 2**31 - 1)


def arrays(draw, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Few distinct values, so that large arrays are drawn fast, and every bit pattern."""
    values = draw(st.lists(INT32, min_size=1, max_size=5))
    return np.resize(np.array(values, np.int32), shape).view(dtype)


@st.composite
def steps(draw) -> Step:
    bucket = draw(st.sampled_from(BUCKETS))
    blob = arrays(draw, (LIMITS.groups, blob_size(bucket, LIMITS)), "int32")
    masks = arrays(draw, mask_shape(bucket, LIMITS), "uint32") if draw(st.booleans()) else None
    return Step(bucket, blob, masks, draw(st.booleans()), draw(st.booleans()))


@st.composite
def entries(draw) -> EnterPages | EnterTables:
    place = draw(st.integers(0, LIMITS.groups - 1)), draw(st.integers(0, LIMITS.slots - 1))
    if draw(st.booleans()):
        size = draw(st.integers(1, LIMITS.pages_per_seq))
        return EnterPages(*place, arrays(draw, (size,), "int32"))
    return EnterTables(*place, arrays(draw, (row_size(VOCAB),), "int32"))


launches = st.builds(Launch, st.lists(entries(), max_size=3).map(tuple), steps())


def check_same(found: Launch, sent: Launch) -> None:
    pairs = zip((*found.entries, found.step), (*sent.entries, sent.step), strict=True)
    for one, other in pairs:
        assert type(one) is type(other)
        for a, b in zip(one, other, strict=True):
            assert type(a) is type(b)
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
            np.testing.assert_array_equal(a, b)


@given(launches)
def test_a_launch_comes_out_of_the_wire_as_it_went_in(launch):
    check_same(decode(encode(launch), LIMITS), launch)


@given(launches, st.data())
def test_a_launch_that_is_cut_or_goes_on_is_refused(launch, data):
    whole = encode(launch)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(WireError):
        decode(whole[:cut], LIMITS)
    with pytest.raises(WireError, match="after the step"):
        decode(whole + b"\0", LIMITS)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused(data):
    with pytest.raises(WireError):
        decode(data, LIMITS)


@given(launches, st.data())
def test_a_changed_header_is_refused_or_is_another_launch_of_right_shapes(launch, data):
    changed = bytearray(encode(launch))
    changed[data.draw(st.integers(0, HEADER.size - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode(bytes(changed), LIMITS)
    except WireError:
        return
    assert found.step.blob.shape == (LIMITS.groups, blob_size(found.step.bucket, LIMITS))
    for entry in found.entries:
        assert entry.group in range(LIMITS.groups)
        assert entry.slot in range(LIMITS.slots)
        wide = LIMITS.pages_per_seq if isinstance(entry, EnterPages) else row_size(VOCAB)
        assert len(entry[2]) <= wide


STEP = Step(BUCKETS[0], np.zeros((2, blob_size(BUCKETS[0], LIMITS)), np.int32), None, True, False)
FOREIGN = [
    Launch((), STEP._replace(bucket=Bucket(3, 1, 0, 0))),
    Launch((), STEP._replace(bucket=BUCKETS[2])),
    Launch((), STEP._replace(masks=np.zeros((2, 3, 9), np.uint32))),
    Launch((EnterPages(2, 0, np.zeros(1, np.int32)),), STEP),
    Launch((EnterPages(0, 5, np.zeros(1, np.int32)),), STEP),
    Launch((EnterPages(0, 0, np.zeros(LIMITS.pages_per_seq + 1, np.int32)),), STEP),
    Launch((EnterTables(0, 0, np.zeros(row_size(VOCAB) - 1, np.int32)),), STEP),
]


@pytest.mark.parametrize("launch", FOREIGN, ids=range(len(FOREIGN)))
def test_a_launch_for_another_runner_is_refused(launch):
    assert decode(encode(Launch((), STEP)), LIMITS).step.logprobs
    with pytest.raises(WireError):
        decode(encode(launch), LIMITS)


def test_a_table_row_has_the_size_that_is_checked():
    assert len(table_row(None, SamplingParams(), VOCAB)) == row_size(VOCAB)


def chunk(slot: int, **more) -> ChunkRow:
    kind = {"start": 0, "token_ids": np.array([1, 2], np.int32), "next_token": -1}
    rest = {"page_index": 0, "new_pages": (1,), "sampling": SamplingParams()}
    return ChunkRow(slot=slot, sample=True, **(kind | rest | more))


def test_what_a_blob_has_no_room_for_goes_before_it():
    pages, bucket = tuple(range(1, 20)), BUCKETS[2]
    history = History((1,), (2,), (3,))
    rows = GroupRows((), (chunk(1, new_pages=pages), chunk(4, history=history)))
    launch = launch_of(StepPlan(bucket, (GroupRows(), rows), prompt_logprobs=True), LIMITS)
    early, tables = launch.entries
    assert isinstance(early, EnterPages)
    assert (early.group, early.slot) == (1, 1)
    assert tuple(early.pages) == pages[: len(pages) - new_pages(bucket, LIMITS)[1]] != ()
    assert isinstance(tables, EnterTables)
    assert (tables.group, tables.slot) == (1, 4)
    np.testing.assert_array_equal(tables.row, table_row(history, SamplingParams(), VOCAB))
    assert launch.step.masks is None
    assert (launch.step.logprobs, launch.step.prompt_logprobs) == (False, True)


def test_masks_go_with_a_step_that_has_any():
    row = DecodeRow(0, 0, 0, (), np.array([[5, 6, 7]], np.uint32))
    launch = launch_of(StepPlan(BUCKETS[0], (GroupRows((row,)), GroupRows())), LIMITS)
    assert launch.step.masks is not None
    assert launch.step.masks[0, 0].tolist() == [5, 6, 7]
    assert launch.entries == ()


def test_a_runner_does_with_bytes_what_it_does_with_plans(plain):
    """Prompts beyond a chunk, a cached prefix, penalties: all that a launch consists of."""
    base = SamplingParams(max_new_tokens=8, seed=3, ignore_eos=True)
    sampling = [
        replace(base, temperature=0.0),
        replace(base, temperature=1.0),
        replace(base, temperature=1.0, presence_penalty=1.0, repetition_penalty=1.3),
    ]
    prompts = [tuple(range(3, 43)), tuple(range(3, 40))]
    asked = [
        Request(f"{i}-{j}", prompt, params)
        for i, prompt in enumerate(prompts)
        for j, params in enumerate(sampling)
    ]

    class ByWire:
        """The same runner, over bytes."""

        limits = plain.limits
        reset = staticmethod(plain.reset)
        update_params = staticmethod(plain.update_params)

        @staticmethod
        def launch(plan: StepPlan):
            return plain.execute(decode(encode(plain.commands(plan)), plain.limits))

    straight, wired = (ask(Engine(runner), asked) for runner in (plain, ByWire()))
    assert {i: a.tokens for i, a in wired.items()} == {i: a.tokens for i, a in straight.items()}
    assert len({tuple(answer.tokens) for answer in straight.values()}) > 3
