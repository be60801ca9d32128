"""Conversations of Anthropic's API, and what they are in OpenAI's form.

A user's results of tools become messages of their own before the rest of what the user says. The
assistant's blocks become one message, with a thought, a text and calls.
"""

from __future__ import annotations

import contextlib
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Tag
from pydantic_core import PydanticCustomError

from glmjax.errors import InvalidRequestError

# Claude Code begins its system prompt with this line, which is new each time. It is meant for who
# bills, not for the model, and behind it no prefix would be found in the cache.
BILLING = "x-anthropic-billing-header:"

# Claude Code's notes to the model begin with this. Beside results of tools they are told with the
# last of these: as a message of the user's they would begin a new turn, and templates leave out the
# thoughts before it, on which the loop of tools goes on and which the cache holds.
REMINDER = "<system-reminder>"

# How errors about messages and tools in OpenAI's form begin, and the client's names of their parts.
PLACE = re.compile(r"(messages\[\d+\](?:\.tool_calls\[\d+\])?|tools\[\d+\])(\.function\.\w+)?")
PARTS = {".function.arguments": ".input", ".function.name": ".name"}
PARTS |= {".function.parameters": ".input_schema"}

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


class Unread(Block):
    """What a tool answered, but the model cannot read. It is told so, and can go on."""

    model_config = ConfigDict(extra="allow")

    type: Literal["image", "document"]

    @property
    def text(self) -> str:
        """What stands in its place."""
        return f"[{self.type} not shown: this model reads text only]"


ResultBlock = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[Unread, Tag("<unread>")],
    Discriminator(lambda it: "<text>" if it["type"] == "text" else "<unread>"),
    only("type", "text", "image", "document"),
]


class ToolResult(Block):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultBlock] | None = None
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
        InvalidRequestError: nobody says anything, calls share an id, or the results of tools are
            not those of the calls before them.
    """
    made = _instructions(system)
    calls: dict[str, Said[ToolUse]] = {}
    for role, group in groupby(_said(messages), key=lambda said: said.role):
        turn = list(group)
        results = _results(turn, calls)
        calls = _calls(turn)
        made += results + TURNS[role](turn)
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


def _results(turn: Sequence[Said], calls: Mapping[str, Said[ToolUse]]) -> Made:
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
    return _with_reminders([found[name] for name in calls], _reminders(turn))


def _stray(said: Said[ToolResult], fault: str) -> InvalidRequestError:
    words = f"{said.where}.tool_use_id is {said.block.tool_use_id!r}, but {fault}"
    return InvalidRequestError(words, "messages")


def _with_reminders(results: Sequence[Said[ToolResult]], reminders: Sequence[Said[Text]]) -> Made:
    last = {said.message: said.where for said in results}
    made: Made = []
    for said in results:
        notes = [note.block.text for note in reminders if last[note.message] == said.where]
        content = "\n".join([said.block.text, *notes])
        tool = {"role": "tool", "tool_call_id": said.block.tool_use_id, "content": content}
        made.append((said.where, tool, []))
    return made


def _reminders(turn: Sequence[Said]) -> list[Said[Text]]:
    """Notes that are told with results."""
    answered = {said.message for said in _of(ToolResult, turn)}
    texts = [said for said in _of(Text, turn) if said.message in answered]
    return [said for said in texts if said.block.text.startswith(REMINDER)]


def _of(kind: type[B], turn: Iterable[Said[Any]]) -> list[Said[B]]:
    return [said for said in turn if isinstance(said.block, kind)]


def _others(turn: Sequence[Said]) -> Made:
    """Messages of the user, or instructions: as many as the client has."""
    made: Made = []
    told = {said.where for said in _reminders(turn)}
    texts = [said for said in _of(Text, turn) if said.where not in told]
    for where, group in groupby(texts, key=lambda said: said.message):
        content = _joined([said.block for said in group])
        made.append((where, {"role": turn[0].role, "content": content}, []))
    return made


def _assistant(turn: Sequence[Said]) -> Made:
    """One message, over however many the client has spread the turn."""
    calls = _of(ToolUse, turn)
    thought = "\n".join(said.block.thinking for said in _of(Thought, turn))
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
    content = _joined(blocks)
    return [("system", {"role": "system", "content": content}, [])] if content else []


def _without_billing(blocks: Sequence[Text]) -> list[Text]:
    return [block for block in blocks if not block.text.startswith(BILLING)]


def _joined(texts: str | Sequence[Text | Unread]) -> str:
    """A text in blocks: each begins a line."""
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts)


TURNS = {"user": _others, "assistant": _assistant, "system": _others}
