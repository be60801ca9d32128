"""A runner with no device: deterministic tokens, real page tables. Drives tests and load tests.

It keeps a pool of token ids in place of keys and values, and samples a hash of all that a sequence
sees through its page table. A page handed to two sequences, freed too early or never written
changes tokens, as it would on a device. A second pool stands for the draft layer's: what is there
at a position is the token that follows it.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmjax.errors import ConfigError
from glmjax.plans import (
    ChunkRow,
    DecodeRow,
    Limits,
    LogprobArrays,
    StepPlan,
    StepResult,
)
from glmjax.types import MAX_LOGPROBS, SamplingParams

DRAFT_ERRORS = 3  # of 8 drafts


def next_token(
    tokens: np.ndarray, seed: int, vocab_size: int, mask: np.ndarray | None = None
) -> int:
    """The token that follows `tokens` int32 [n]: a hash of them, of `seed` and of the length.

    Args:
        mask: uint32 [words], bits of the tokens it may be; None: all.
    """
    number = zlib.crc32(tokens.astype("<i4").tobytes(), seed)
    if mask is None:
        return number % vocab_size
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(allowed[number % len(allowed)])


def token_logprob(tokens: np.ndarray, token: int) -> float:
    """A made-up log probability of `token` after `tokens`, from -9.99 to 0."""
    return -(zlib.crc32(tokens.astype("<i4").tobytes(), token) % 1000) / 100


@dataclass(frozen=True)
class FakeHandle:
    """A step that is done."""

    done: StepResult

    def result(self) -> StepResult:
        """The step's tokens."""
        return self.done


