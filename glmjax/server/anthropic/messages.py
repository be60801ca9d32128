"""Conversations of Anthropic's API, and what they are in OpenAI's form.

A user's results of tools become messages of their own before the rest of what the user says. The
assistant's blocks become one message, with a thought, a text and calls.
"""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Generic, NamedTuple, TypeVar

from glmjax.errors import InvalidRequestError
from glmjax.server.anthropic.blocks import (
    Block,
    Message,
    Reference,
    Text,
    Thought,
    ToolResult,
    ToolUse,
    joined,
)
from glmjax.server.anthropic.results import Functions, result_text

# Claude Code begins its system prompt with this line, which is new each time. It is meant for who
# bills, not for the model, and behind it no prefix would be found in the cache.
BILLING = "x-anthropic-billing-header:"

# Claude Code's notes to the model begin with this. In a turn with results of tools they are told
# with these: as a message of the user's they would begin a new turn, and templates leave out the
# thoughts before it, on which the loop of tools goes on and which the cache holds. So is what it
# says beside tools that were found, and so are files, of a tool that read them, unless the user
# says something too.
REMINDER = "<system-reminder>"

# How errors about messages and tools in OpenAI's form begin, and the client's names of their parts.
PLACE = re.compile(r"(messages\[\d+\](?:\.tool_calls\[\d+\])?|tools\[\d+\])(\.function\.\w+)?")
PARTS = {".function.arguments": ".input", ".function.name": ".name"}
PARTS |= {".function.parameters": ".input_schema"}

ChatMessage = dict[str, Any]
Origins = dict[str, str]  # place in the converted conversation -> place in the client's


B = TypeVar("B", bound=Block)
# A message, where it comes from, and where each of its calls does.
Made = list[tuple[str, ChatMessage, list[str]]]


class Said(NamedTuple, Generic[B]):
    """A block, and where the client has it: its message, and its own place."""

    role: str
    message: str
    where: str
    block: B


def conversation(
    messages: Sequence[Message], system: str | Sequence[Text] | None, tools: Functions
) -> tuple[list[ChatMessage], Origins]:
    """A conversation in OpenAI's form, and where each part of it comes from.

    Args:
        messages: of the client.
        system: the system prompt.
        tools: in OpenAI's form, by their names, for results that refer to them.

    Raises:
        InvalidRequestError: nobody says anything, calls share an id, the results of tools are not
            those of the calls before them, or they refer to tools that there are not.
    """
    made, shown = _instructions(system), set[str]()
    calls: dict[str, Said[ToolUse]] = {}
    for role, group in groupby(_said(messages), key=lambda said: said.role):
        turn = list(group)
        results = _results(turn, calls)
        calls = _calls(turn)
        made += _told(results, _notes(turn), tools, shown) + TURNS[role](turn)
    _results([], calls)
    if not any(message["role"] != "system" for _, message, _ in made):
        found = "no message but the system's has content" if messages else "messages is empty"
        raise InvalidRequestError(f"{found}; send at least one message", "messages")
    origins = {f"messages[{i}]": where for i, (where, _, _) in enumerate(made)}
    for i, (_, _, places) in enumerate(made):
        origins |= {f"messages[{i}].tool_calls[{j}]": place for j, place in enumerate(places)}
    return [message for _, message, _ in made], origins


@contextlib.contextmanager
def in_places(origins: Origins) -> Iterator[None]:
    """Make errors about a converted conversation name the places in the client's."""
    try:
        yield
    except InvalidRequestError as error:
        found = PLACE.match(str(error))
        if error.param not in ("messages", "tools") or found is None:
            raise
        place, part = found.groups("")
        own = origins.get(place, place) + PARTS.get(part, part)
        raise type(error)(own + str(error)[found.end() :], error.param) from None


def _said(messages: Iterable[Message]) -> Iterator[Said]:
    for i, message in enumerate(messages):
        where, content = f"messages[{i}]", message.content
        if isinstance(content, str):
            yield Said(message.role, where, where, Text(type="text", text=content))
            continue
        for j, block in enumerate(content):
            yield Said(message.role, where, f"{where}.content[{j}]", block)


def _calls(turn: Sequence[Said]) -> dict[str, Said[ToolUse]]:
    """The calls of a turn by their ids, which results will name."""
    calls: dict[str, Said[ToolUse]] = {}
    for said in _of(ToolUse, turn):
        first = calls.setdefault(said.block.id, said)
        if first is not said:
            raise InvalidRequestError(
                f"{said.where}.id is {said.block.id!r}, but so is that of {first.where}; send "
                "each tool_use with an id of its own",
                "messages",
            )
    return calls


