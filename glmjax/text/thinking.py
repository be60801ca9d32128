"""Constraints on an answer that begins with a thought: its length, and a grammar behind it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple

import numpy as np

from glmjax.errors import InvalidRequestError
from glmjax.text.grammar import allows
from glmjax.types import Constraint


class Marks(NamedTuple):
    """Token ids around a thought.

    Attributes:
        think, end: of what begins and ends it.
        line_break: of the line break that may come before.
        blank: of all that may, where it is not a grammar that says: white space, and what is no
            text.
    """

    think: int
    end: int
    line_break: int | None
    blank: frozenset[int] = frozenset()


class Phase(Enum):
    """Where an answer is: before its thought, in it, behind it."""

    BEFORE = auto()
    THOUGHT = auto()
    ANSWER = auto()


class Thinking:
    """A `glmjax.types.Constraint` of an answer that begins with a thought.

    Without `inner` nothing forces the model to think, and it may think again where it has just
    stopped to; a `<think>` behind other text begins no thought.

    Args:
        marks: the tokens around a thought.
        vocab_size: token ids are below it.
        phase: where the prompt leaves the answer; not behind the thought.
        inner: what holds behind the thought; None: nothing. With it a thought must come and end:
            else the model could leave it out, and what holds behind it with it.
        budget: tokens that thoughts may have, between their marks; None: any number.
        ends: tokens that end the answer.
    """

    def __init__(
        self,
        marks: Marks,
        vocab_size: int,
        phase: Phase,
        inner: Constraint | None = None,
        budget: int | None = None,
        ends: Sequence[int] = (),
    ):
        self._marks, self._phase, self._inner = marks, phase, inner
        self._left = budget
        self._any = mask_of(np.arange(vocab_size), vocab_size)
        self._open = self._any if inner is None else self._any & ~mask_of(ends, vocab_size)
        self._begins = mask_of([marks.think], vocab_size)
        self._ends = mask_of([marks.end], vocab_size)
        self._break = mask_of(() if marks.line_break is None else [marks.line_break], vocab_size)

    @property
    def ends(self) -> bool:
        """As `Constraint` has it."""
        return self._inner is not None

    @property
    def over(self) -> bool:
        """As `Constraint` has it."""
        return self._inner is None and self._phase is Phase.ANSWER

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """What may come next, and after each draft, as `Constraint` has it."""
        ahead, rows = copy.copy(self), []
        for i in range(len(drafts) + 1):
            if ahead._phase is Phase.ANSWER and ahead._inner is not None:
                return np.stack([*rows, *ahead._inner.masks(drafts[i:])])
            rows.append(ahead._row())
            if i == len(drafts) or not allows(rows[-1], drafts[i]):
                break
            ahead._step(drafts[i])
        return np.stack(rows)

    def advance(self, tokens: Iterable[int]) -> None:
        """Take in tokens that were generated, as `Constraint` has it."""
        for token in tokens:
            if self._phase is Phase.ANSWER:
                if self._inner is not None:
                    self._inner.advance([token])
            elif allows(self._row(), token):
                self._step(token)
            else:
                raise InvalidRequestError(f"token {token} may not come in or before the thought")

    def _row(self) -> np.ndarray:
        """uint32 [words]; where `inner` does not hold."""
        if self._phase is Phase.BEFORE and self._inner is not None:
            return self._begins | self._break
        if self._phase is Phase.THOUGHT:
            return self._ends if self._left == 0 else self._open
        return self._any

    def _step(self, token: int) -> None:
        """Go on by a token that `_row` allows; what comes behind the thought changes nothing."""
        if self._phase is Phase.THOUGHT:
            self._think(token)
        elif self._phase is Phase.BEFORE:
            self._begin(token)

    def _think(self, token: int) -> None:
        if token == self._marks.end:
            self._phase = Phase.BEFORE if self._inner is None else Phase.ANSWER
        elif self._left is not None:
            self._left -= 1

    def _begin(self, token: int) -> None:
        if token == self._marks.think:
            self._phase = Phase.THOUGHT
        elif token == self._marks.line_break:
            self._break = np.zeros_like(self._break)  # where a thought must come, one is enough
        elif token != self._marks.end and token not in self._marks.blank:
            self._phase = Phase.ANSWER


def mask_of(tokens: Sequence[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    """A row of `Constraint.masks` that allows just these tokens: uint32 [words].

    Those beyond the vocabulary, as a config may name them, are left out.
    """
    bits = np.zeros(-(-vocab_size // 32) * 32, bool)
    ids = np.asarray(tokens, int)
    bits[ids[(ids >= 0) & (ids < vocab_size)]] = True
    return np.packbits(bits, bitorder="little").view(np.uint32)
