"""From sequences to the rows of a step."""

from __future__ import annotations

from typing import NamedTuple

from glmjax.plans import Bucket, ChunkRow, DecodeRow, GroupRows, History, StepPlan
from glmjax.scheduler.buckets import smallest
from glmjax.scheduler.sequence import Sequence

STEP_TOKENS = 128  # what a launch costs besides its tokens, in tokens


class Planned(NamedTuple):
    """Rows of one kind for one data group, with whose they are."""

    sequences: list[Sequence]
    rows: list

    def add(self, sequence: Sequence, row: ChunkRow | DecodeRow) -> None:
        """Add a row."""
        self.sequences.append(sequence)
        self.rows.append(row)


def chunk_row(sequence: Sequence, budget: int) -> ChunkRow:
    """The next chunk, at most `budget` tokens, of a sequence that is prefilling."""
    start, known = sequence.planned_len, sequence.known
    end = min(start + budget, len(known))
    last = end == len(known)
    constraint = sequence.constraint
    return ChunkRow(
        slot=sequence.slot,
        start=start,
        token_ids=known[start:end],
        next_token=-1 if last else int(known[end]),
        sample=last,
        page_index=sequence.sent_pages,
        new_pages=tuple(sequence.pages[sequence.sent_pages :]),
        sampling=sequence.request.sampling,
        min_len=_min_len(sequence),
        history=_history(sequence) if sequence.sent_pages == 0 else None,
        mask=constraint.masks(()) if last and constraint else None,
    )


def decode_row(sequence: Sequence, drafts: int) -> DecodeRow:
    """One more token of a sequence, and verification of `drafts` drafts."""
    constraint, masks = sequence.constraint, None
    if constraint is not None:
        masks = constraint.masks(sequence.drafts[:drafts])
        drafts = len(masks) - 1
    sent, pages = sequence.sent_pages, sequence.pages
    new = tuple(pages[sent:]) if sent < len(pages) else ()
    return DecodeRow(sequence.slot, drafts, sent, new, masks)


def record_chunk(sequence: Sequence, row: ChunkRow, bucket: Bucket) -> None:
    """Count a launched chunk in its sequence's planned progress."""
    sequence.planned_len += len(row.token_ids)
    sequence.pending_samples += row.sample
    sequence.in_flight += 1
    sequence.sent_pages = len(sequence.pages)
    sequence.has_drafts = row.sample and bucket.drafts > 0


def record_decode(sequence: Sequence, row: DecodeRow, bucket: Bucket) -> None:
    """Count a launched decode row in its sequence's planned progress."""
    sequence.pending_samples += 1
    sequence.pending_drafts += row.drafts
    sequence.acceptance.launched(row.drafts)
    sequence.in_flight += 1
    sequence.sent_pages = len(sequence.pages)
    sequence.has_drafts = bucket.drafts > 0


def make_plan(bucket: Bucket, decode: list[Planned], chunks: list[Planned]) -> StepPlan:
    """The rows of every data group, in `bucket`."""
    pairs = zip(decode, chunks, strict=True)
    groups = tuple(GroupRows(tuple(d.rows), tuple(c.rows)) for d, c in pairs)
    sequences = [s for planned in (*decode, *chunks) for s in planned.sequences]
    return StepPlan(
        bucket,
        groups,
        logprobs=any(s.request.sampling.logprobs is not None for s in sequences),
        prompt_logprobs=any(s.prompt_logprobs is not None for c in chunks for s in c.sequences),
    )


def fit(
    buckets: tuple[Bucket, ...], decode: list[Planned], chunks: list[Planned], drafts: int
) -> Bucket:
    """The smallest bucket that holds these rows."""
    return smallest(
        buckets,
        rows=max(len(d.rows) for d in decode),
        drafts=drafts,
        chunk_rows=max(len(c.rows) for c in chunks),
        chunk_tokens=max(sum(len(row.token_ids) for row in c.rows) for c in chunks),
    )


def padded_tokens(bucket: Bucket) -> int:
    """What a step of this shape costs, in tokens."""
    return bucket.rows * (bucket.drafts + 1) + bucket.chunk_tokens + STEP_TOKENS


def _min_len(sequence: Sequence) -> int:
    least = sequence.request.sampling.min_new_tokens
    return sequence.prompt_len + least if least else 0


def _history(sequence: Sequence) -> History | None:
    sampling = sequence.request.sampling
    if not (sampling.penalised or sampling.logit_bias or sampling.min_new_tokens):
        return None
    n = sequence.prompt_len
    output = tuple(sequence.tokens[n:])
    return History(sequence.request.prompt_ids, output, tuple(sorted(sequence.stops)))
