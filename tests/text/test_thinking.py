"""Thoughts that are held to a length, with grammars behind them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling import BYTE_IDS, TAG_IDS, TAGGED, read

from glmjax.errors import InvalidRequestError
from glmjax.text.grammar import Grammars, GrammarSpec, allows
from glmjax.text.lexer import Tag
from glmjax.text.reader import Opening, Reading
from glmjax.text.thinking import Marks, Phase, Thinking, mask_of

VOCAB = 1040  # with padding
ENDS = [TAGGED.token_id(name) for name in ("<|endoftext|>", "<|user|>", "<|observation|>")]
GRAMMARS = Grammars(TAGGED, VOCAB, tuple(ENDS))
THINK, END, BREAK = TAG_IDS[Tag.THINK], TAG_IDS[Tag.END_THINK], BYTE_IDS[10]
SPACE = BYTE_IDS[32]
MARKS = Marks(THINK, END, BREAK, frozenset([BREAK, SPACE]))
A, B = BYTE_IDS[ord("a")], BYTE_IDS[ord("b")]
# Tokens as letters, for regular expressions: T and E are a thought's marks, X ends the answer.
TOKENS = {"T": THINK, "E": END, "N": BREAK, "X": ENDS[1], "a": A, "b": B, "S": SPACE}
BEHIND = GrammarSpec("regex", "(a|b)+")

words = st.text("TENXab", max_size=14) | st.text("TENaaab", max_size=14)
budgets = st.none() | st.integers(0, 4)
phases = st.sampled_from([Phase.BEFORE, Phase.THOUGHT])


def thinking(
    phase: Phase = Phase.BEFORE,
    budget: int | None = None,
    grammar: GrammarSpec | None = None,
    line_break: int | None = BREAK,
    ends: Sequence[int] = ENDS,
) -> Thinking:
    inner = grammar and GRAMMARS.constraint(grammar)
    return Thinking(MARKS._replace(line_break=line_break), VOCAB, phase, inner, budget, ends)


def allowed(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def taken(constraint: Thinking, tokens: Sequence[int]) -> int:
    """How many tokens are allowed, one after another."""
    for n, token in enumerate(tokens):
        if not allows(constraint.masks(())[0], token):
            with pytest.raises(InvalidRequestError):
                constraint.advance([token])
            return n
        constraint.advance([token])
    return len(tokens)


def longest(pattern: str, word: str) -> int:
    """Length of the longest beginning of a word that a pattern matches."""
    return max(n for n in range(len(word) + 1) if re.fullmatch(pattern, word[:n]))


def ids_of(word: str) -> list[int]:
    return [TOKENS[letter] for letter in word]


@given(words, phases, budgets)
@example("NTaaEabX", Phase.BEFORE, 2)
@example("NNT", Phase.BEFORE, None)
@example("EabX", Phase.THOUGHT, 0)
def test_a_thought_comes_and_ends_before_a_grammar(word: str, phase: Phase, budget: int | None):
    thought = f"[^EX]{{0,{'' if budget is None else budget}}}(E([ab]+X*)?)?"
    pattern = thought if phase is Phase.THOUGHT else f"N?(T{thought})?"
    constraint = thinking(phase, budget, BEHIND)
    assert taken(constraint, ids_of(word)) == longest(pattern, word)


@given(st.text("TENSaaab", max_size=14), phases, st.integers(0, 4))
@example("TaaETa", Phase.BEFORE, 2)
@example("NNTaaa", Phase.BEFORE, 2)
@example("aTaaaa", Phase.BEFORE, 2)
@example("SNSTaaa", Phase.BEFORE, 2)
def test_a_budget_alone_bounds_what_is_read_as_thought(word: str, phase: Phase, budget: int):
    opening = Opening(in_thought=phase is Phase.THOUGHT)
    ids = ids_of(word)
    counts = [read(ids[: n + 1], Reading(), opening).reasoning_tokens for n in range(len(ids))]
    within = [count <= budget for count in counts]
    constraint = thinking(phase, budget)
    assert taken(constraint, ids) == (within.index(False) if False in within else len(ids))


def test_a_budget_alone_never_forces_a_thought():
    constraint = thinking(budget=0)
    assert allowed(constraint.masks(())[0]) == list(range(VOCAB))
    constraint.advance([A, THINK, A])
    assert allowed(constraint.masks(())[0]) == list(range(VOCAB))
    constraint = thinking(Phase.THOUGHT, 1)
    constraint.advance([ENDS[0]])  # it may end in a thought, too
    assert allowed(constraint.masks(())[0]) == [END]


def test_where_it_is_over():
    constraint = thinking(budget=2)
    for token, over in ((BREAK, False), (THINK, False), (A, False), (END, False), (A, True)):
        constraint.advance([token])
        assert constraint.over is over
    assert not constraint.ends
    held = thinking(grammar=BEHIND)
    held.advance([THINK, END, A])
    assert (held.ends, held.over) == (True, False)


def test_what_may_come_around_a_thought_before_a_grammar():
    constraint = thinking(budget=1, grammar=BEHIND)
    steps = [
        (sorted([BREAK, THINK]), BREAK),
        ([THINK], THINK),
        ([i for i in range(VOCAB) if i not in ENDS], A),
        ([END], END),
    ]
    for expected, token in steps:
        assert allowed(constraint.masks(())[0]) == expected
        constraint.advance([token])
    assert np.array_equal(constraint.masks(()), GRAMMARS.constraint(BEHIND).masks(()))


def test_without_a_token_for_the_line_break():
    assert allowed(thinking(grammar=BEHIND, line_break=None).masks(())[0]) == [THINK]


@pytest.mark.parametrize("spec", [BEHIND, GrammarSpec("json_object"), None])
@settings(max_examples=60)
@given(word=words, drafts=words, phase=phases, budget=budgets)
@example(word="", drafts="NTaaEabX", phase=Phase.BEFORE, budget=2)
@example(word="TaE", drafts="abX", phase=Phase.BEFORE, budget=None)
@example(word="Ta", drafts="EabbT", phase=Phase.BEFORE, budget=1)
def test_drafts_are_as_steps(spec: Any, word: str, drafts: str, phase: Phase, budget: int | None):
    ahead, steps = thinking(phase, budget, spec), thinking(phase, budget, spec)
    done = ids_of(word)[: taken(thinking(phase, budget, spec), ids_of(word))]
    ahead.advance(done)
    steps.advance(done)
    expected = [steps.masks(())[0]]
    for draft in ids_of(drafts):
        if not allows(expected[-1], draft):
            break
        steps.advance([draft])
        expected.append(steps.masks(())[0])
    got = ahead.masks(ids_of(drafts))
    assert (got.dtype, got.shape) == (np.uint32, (len(expected), -(-VOCAB // 32)))
    assert np.array_equal(got, np.stack(expected))
    assert np.array_equal(ahead.masks(())[0], expected[0]), "masks changed the state"


def test_end_tokens_that_the_vocabulary_does_not_have():
    constraint = thinking(Phase.THOUGHT, grammar=BEHIND, ends=[-1, VOCAB, VOCAB + 10**6, A])
    assert allowed(constraint.masks(())[0]) == [i for i in range(VOCAB) if i != A]


@given(st.lists(st.integers(-5, 80)), st.integers(1, 70))
def test_masks_of_tokens(tokens: list[int], size: int):
    row = mask_of(tokens, size)
    assert (row.dtype, row.shape) == (np.uint32, (-(-size // 32),))
    assert allowed(row) == sorted({token for token in tokens if 0 <= token < size})
