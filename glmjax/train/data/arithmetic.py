"""Addition, subtraction and multiplication, worked out column by column or answered at once."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from glmjax.train.data.problem import Exchange, Problem, Split, conversation
from glmjax.train.data.splits import redraw, split_of
from glmjax.train.data.words import number


@dataclass(frozen=True)
class Operation:
    """One of the three operations.

    Attributes:
        sign: in the steps and in the key.
        max_digits: of both operands when steps are shown.
        direct_digits: of both operands when they are not; fewer, as there is no room to carry.
        wordings: with {a} and {b}.
    """

    sign: str
    max_digits: tuple[int, int]
    direct_digits: tuple[int, int]
    wordings: tuple[str, ...]


OPERATIONS = {
    "add": Operation(
        "+",
        (4, 4),
        (4, 4),
        (
            "What is {a} + {b}?",
            "{a}+{b}",
            "{a} + {b}",
            "Add {a} and {b}.",
            "Compute {a} plus {b}.",
            "{a} plus {b}",
            "What is {a} plus {b}?",
            "What is the sum of {a} and {b}?",
            "Calculate {a} + {b}.",
            "How much is {a} + {b}?",
            "{a} + {b} = ?",
            "{a}+{b}=",
            "Sum {a} and {b}.",
            "Please add {a} to {b}.",
            "What's {a}+{b}?",
        ),
    ),
    "subtract": Operation(
        "-",
        (4, 4),
        (4, 4),
        (
            "What is {a} - {b}?",
            "{a}-{b}",
            "{a} - {b}",
            "Subtract {b} from {a}.",
            "Compute {a} minus {b}.",
            "{a} minus {b}",
            "What is {a} minus {b}?",
            "Take {b} away from {a}.",
            "Calculate {a} - {b}.",
            "How much is {a} - {b}?",
            "{a} - {b} = ?",
            "{a}-{b}=",
            "What is the difference of {a} and {b}?",
            "What's {a}-{b}?",
        ),
    ),
    "multiply": Operation(
        "*",
        (3, 1),
        (3, 1),
        (
            "What is {a} * {b}?",
            "{a}*{b}",
            "{a} * {b}",
            "Multiply {a} by {b}.",
            "Compute {a} times {b}.",
            "{a} times {b}",
            "What is {a} times {b}?",
            "What is the product of {a} and {b}?",
            "Calculate {a} * {b}.",
            "How much is {a} * {b}?",
            "{a} * {b} = ?",
            "{a}*{b}=",
            "{a} x {b}",
            "What's {a}*{b}?",
        ),
    ),
}


def exchange(rng: random.Random, split: Split, name: str, thinking: bool) -> Exchange:
    """One question: its operands are of `split` whatever the wording."""
    operation = OPERATIONS[name]
    digits = operation.max_digits if thinking else operation.direct_digits
    a, b = redraw(split, lambda: _operands(rng, name, digits), lambda pair: key(name, *pair))
    user = rng.choice(operation.wordings).format(a=a, b=b)
    return Exchange(user, steps(name, a, b), str(result(name, a, b)))


def generate(rng: random.Random, split: Split, name: str, thinking: bool) -> Problem:
    """A problem of one question; `name` is a key of OPERATIONS."""
    task = name if thinking else f"{name}_direct"
    return conversation(task, [exchange(rng, split, name, thinking)], thinking)


def key(name: str, a: int, b: int) -> str:
    """What the split is decided by; the same for a+b and b+a."""
    first, second = (a, b) if name == "subtract" else (max(a, b), min(a, b))
    return f"{first}{OPERATIONS[name].sign}{second}"


def in_split(name: str, a: int, b: int, split: Split) -> bool:
    """Whether these operands belong to `split`."""
    return split_of(key(name, a, b)) == split


def result(name: str, a: int, b: int) -> int:
    """The value of the operation."""
    return {"add": a + b, "subtract": a - b, "multiply": a * b}[name]


def steps(name: str, a: int, b: int) -> str:
    """The columns worked out, least significant digit first.

    A line is `digit sign digit sign carry = carry digit`, then the result so far; the first line
    holds the operands reversed.
    """
    if name == "multiply":
        first, second = str(a)[::-1], str(b)
        columns = [(int(digit), b) for digit in first]
    else:
        width = max(len(str(a)), len(str(b)))
        first, second = (f"{value:0{width}}"[::-1] for value in (a, b))
        columns = [(int(one), int(two)) for one, two in zip(first, second, strict=True)]
    head = f"{first}{OPERATIONS[name].sign}{second}"
    return "\n".join([head, *_column_lines(name, columns)])


def _column_lines(name: str, columns: list[tuple[int, int]]) -> Iterable[str]:
    carry, so_far = 0, ""
    for one, two in columns:
        line, carry, so_far = _column(name, one, two, carry, so_far)
        yield line
    if carry:
        last = columns[-1][1] if name == "multiply" else 0
        yield _column(name, 0, last, carry, so_far)[0]


def _column(name: str, one: int, two: int, carry: int, so_far: str) -> tuple[str, int, str]:
    """The line, the carry out of the column, and the result so far."""
    if name == "add":
        total, text = one + two + carry, f"{one}+{two}+{carry}"
    elif name == "multiply":
        total, text = one * two + carry, f"{one}*{two}+{carry}"
    else:
        total, text = one - two - carry, f"{one}-{two}-{carry}"
    out, digit = (int(total < 0), total % 10) if name == "subtract" else divmod(total, 10)
    so_far = f"{digit}{so_far}"
    return f"{text}={out}{digit} {so_far}", out, so_far


def _operands(rng: random.Random, name: str, digits: tuple[int, int]) -> tuple[int, int]:
    a, b = number(rng, digits[0]), number(rng, digits[1])
    return (b, a) if name == "subtract" and a < b else (a, b)
