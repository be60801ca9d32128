"""A runner with no device: deterministic tokens, real page tables. Drives tests and load tests.

It keeps a pool of token ids in place of keys and values, and samples a hash of all that a sequence
sees through its page table. A page handed to two sequences, freed too early or never written
changes tokens, as it would on a device.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmjax.errors import ConfigError
from glmjax.types import Limits, Row, StepPlan, StepResult


def next_token(tokens: np.ndarray, seed: int, vocab_size: int) -> int:
    """The token that follows `tokens` int32 [n]: a hash of them, of `seed` and of the length."""
    return zlib.crc32(tokens.astype("<i4").tobytes(), seed) % vocab_size


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
        vocab_size: tokens are below it.

    Attributes:
        launched: steps so far.
        params: an int in place of weights, 0 at first; sampled tokens depend on it as on a seed.
    """

    def __init__(self, limits: Limits, vocab_size: int = 512):
        self.limits = limits
        self.launched = 0
        self.params = 0
        self._vocab_size = vocab_size
        groups = limits.groups
        self._pool = np.full((groups, limits.pages, limits.page_size), -1, np.int32)
        self._table = np.zeros((groups, limits.slots, limits.pages_per_seq), np.int32)
        self._lens = np.zeros((groups, limits.slots), np.int32)
        self._last = np.zeros((groups, limits.slots), np.int32)

    def launch(self, plan: StepPlan) -> FakeHandle:
        """Run a step at once."""
        if plan.bucket not in (*self.limits.decode_buckets, *self.limits.prefill_buckets):
            raise KeyError(f"bucket {plan.bucket} was not compiled")
        self.launched += 1
        shape = (self.limits.groups, plan.bucket.rows)
        tokens, accepted = np.zeros((*shape, 1), np.int32), np.zeros(shape, np.int32)
        for g, rows in enumerate(plan.groups):
            self._check_shape(plan, rows)
            for r, row in enumerate(rows):
                token = self._run(g, row)
                tokens[g, r, 0], accepted[g, r] = token, int(row.sample)
        return FakeHandle(StepResult(tokens, accepted))

    def update_params(self, params: Any) -> None:
        """Sample with other weights: any int. Raises ConfigError for anything else."""
        if not isinstance(params, int):
            raise ConfigError(f"params are {type(params).__name__}; a fake runner takes an int")
        self.params = params

    def _check_shape(self, plan: StepPlan, rows: tuple[Row, ...]) -> None:
        lens = [row.q_len for row in rows]
        bounds = (len(rows), sum(lens), max(lens, default=0))
        if any(n > bound for n, bound in zip(bounds, plan.bucket, strict=True)):
            raise ValueError(f"{bounds} rows, tokens, longest exceed {plan.bucket}")

    def _run(self, group: int, row: Row) -> int:
        table = self._table[group, row.slot]
        table[row.page_index : row.page_index + len(row.new_pages)] = row.new_pages
        start = self._lens[group, row.slot] if row.start < 0 else row.start
        query = (
            self._last[group, row.slot : row.slot + 1] if row.token_ids is None else row.token_ids
        )
        positions = np.arange(start, start + row.q_len)
        pages, offsets = np.divmod(positions, self.limits.page_size)
        self._pool[group, table[pages], offsets] = query
        self._lens[group, row.slot] = end = start + row.q_len
        seen = self._pool[group, table].reshape(-1)[:end]
        token = next_token(seen, row.sampling.seed ^ self.params, self._vocab_size)
        if row.sample:
            self._last[group, row.slot] = token
        return token
