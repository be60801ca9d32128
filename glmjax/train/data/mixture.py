"""All tasks, how often each one comes, and the generator of each."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial

from glmjax.train.data import arithmetic, english, facts, lines, multi_turn, tool_problems
from glmjax.train.data.problem import Problem, Split

Generator = Callable[[random.Random, Split], Problem]

# Name -> (share of the conversations, generator).
TASKS: dict[str, tuple[float, Generator]] = {
    "add": (0.14, partial(arithmetic.generate, name="add", thinking=True)),
    "subtract": (0.12, partial(arithmetic.generate, name="subtract", thinking=True)),
    "multiply": (0.08, partial(arithmetic.generate, name="multiply", thinking=True)),
    "add_direct": (0.03, partial(arithmetic.generate, name="add", thinking=False)),
    "subtract_direct": (0.03, partial(arithmetic.generate, name="subtract", thinking=False)),
    "multiply_direct": (0.03, partial(arithmetic.generate, name="multiply", thinking=False)),
    "tool_call": (0.20, tool_problems.one_call),
    "tool_two": (0.07, tool_problems.two_calls),
    "tool_answer": (0.09, tool_problems.answer),
    "tool_none": (0.02, tool_problems.no_call),
    "facts": (0.12, facts.generate),
    "copy": (0.04, partial(lines.generate, task="copy")),
    "extract": (0.03, partial(lines.generate, task="extract")),
    "count": (0.03, partial(lines.generate, task="count")),
    "reverse": (0.01, partial(lines.generate, task="reverse")),
    "upper": (0.01, partial(lines.generate, task="upper")),
    "multi_turn": (0.07, multi_turn.generate),
    "english": (0.07, english.generate),
}
WEIGHTS = {name: weight for name, (weight, _) in TASKS.items()}


def draw(
    rng: random.Random,
    split: Split,
    task: str | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> Problem:
    """A problem of `task`, or of any, drawn by the weights.

    Raises:
        KeyError: no such task.
    """
    name = rng.choices([*weights], [*weights.values()])[0] if task is None else task
    return TASKS[name][1](rng, split)
