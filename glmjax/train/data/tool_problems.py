"""Conversations with tools: one call, two calls, an answer from a result, and no call at all."""

from __future__ import annotations

import json
import random
from typing import Any

from glmjax.train.data import arithmetic, english, tools, words
from glmjax.train.data.problem import Message, Problem, Split, conversation
from glmjax.train.data.splits import split_of
from glmjax.train.data.tool_text import value_text
from glmjax.train.data.tools import Call, Tool

# Weights of 1 to 4 tools offered.
TOOL_COUNTS = (0.25, 0.3, 0.25, 0.2)
_STATES = "sunny rainy cloudy cold warm open closed full empty late early ready busy free"
STATES = tuple(_STATES.split())
# Keys of a result that hold its value, besides the topic itself.
VALUE_KEYS = ("value", "result", "answer")
# Keys of a result that say how an action went, and the sentence about it.
OUTCOMES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"status": "ok"}, "The {t} is done."),
    ({"ok": True}, "The {t} is done."),
    ({"status": "failed"}, "The {t} failed."),
    ({"ok": False}, "The {t} failed."),
    ({"error": "not found"}, "The {t} was not found."),
)


def one_call(rng: random.Random, split: Split) -> Problem:
    """Exactly one of 1 to 4 tools does what is asked."""
    offered, calls = _calls(rng, split, 1, rng.choices((1, 2, 3, 4), TOOL_COUNTS)[0])
    return _problem(rng, "tool_call", offered, calls)


def two_calls(rng: random.Random, split: Split) -> Problem:
    """Two needs in one request, two calls in one message."""
    offered, calls = _calls(rng, split, 2, rng.choices((2, 3, 4), (0.5, 0.3, 0.2))[0])
    return _problem(rng, "tool_two", offered, calls)


def answer(rng: random.Random, split: Split) -> Problem:
    """A call, its result, and a sentence that says it."""
    offered, calls = _calls(rng, split, 1, rng.choices((1, 2, 3), (0.6, 0.25, 0.15))[0])
    problem = _problem(rng, "tool_answer", offered, calls)
    result, sentence = _result(rng, calls[0])
    final: Message = {"role": "assistant", "content": sentence}
    if problem.thinking:
        final["reasoning_content"] = f"{calls[0].tool.topic}: {_said(result)}"
    observed = {"role": "tool", "tool_call_id": "call_0", "content": json.dumps(result)}
    messages = (*problem.messages, observed, final)
    return Problem("tool_answer", messages, problem.tools, problem.thinking)


def no_call(rng: random.Random, split: Split) -> Problem:
    """Tools are offered, but what is asked needs none."""
    offered = tools.draw_tools(rng, rng.randint(1, 3), split)
    thinking = rng.random() < 0.5
    if rng.random() < 0.6:
        exchange = english.exchange(rng, split, thinking)
    else:
        operation = rng.choice(list(arithmetic.OPERATIONS))
        exchange = arithmetic.exchange(rng, split, operation, thinking)
    schemas = [tool.schema() for tool in offered]
    return conversation("tool_none", [exchange], thinking, tools=schemas)


def _said(result: dict[str, Any]) -> str:
    return value_text(next(iter(result.values())))


def _calls(
    rng: random.Random, split: Split, wanted: int, offered: int
) -> tuple[list[Tool], list[Call]]:
    """The tools offered and the calls wanted, each of which is of the split."""
    while True:
        found = tools.draw_tools(rng, offered, split)
        calls = [tools.draw_call(rng, tool) for tool in rng.sample(found, wanted)]
        if all(split_of(call.key()) == split for call in calls):
            return found, calls


def _problem(rng: random.Random, task: str, offered: list[Tool], calls: list[Call]) -> Problem:
    thinking = rng.random() < 0.5
    user: Message = {"role": "user", "content": tools.request(rng, calls)}
    messages = (user, tools.call_message(calls, thinking))
    return Problem(task, messages, tuple(tool.schema() for tool in offered), thinking)


def _result(rng: random.Random, call: Call) -> tuple[dict[str, Any], str]:
    """What the tool returns, with one key, and the sentence about it."""
    topic = call.tool.topic
    if rng.random() < 0.3:
        result, sentence = rng.choice(OUTCOMES)
        return dict(result), sentence.format(t=topic)
    makers = (lambda r: r.choice(STATES), words.word, words.name, lambda r: words.number(r, 4))
    value = rng.choice(makers)(rng)
    key = topic if rng.random() < 0.5 else rng.choice(VALUE_KEYS)
    return {key: value}, f"The {topic} is {value}."
