"""From sequences to the rows of a step."""

from __future__ import annotations

import numpy as np

from glmjax.scheduler.buckets import smallest
from glmjax.scheduler.sequence import Sequence
from glmjax.types import Bucket, Row, StepPlan


def prefill_row(sequence: Sequence, budget: int) -> Row:
    """The next chunk, at most `budget` tokens, of a sequence that is prefilling."""
    start = sequence.planned_len
    end = min(start + budget, sequence.prefill_target)
    return Row(
        slot=sequence.slot,
        start=start,
        token_ids=np.asarray(sequence.tokens[start:end], np.int32),
        q_len=end - start,
        page_index=0,
        new_pages=tuple(sequence.pages) if start == 0 else (),
        sample=end == sequence.prefill_target,
        sampling=sequence.request.sampling,
    )


def decode_row(sequence: Sequence, new_pages: tuple[int, ...]) -> Row:
    """One more token of a sequence, whose `new_pages` are the last of its pages."""
    return Row(
        slot=sequence.slot,
        start=-1,
        token_ids=None,
        q_len=1,
        page_index=len(sequence.pages) - len(new_pages),
        new_pages=new_pages,
        sample=True,
        sampling=sequence.request.sampling,
    )


def make_plan(groups: list[list[Row]], buckets: tuple[Bucket, ...]) -> StepPlan:
    """Rows of each data group, in the smallest bucket that holds every group."""
    bucket = smallest(
        buckets,
        rows=max(len(rows) for rows in groups),
        tokens=max(sum(row.q_len for row in rows) for rows in groups),
        max_q_len=max(row.q_len for rows in groups for row in rows),
    )
    return StepPlan(bucket, tuple(tuple(rows) for rows in groups))


def record(sequence: Sequence, row: Row) -> None:
    """Count a launched row in its sequence's planned progress."""
    sequence.planned_len += row.q_len
    sequence.planned_new += int(row.sample)
    sequence.in_flight += 1
