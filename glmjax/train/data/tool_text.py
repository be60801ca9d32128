"""Reads what the model wrote, strictly: tool calls in GLM's XML, and whether all of it is right."""

from __future__ import annotations

import json
import re
from typing import Any

from glmjax.train.data.problem import Problem

ARGUMENT = r"\n<arg_key>(.*?)</arg_key>\n<arg_value>(.*?)</arg_value>"
CALL = re.compile(rf"\n<tool_call>([^\n<]+)((?:{ARGUMENT})*)\n</tool_call>", re.DOTALL)
THINK_END = "</think>"
CALL_START = "\n<tool_call>"

Calls = list[tuple[str, dict[str, str]]]


def parse_calls(text: str) -> Calls:
    """Names and arguments of the calls in `text`, in order, exactly as the template writes them.

    What stands before the first call is skipped. If anything after that is not a call, or a key
    comes twice in one, there are no calls.
    """
    at = text.find(CALL_START)
    if at < 0:
        return []
    calls: Calls = []
    while at < len(text):
        match = CALL.match(text, at)
        if match is None:
            return []
        pairs = re.findall(ARGUMENT, match[2], re.DOTALL)
        if len(dict(pairs)) < len(pairs):
            return []
        calls.append((match[1], dict(pairs)))
        at = match.end()
    return calls


def score(problem: Problem, text: str) -> bool:
    """Whether `text`, all that the model wrote in its last turn, has exactly the right answer.

    The thought is free. Calls must agree in names, order, keys and the text of every value.
    """
    answer = text.split(THINK_END, 1)[-1]
    gold = problem.messages[-1]
    content = answer.split(CALL_START, 1)[0].strip()
    if content != (gold.get("content") or "").strip():
        return False
    wanted = [_call_text(call["function"]) for call in gold.get("tool_calls") or []]
    return [(name, list(values.items())) for name, values in parse_calls(answer)] == wanted and (
        bool(wanted) or CALL_START not in answer
    )


def _call_text(function: dict[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return function["name"], [(key, value_text(value)) for key, value in arguments.items()]


def value_text(value: Any) -> str:
    """A value as the template writes it: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
