"""What an answer is made of: thoughts, text for the reader, and calls of tools."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple


class Reasoning(NamedTuple):
    """More of the thought."""

    text: str


class Content(NamedTuple):
    """More of the text that is meant for the user."""

    text: str


class CallBegin(NamedTuple):
    """A tool is called: the call's place among the answer's, from 0, and the tool's whole name."""

    call: int
    name: str


class CallArguments(NamedTuple):
    """More of a call's arguments; all of them together are a JSON object."""

    call: int
    text: str


Part = Reasoning | Content | CallBegin | CallArguments


@dataclass
class ToolCall:
    """A call: the tool's name, and its arguments as the text of a JSON object."""

    name: str
    arguments: str = ""


@dataclass
class Message:
    """The parts of an answer put together; equal to those of the same answer cut otherwise."""

    reasoning: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)


def message(parts: Iterable[Part]) -> Message:
    """All parts of an answer, in order, as one message."""
    pieces: dict[tuple[type, int], list[str]] = {}
    names: list[str] = []
    for part in parts:
        if isinstance(part, CallBegin):
            names.append(part.name)
        else:
            call = part.call if isinstance(part, CallArguments) else 0
            pieces.setdefault((type(part), call), []).append(part.text)
    whole = {key: "".join(texts) for key, texts in pieces.items()}
    return Message(
        whole.get((Reasoning, 0), ""),
        whole.get((Content, 0), ""),
        [ToolCall(name, whole.get((CallArguments, i), "")) for i, name in enumerate(names)],
    )


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same parts, neighbours of one kind as one."""
    runs = [list(run) for _, run in groupby(parts, _place)]
    return [
        run[0] if isinstance(run[0], CallBegin) else run[0]._replace(text=_text(run))
        for run in runs
    ]


def _place(part: Part) -> tuple[type, int]:
    return type(part), part.call if isinstance(part, CallBegin | CallArguments) else 0


def _text(parts: Iterable[Part]) -> str:
    return "".join(part.text for part in parts if not isinstance(part, CallBegin))
