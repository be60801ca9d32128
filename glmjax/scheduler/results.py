"""What the results of a step mean for its sequences."""

from __future__ import annotations

from glmjax.plans import Bucket, ChunkRow, LogprobArrays, StepResult
from glmjax.scheduler.batch import Planned
from glmjax.scheduler.sequence import Sequence
from glmjax.types import FinishReason, RequestOutput, TokenLogprobs


def take_tokens(
    sequence: Sequence, tokens: list[int]
) -> tuple[list[int], FinishReason | None, int | None]:
    """Those of a sequence's new tokens that count: up to the first that ends it.

    Returns:
        The tokens, why it ended if it did, and the stop token that ended it.
    """
    room = sequence.max_new_tokens - sequence.new_len
    taken = tokens[:room]
    if not sequence.stops.isdisjoint(taken):
        end = next(n for n, token in enumerate(taken) if token in sequence.stops)
        return taken[: end + 1], FinishReason.STOP, taken[end]
    return taken, FinishReason.LENGTH if len(taken) == room else None, None


def output_of(
    sequence: Sequence,
    tokens: list[int],
    reason: FinishReason | None = None,
    matched: int | None = None,
    logprobs: tuple[TokenLogprobs, ...] = (),
    error: str | None = None,
) -> RequestOutput:
    """The output of a sequence that these tokens were added to."""
    owed = tokens and sequence.prompt_logprobs is not None
    return RequestOutput(
        sequence.request.id,
        tuple(tokens),
        reason,
        matched,
        sequence.prompt_len,
        sequence.new_len,
        sequence.cached_tokens or 0,
        logprobs,
        _take_prompt_logprobs(sequence) if owed else (),
        sequence.drafted,
        sequence.accepted,
        sequence.version,
        error,
        tuple(sequence.accept_lengths),
    )


class StepReader:
    """Results of a step by data group and row: its decode rows first, then its chunks.

    Args:
        result: of the step.
        bucket: its shape.

    Attributes:
        counts: new tokens of each row.
        any_fault: whether any row's logits were not finite.
        has_logprobs: whether the step was asked for log probabilities.
    """

    def __init__(self, result: StepResult, bucket: Bucket):
        self._result = result
        self._bucket = bucket
        self._tokens: list[list[list[int]]] = result.tokens.tolist()
        self.counts: list[list[int]] = result.accept_lens.tolist()
        self.any_fault = bool(result.faults.any())
        self.has_logprobs = result.logprobs is not None

    def tokens(self, group: int, row: int) -> list[int]:
        """The new tokens of a row."""
        return self._tokens[group][row][: self.counts[group][row]]

    def drafts(self, group: int, row: int) -> list[int]:
        """What was drafted to follow them."""
        return self._result.drafts[group, row].tolist() if self._bucket.drafts else []

    def fault(self, group: int, row: int) -> bool:
        """Whether a row's logits were not finite."""
        return bool(self._result.faults[group, row])

    def logprobs(
        self, group: int, row: int, count: int, sequence: Sequence
    ) -> tuple[TokenLogprobs, ...]:
        """Of the first `count` new tokens of a row, where its sequence asked for them."""
        arrays, most = self._result.logprobs, sequence.request.sampling.logprobs
        if arrays is None or most is None:
            return ()
        rows, width = self._bucket.rows, self._bucket.drafts + 1
        first = row * width if row < rows else rows * width + row - rows
        return tuple(_at(arrays, group, place, most) for place in range(first, first + count))

    def keep_prompt_logprobs(self, group: int, chunks: Planned) -> None:
        """Note those of a group's chunks with their sequences, by position."""
        if self._result.prompt_logprobs is None:
            return
        first = 0
        for sequence, row in zip(*chunks, strict=True):
            _keep(self._result.prompt_logprobs, group, first, sequence, row)
            first += len(row.token_ids)


def _keep(arrays: LogprobArrays, group: int, first: int, sequence: Sequence, row: ChunkRow) -> None:
    """Those of the tokens that follow a chunk's, which lies at `first` among the packed chunks."""
    kept, most = sequence.prompt_logprobs, sequence.request.sampling.logprobs
    if kept is None or most is None:
        return
    begin = sequence.first_logprob or 0
    for i in range(len(row.token_ids) - row.sample):  # what it samples is no part of the prompt
        position = row.start + i + 1
        if begin <= position < sequence.prompt_len:
            kept[position] = _at(arrays, group, first + i, most)


def _at(arrays: LogprobArrays, group: int, place: int, most: int) -> TokenLogprobs:
    ids = arrays.top_ids[group, place, :most].tolist()
    values = arrays.top[group, place, :most].tolist()
    top = tuple((i, value) for i, value in zip(ids, values, strict=True) if i >= 0)
    return TokenLogprobs(float(arrays.chosen[group, place]), top)


def _take_prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs | None, ...]:
    kept, begin = sequence.prompt_logprobs, sequence.first_logprob or 0
    if kept is None:
        return ()
    sequence.prompt_logprobs = None
    return tuple(kept[p] if p else None for p in range(begin, sequence.prompt_len))