class FakeRunner:
    """Runs plans on numpy arrays.

    Args:
        limits: shapes to offer; a plan with another bucket raises KeyError.
        draft_errors: how many of 8 drafts are wrong, by a hash of what is before them.

    Attributes:
        launched: steps so far.
        computed: tokens of chunks so far.
        stale_drafts: times that the draft layer saw other than what its sequence holds.
        params: an int in place of weights, 0 at first; sampled tokens depend on it as on a seed.
    """

    def __init__(self, limits: Limits, draft_errors: int = DRAFT_ERRORS):
        self.limits = limits
        self.launched = self.computed = self.stale_drafts = self.params = 0
        self._draft_errors = draft_errors
        self.reset()

    def reset(self) -> None:
        """Forget all sequences and pages."""
        limits = self.limits
        places = (limits.groups, limits.pages, limits.page_size)
        slots = (limits.groups, limits.slots)
        self._pool, self._draft_pool = np.full((2, *places), -1, np.int32)
        self._table = np.zeros((*slots, limits.pages_per_seq), np.int32)
        self._pages = np.zeros(slots, np.int32)
        self._lens = np.zeros(slots, np.int32)
        self._last = np.zeros(slots, np.int32)
        self._drafts = np.zeros((*slots, limits.num_drafts), np.int32)
        self._sampling: dict[tuple[int, int], SamplingParams] = {}

    def launch(self, plan: StepPlan) -> FakeHandle:
        """Run a step at once."""
        bucket, groups = plan.bucket, self.limits.groups
        if bucket not in self.limits.buckets:
            raise KeyError(f"bucket {bucket} was not compiled")
        self.launched += 1
        rows = bucket.rows + bucket.chunk_rows
        result = StepResult(
            np.zeros((groups, rows, bucket.drafts + 1), np.int32),
            np.zeros((groups, rows), np.int32),
            np.zeros((groups, rows, bucket.drafts), np.int32),
            np.zeros((groups, rows), bool),
            _no_logprobs(groups, bucket.rows * (bucket.drafts + 1) + bucket.chunk_rows),
            _no_logprobs(groups, bucket.chunk_tokens),
        )
        for g, group in enumerate(plan.groups):
            self._check_shape(plan, g)
            for r, row in enumerate(group.decode):
                self._decode(g, r, row, result, bucket.drafts)
            first = 0
            for c, row in enumerate(group.chunks):
                self._chunk(g, c, row, result, plan, first)
                first += len(row.token_ids)
        return FakeHandle(_wanted(result, plan))

    def update_params(self, params: Any) -> None:
        """Sample with other weights: any int. Raises ConfigError for anything else."""
        if not isinstance(params, int):
            raise ConfigError(f"params are {type(params).__name__}; a fake runner takes an int")
        self.params = params

    def _check_shape(self, plan: StepPlan, g: int) -> None:
        group, bucket = plan.groups[g], plan.bucket
        sizes = (
            len(group.decode),
            max((row.drafts for row in group.decode), default=0),
            len(group.chunks),
            sum(len(row.token_ids) for row in group.chunks),
        )
        if any(n > most for n, most in zip(sizes, bucket, strict=True)):
            raise ValueError(f"a step of {sizes} exceeds {bucket}")

    def _decode(self, g: int, r: int, row: DecodeRow, result: StepResult, width: int) -> None:
        self._enter_pages(g, row.slot, row.page_index, row.new_pages)
        drafts = self._drafts[g, row.slot, : row.drafts]
        start = self._lens[g, row.slot]
        self._write(self._pool, g, row.slot, start, [self._last[g, row.slot], *drafts])
        tokens = []
        for i in range(row.drafts + 1):
            mask = None if row.masks is None else row.masks[i]
            seen = self._seen(self._pool, g, row.slot, start + i + 1)
            tokens.append(self._sample(g, row.slot, seen, mask))
            _put_logprobs(result.logprobs, g, r * (width + 1) + i, seen, tokens[-1])
            if i == row.drafts or drafts[i] != tokens[-1]:
                break
        self._write(self._draft_pool, g, row.slot, start, tokens)
        self._settle(g, r, row.slot, start + len(tokens), tokens, result, width)

    def _chunk(
        self, g: int, c: int, row: ChunkRow, result: StepResult, plan: StepPlan, first: int
    ) -> None:
        self.computed += len(row.token_ids)
        self._sampling[g, row.slot] = row.sampling
        if row.page_index == 0 and row.sampling.penalised and row.history is None:
            raise ValueError("a sequence with penalties has no history")
        self._enter_pages(g, row.slot, row.page_index, row.new_pages)
        self._write(self._pool, g, row.slot, row.start, row.token_ids)
        end = row.start + len(row.token_ids)
        seen = self._seen(self._pool, g, row.slot, end)
        mask = None if row.mask is None else row.mask[0]
        token = self._sample(g, row.slot, seen, mask) if row.sample else row.next_token
        following = [*row.token_ids[1:].tolist(), token]
        self._write(self._draft_pool, g, row.slot, row.start, following)
        if plan.prompt_logprobs:
            for i, follows in enumerate(following):
                place = first + i
                _put_logprobs(result.prompt_logprobs, g, place, seen[: row.start + i + 1], follows)
        self._lens[g, row.slot] = end
        if row.sample:
            bucket = plan.bucket
            place = bucket.rows * (bucket.drafts + 1) + c
            _put_logprobs(result.logprobs, g, place, seen, token)
            self._settle(g, bucket.rows + c, row.slot, end, [token], result, bucket.drafts)

    def _settle(
        self, g: int, r: int, slot: int, end: int, tokens: list[int], result: StepResult, width: int
    ) -> None:
        """A row has sampled: keep its state, make drafts, write its results."""
        self._lens[g, slot], self._last[g, slot] = end, tokens[-1]
        result.tokens[g, r, : len(tokens)] = tokens
        result.accept_lens[g, r] = len(tokens)
        if width:
            self._drafts[g, slot] = self._draft(g, slot, end, tokens[-1])
            result.drafts[g, r] = self._drafts[g, slot]

    def _draft(self, g: int, slot: int, end: int, last: int) -> list[int]:
        """True continuations, some of them spoilt; none is true where the draft layer is stale."""
        seen = self._seen(self._pool, g, slot, end)
        context = np.append(seen, last).astype(np.int32)
        stale = not np.array_equal(self._seen(self._draft_pool, g, slot, end), context[1:])
        self.stale_drafts += stale
        drafts = []
        for _ in range(self.limits.num_drafts):
            token = self._sample(g, slot, context, None)
            wrong = stale or zlib.crc32(context.tobytes(), 7) % 8 < self._draft_errors
            drafts.append((token + wrong) % self.limits.vocab_size)
            context = np.append(context, drafts[-1]).astype(np.int32)
        return drafts

    def _sample(self, g: int, slot: int, seen: np.ndarray, mask: np.ndarray | None) -> int:
        seed = self._sampling[g, slot].seed ^ self.params
        return next_token(seen, seed, self.limits.vocab_size, mask)

    def _enter_pages(self, g: int, slot: int, index: int, pages: tuple[int, ...]) -> None:
        self._table[g, slot, index : index + len(pages)] = pages
        self._pages[g, slot] = index + len(pages)

    def _write(self, pool: np.ndarray, g: int, slot: int, start: int, tokens: Any) -> None:
        """Tokens from a position on; beyond the slot's pages they go to scratch."""
        pages, offsets = np.divmod(np.arange(start, start + len(tokens)), self.limits.page_size)
        known = np.minimum(pages, self._table.shape[-1] - 1)
        pool[g, np.where(pages < self._pages[g, slot], self._table[g, slot, known], 0), offsets] = (
            tokens
        )

    def _seen(self, pool: np.ndarray, g: int, slot: int, end: int) -> np.ndarray:
        pages = -(-int(end) // self.limits.page_size)
        return pool[g, self._table[g, slot, :pages]].reshape(-1)[:end]


def _no_logprobs(groups: int, places: int) -> LogprobArrays:
    shape = (groups, places, MAX_LOGPROBS)
    ids = np.full(shape, -1, np.int32)
    return LogprobArrays(np.zeros(shape[:2], np.float32), ids, np.full(shape, -np.inf, np.float32))


def _put_logprobs(
    arrays: LogprobArrays | None, g: int, place: int, seen: np.ndarray, token: int
) -> None:
    assert arrays is not None
    arrays.chosen[g, place] = token_logprob(seen, token)
    others = range(min(MAX_LOGPROBS, 5))
    arrays.top_ids[g, place, : len(others)] = others
    arrays.top[g, place, : len(others)] = [token_logprob(seen, other) for other in others]


def _wanted(result: StepResult, plan: StepPlan) -> StepResult:
    return StepResult(
        result.tokens,
        result.accept_lens,
        result.drafts,
        result.faults,
        result.logprobs if plan.logprobs else None,
        result.prompt_logprobs if plan.prompt_logprobs else None,
    )
