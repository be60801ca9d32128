"""Conversations of Anthropic's API, and what they are in OpenAI's form.

A user's results of tools become messages of their own before the rest of what the user says. The
assistant's blocks become one message, with a thought, a text and calls.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag
from pydantic_core import PydanticCustomError

from glmjax.errors import InvalidRequestError

# Claude Code begins its system prompt with this line, which is new each time. It is meant for who
# bills, not for the model, and behind it no prefix would be found in the cache.
BILLING = "x-anthropic-billing-header:"

# The names of things in errors about messages, in OpenAI's form.
PLACES = re.compile(r"messages\[\d+\](?:\.tool_calls\[\d+\])?")
PARTS = {"function.arguments": "input", "function.name": "name"}
PARTS |= {"function.parameters": "input_schema"}

ChatMessage = dict[str, Any]
Origins = dict[str, str]  # place in the converted conversation -> place in the client's


def only(field: str, *kinds: str | None) -> BeforeValidator:
    """Refuse an object whose `field` is none of `kinds`, and say which are served."""

    def check(value: Any) -> Any:
        kind = value.get(field) if isinstance(value, dict) else None
        if kind not in kinds:
            expected = ", ".join(str(kind) for kind in kinds if kind)
            words = "{field} is {kind}, but only these are served: {expected}"
            context = {"field": field, "kind": reprlib.repr(kind), "expected": expected}
            raise PydanticCustomError("kind", words, context)
        return value

    return BeforeValidator(check)


def by(field: str) -> Discriminator:
    """Tell objects that passed `only` apart, by tags in <>: no field of theirs has such a name."""
    return Discriminator(lambda it: f"<{it[field]}>")


class Block(BaseModel):
    """A piece of a message. Marks for a cache mean nothing: all prefixes are cached here."""

    model_config = ConfigDict(extra="forbid")


class Text(Block):
    """What somebody says. From where it was cited is not for the model."""

    type: Literal["text"]
    text: str
    citations: Any = None
    cache_control: Any = None


class Thought(Block):
    """What the model thought. Nobody signs it here."""

    type: Literal["thinking"]
    thinking: str
    signature: Any = None
    cache_control: Any = None


class RedactedThought(Block):
    """A thought that only its own model could read: left out."""

    type: Literal["redacted_thinking"]
    data: Any = None
    cache_control: Any = None


class ToolUse(Block):
    """The model calls a tool."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None
    toolset_name: Any = None
    cache_control: Any = None


TextOnly = Annotated[Text, only("type", "text")]


class ToolResult(Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextOnly] | None = None
    is_error: bool | None = None
    toolset_name: Any = None
    cache_control: Any = None

    @property
    def text(self) -> str:
        """For the model, which has no other way to be told of an error."""
        text = _joined(self.content or "")
        return f"Error: {text}" if self.is_error else text


UserBlock = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[ToolResult, Tag("<tool_result>")],
    by("type"),
    only("type", "text", "tool_result"),
]
AssistantBlock = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Thought, Tag("<thinking>")]
    | Annotated[RedactedThought, Tag("<redacted_thinking>")]
    | Annotated[ToolUse, Tag("<tool_use>")],
    by("type"),
    only("type", "text", "thinking", "redacted_thinking", "tool_use"),
]


class UserMessage(BaseModel):
    """What the user says, and what tools answered."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["user"]
    content: str | list[UserBlock]


class AssistantMessage(BaseModel):
    """What the model said before."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["assistant"]
    content: str | list[AssistantBlock]


