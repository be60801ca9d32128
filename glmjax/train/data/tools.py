"""Tools composed from the tables, what they are asked for, and how a call of them looks."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from glmjax.train.data import words
from glmjax.train.data.problem import Message, Split
from glmjax.train.data.splits import redraw, split_of
from glmjax.train.data.tool_tables import JOINS, KINDS, OPENERS, SUBJECTS, Kind, Subject

# Weights of 0, 1, 2 and 3 parameters.
PARAMETER_COUNTS = (0.2, 0.4, 0.28, 0.12)
# Of all tools of a conversation together: what keeps it short.
MAX_PARAMETERS = 7
MADE_UP_TOPICS = 0.15
# Words that every readable name has one of.
READABLE = {word for subject in SUBJECTS for name in subject.names for word in name.split("_")} - {
    "{t}"
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of one tool; an enum has its options in the order of the schema."""

    kind: Kind
    options: tuple[str, ...]


@dataclass(frozen=True)
class Tool:
    """A tool as offered to the model."""

    name: str
    topic: str
    subject: Subject
    description: str
    parameters: tuple[Parameter, ...]

    def schema(self) -> dict[str, Any]:
        """In OpenAI's form; every parameter is required."""
        properties = {p.kind.name: _property(p) for p in self.parameters}
        shape = {"type": "object", "properties": properties, "required": list(properties)}
        function = {"name": self.name, "description": self.description, "parameters": shape}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """A call with its arguments, in the order of the schema."""

    tool: Tool
    arguments: dict[str, Any]

    def key(self) -> str:
        """What the split is decided by."""
        return f"{self.tool.name} {json.dumps(self.arguments)}"


def draw_tools(rng: random.Random, count: int, split: Split) -> list[Tool]:
    """Tools with distinct topics and names; made-up names are of `split`."""
    found: dict[str, Tool] = {}
    names: set[str] = set()
    while len(found) < count:
        left = MAX_PARAMETERS - sum(len(tool.parameters) for tool in found.values())
        tool = _tool(rng, left, split)
        if tool.topic not in found and tool.name not in names:
            found[tool.topic] = tool
            names.add(tool.name)
    return list(found.values())


def is_made_up(name: str, split: Split = "held_out") -> bool:
    """Whether a tool's name is none of the tables', and of `split`."""
    return split_of(name) == split and not READABLE.intersection(name.split("_"))


def draw_call(rng: random.Random, tool: Tool) -> Call:
    """Random arguments for every parameter."""
    return Call(tool, {p.kind.name: _value(rng, p) for p in tool.parameters})


def request(rng: random.Random, calls: Sequence[Call]) -> str:
    """What a user says who wants these calls, in this order."""
    needs = [_need(rng, call) for call in calls]
    if len(calls) == 1 and calls[0].tool.subject is SUBJECTS[0] and rng.random() < 0.25:
        opener, need = rng.choice(("What is the ", "What's the ", "")), _short(rng, calls[0])
        text, end = opener + need, "?"
    else:
        opener = rng.choice(OPENERS)
        text = opener + rng.choice(JOINS).join(needs)
        end = "?" if opener.endswith("you ") and opener[0] in "CW" else rng.choice((".", ".", ""))
    return text[0].upper() + text[1:] + end


def thought(calls: Sequence[Call]) -> str:
    """Which tool each topic leads to."""
    return "\n".join(f"{call.tool.topic} -> {call.tool.name}" for call in calls)


def call_message(calls: Sequence[Call], thinking: bool) -> Message:
    """The assistant's message that makes these calls."""
    made = [
        {
            "type": "function",
            "id": f"call_{i}",
            "function": {"name": call.tool.name, "arguments": call.arguments},
        }
        for i, call in enumerate(calls)
    ]
    message: Message = {"role": "assistant", "content": "", "tool_calls": made}
    return message | ({"reasoning_content": thought(calls)} if thinking else {})


def _tool(rng: random.Random, max_parameters: int, split: Split) -> Tool:
    subject = rng.choice(SUBJECTS)
    topic = words.word(rng) if rng.random() < MADE_UP_TOPICS else rng.choice(subject.topics)
    readable = rng.random() < 0.5
    name = rng.choice(subject.names).format(t=topic) if readable else _made_up_name(rng, split)
    description = rng.choice(subject.descriptions).format(t=topic)
    count = min(max_parameters, rng.choices(range(4), PARAMETER_COUNTS)[0])
    return Tool(name, topic, subject, description, _parameters(rng, count))


def _made_up_name(rng: random.Random, split: Split) -> str:
    """A name that only conversations of `split` know."""

    def name() -> str:
        return "_".join(words.syllables(rng, rng.randint(1, 2)) for _ in range(rng.randint(1, 2)))

    return redraw(split, name, str)


def _parameters(rng: random.Random, count: int) -> tuple[Parameter, ...]:
    return tuple(
        Parameter(kind, tuple(rng.sample(kind.options, rng.randint(2, len(kind.options)))))
        if kind.options
        else Parameter(kind, ())
        for kind in rng.sample(KINDS, count)
    )


def _property(parameter: Parameter) -> dict[str, Any]:
    options = {"enum": list(parameter.options)} if parameter.options else {}
    return {"type": parameter.kind.type} | options


def _value(rng: random.Random, parameter: Parameter) -> Any:
    if parameter.options:
        return rng.choice(parameter.options)
    if parameter.kind.type == "boolean":
        return rng.random() < 0.5
    assert parameter.kind.value is not None
    return parameter.kind.value(rng)


def _need(rng: random.Random, call: Call) -> str:
    need = rng.choice(call.tool.subject.needs).format(t=call.tool.topic)
    return " ".join([need, *_details(rng, call)])


def _short(rng: random.Random, call: Call) -> str:
    return " ".join([call.tool.topic, *_details(rng, call)])


def _details(rng: random.Random, call: Call) -> list[str]:
    """The arguments in words, not always in the order of the schema."""
    details = [_detail(rng, p.kind, call.arguments[p.kind.name]) for p in call.tool.parameters]
    if rng.random() < 0.3:
        rng.shuffle(details)
    return details


def _detail(rng: random.Random, kind: Kind, value: Any) -> str:
    if kind.type == "boolean":
        return kind.wordings[0 if value else 1]
    return rng.choice(kind.wordings).format(v=value)