def _results(turn: Sequence[Said], calls: Mapping[str, Said[ToolUse]]) -> list[Said[ToolResult]]:
    """Results in the order of the calls, as the model has nothing else to tell them apart."""
    found: dict[str, Said[ToolResult]] = {}
    for said in _of(ToolResult, turn):
        name = said.block.tool_use_id
        if name not in calls:
            raise _stray(said, "the assistant's message before it has no tool_use with this id")
        if name in found:
            raise _stray(said, f"that call has its result already, in {found[name].where}")
        found[name] = said
    for name, said in calls.items():
        if name not in found:
            raise InvalidRequestError(
                f"{said.where}: the tool_use {name!r} has no result; send a tool_result in the "
                "user's message behind it",
                "messages",
            )
    return [found[name] for name in calls]


def _stray(said: Said[ToolResult], fault: str) -> InvalidRequestError:
    words = f"{said.where}.tool_use_id is {said.block.tool_use_id!r}, but {fault}"
    return InvalidRequestError(words, "messages")


def _told(
    results: Sequence[Said[ToolResult]], notes: Sequence[Said], tools: Functions, shown: set[str]
) -> Made:
    """Messages of tools, each with the notes that are told with it: the last beside them is."""
    last = {said.message: said.where for said in results}
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for note in notes:
        texts[last.get(note.message, results[-1].where)].append(note.block.text)
    made: Made = []
    for said in results:
        text = result_text(said.block, said.where, tools, shown)
        content = "\n".join([text, *texts[said.where]])
        tool = {"role": "tool", "tool_call_id": said.block.tool_use_id, "content": content}
        made.append((said.where, tool, []))
    return made


def _notes(turn: Sequence[Said]) -> list[Said]:
    """What is told with results rather than by the user: reminders, and files without a word."""
    results = _of(ToolResult, turn)
    if not results:
        return []
    finding = {said.message for said in results if _finds(said.block)}
    beside = _readable(turn)
    texts = _of(Text, beside)
    spoken = [it for it in texts if not _is_reminder(it) and it.message not in finding]
    if not spoken:
        return beside
    words = {said.where for said in spoken}
    return [said for said in texts if said.where not in words]


def _is_reminder(said: Said[Text]) -> bool:
    return said.block.text.lstrip().startswith(REMINDER)


def _finds(result: ToolResult) -> bool:
    """Whether it is made of tools that were found."""
    inner = result.content if isinstance(result.content, list) else ()
    return bool(inner) and all(isinstance(block, Reference) for block in inner)


def _readable(turn: Sequence[Said]) -> list[Said]:
    """All but results; where there are some, blank texts would begin a new turn for nothing."""
    blank = {said.where for said in _of(Text, turn) if not said.block.text.strip()}
    left_out = blank if _of(ToolResult, turn) else ()
    others = [said for said in turn if not isinstance(said.block, ToolResult)]
    return [said for said in others if said.where not in left_out]


def _of(kind: type[B], turn: Iterable[Said[Any]]) -> list[Said[B]]:
    return [said for said in turn if isinstance(said.block, kind)]


def _others(turn: Sequence[Said]) -> Made:
    """Messages of the user, or instructions: as many as the client has."""
    made: Made = []
    told = {said.where for said in _notes(turn)}
    texts = [said for said in _readable(turn) if said.where not in told]
    for where, group in groupby(texts, key=lambda said: said.message):
        content = joined(said.block for said in group)
        made.append((where, {"role": turn[0].role, "content": content}, []))
    return made


def _assistant(turn: Sequence[Said]) -> Made:
    """One message, over however many the client has spread the turn."""
    calls = _of(ToolUse, turn)
    thought = "\n".join(said.block.text for said in _of(Thought, turn))
    message: ChatMessage = {"role": "assistant", "content": _spoken(turn)}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [_call(said.block) for said in calls]
    return [(turn[0].message, message, [said.where for said in calls])]


def _spoken(turn: Sequence[Said]) -> str:
    """The texts of a turn: one goes on in the next, unless a block of another kind parts them."""
    runs = groupby(turn, key=lambda said: isinstance(said.block, Text))
    texts = ["".join(said.block.text for said in run) for is_text, run in runs if is_text]
    return "\n".join(filter(None, texts))


def _call(block: ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _instructions(system: str | Sequence[Text] | None) -> Made:
    """The system prompt; one without text would only be an empty turn."""
    blocks = system if isinstance(system, str) else _without_billing(system or ())
    content = joined(blocks)
    return [("system", {"role": "system", "content": content}, [])] if content else []


def _without_billing(blocks: Sequence[Text]) -> list[Text]:
    return [block for block in blocks if not block.text.startswith(BILLING)]


TURNS = {"user": _others, "assistant": _assistant, "system": _others}