class SystemMessage(BaseModel):
    """An instruction in the middle of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system"]
    content: str | list[TextOnly]


Message = Annotated[
    Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[SystemMessage, Tag("<system>")],
    by("role"),
    only("role", "user", "assistant", "system"),
]


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
    messages: Sequence[Message], system: str | Sequence[Text] | None
) -> tuple[list[ChatMessage], Origins]:
    """A conversation in OpenAI's form, and where each part of it comes from.

    Raises:
        InvalidRequestError: nobody says anything, or the results of tools are not those of the
            calls before them.
    """
    made = [] if system is None else [("system", _system(system), [])]
    calls: list[Said[ToolUse]] = []
    for role, group in groupby(_said(messages), key=lambda said: said.role):
        turn = list(group)
        results = _results(turn, calls)
        calls = _of(ToolUse, turn)
        made += results + TURNS[role](turn)
    _results([], calls)
    if not any(message["role"] != "system" for _, message, _ in made):
        raise InvalidRequestError("messages is empty; send at least one message", "messages")
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
        if error.param not in ("messages", "tools"):
            raise
        words = PLACES.sub(lambda place: origins.get(place[0], place[0]), str(error))
        for name, own in PARTS.items():
            words = words.replace(name, own)
        raise type(error)(words, error.param) from None


def _said(messages: Iterable[Message]) -> Iterator[Said]:
    for i, message in enumerate(messages):
        where, content = f"messages[{i}]", message.content
        if isinstance(content, str):
            yield Said(message.role, where, where, Text(type="text", text=content))
            continue
        for j, block in enumerate(content):
            yield Said(message.role, where, f"{where}.content[{j}]", block)


def _results(turn: Sequence[Said], calls: Sequence[Said[ToolUse]]) -> Made:
    """Results in the order of the calls, as the model has nothing else to tell them apart."""
    waiting = {said.block.id: said.where for said in calls}
    order = {name: i for i, name in enumerate(waiting)}
    results = _of(ToolResult, turn)
    for said in results:
        if waiting.pop(name := said.block.tool_use_id, None) is None:
            raise InvalidRequestError(
                f"{said.where}.tool_use_id is {name!r}, but no tool_use with this id in the "
                "assistant's message before it waits for a result",
                "messages",
            )
    for name, where in waiting.items():
        raise InvalidRequestError(
            f"{where}: the tool_use {name!r} has no result; send a tool_result in the user's "
            "message behind it",
            "messages",
        )
    results.sort(key=lambda said: order[said.block.tool_use_id])
    return [(said.where, _result(said.block), []) for said in results]


def _result(block: ToolResult) -> ChatMessage:
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}


def _of(kind: type[B], turn: Iterable[Said[Any]]) -> list[Said[B]]:
    return [said for said in turn if isinstance(said.block, kind)]


def _others(turn: Sequence[Said]) -> Made:
    """Messages of the user, or instructions: as many as the client has."""
    made: Made = []
    for where, group in groupby(_of(Text, turn), key=lambda said: said.message):
        texts = [said.block for said in group]
        made.append((where, {"role": turn[0].role, "content": _joined(texts)}, []))
    return made


def _assistant(turn: Sequence[Said]) -> Made:
    """One message, over however many the client has spread the turn."""
    calls = _of(ToolUse, turn)
    thought = "\n".join(said.block.thinking for said in _of(Thought, turn))
    text = "".join(said.block.text for said in _of(Text, turn))
    message: ChatMessage = {"role": "assistant", "content": text}
    if thought:
        message["reasoning_content"] = thought
    if calls:
        message["tool_calls"] = [_call(said.block) for said in calls]
    return [(turn[0].message, message, [said.where for said in calls])]


def _call(block: ToolUse) -> dict[str, Any]:
    function = {"name": block.name, "arguments": block.input}
    return {"id": block.id, "type": "function", "function": function}


def _system(system: str | Sequence[Text]) -> ChatMessage:
    blocks = system if isinstance(system, str) else _without_billing(system)
    return {"role": "system", "content": _joined(blocks)}


def _without_billing(blocks: Sequence[Text]) -> list[Text]:
    return [block for block in blocks if not block.text.startswith(BILLING)]


def _joined(texts: str | Sequence[Text]) -> str:
    """A text in blocks: each begins a line."""
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts)


TURNS = {"user": _others, "assistant": _assistant, "system": _others}
