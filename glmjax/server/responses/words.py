"""How the Responses API words an answer: its items, and the events that tell of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from glmjax.errors import InvalidRequestError
from glmjax.server.choice import ChoiceDelta
from glmjax.server.frontend import Generation
from glmjax.server.responses.requests import (
    SEAL,
    ReasoningOptions,
    ResponsesRequest,
    TextFormat,
    TextOptions,
)
from glmjax.server.responses.tools import FlatTool, custom_input
from glmjax.server.served import ServedModel
from glmjax.text.parts import CallArguments, CallBegin, Content, Part, Reasoning

Words = dict[str, Any]  # an object of the API


def new_id(prefix: str) -> str:
    """An id that is nothing else's."""
    return f"{prefix}_{secrets.token_hex(12)}"


class _Part(NamedTuple):
    """The one part that the text of an item stands in.

    Attributes:
        type: of it.
        events: how the names of the events about it begin.
        number: what its place among others is called in them.
    """

    type: str
    events: str = "response.content_part"
    number: str = "content_index"


class _Kind(NamedTuple):
    """A kind of items.

    Attributes:
        prefix: of ids.
        events: how the names of the events about its text begin.
        text: what they call the whole text.
        part: what the text stands in; None: in the item itself.
        words: its own fields, given its parts.
        read: the text out of all that was said, which then comes at its end; None: as it is said.
    """

    prefix: str
    events: str
    text: str
    part: _Part | None
    words: Callable[[_Item, list[Words]], Words]
    read: Callable[[str], str] | None = None


@dataclass
class _Item:
    """An item as far as it is known.

    Attributes:
        kind: of it.
        begin: the part that it began with.
        index: its place in the output.
        id, call_id: made up.
        tool: the words for which tool a call is of.
        texts: what it says, piece by piece.
        logprobs: of its tokens, where they were asked for.
    """

    kind: _Kind
    begin: Part
    index: int
    id: str
    call_id: str = field(default_factory=lambda: new_id("call"))
    tool: Words = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Words] = field(default_factory=list)

    @property
    def text(self) -> str:
        """What it says."""
        said = "".join(self.texts)
        return said if self.kind.read is None else self.kind.read(said)

    def goes_on(self, part: Part) -> bool:
        """Whether `part` is more of it."""
        kind = type(part)
        return kind is CallArguments or (kind is type(self.begin) and kind is not CallBegin)

    def opened(self) -> Iterator[Words]:
        """It begins."""
        yield self._item_event("added", "in_progress", [])
        if self.kind.part:
            yield self._event(f"{self.kind.part.events}.added", part=self._part(self.kind.part))

    def said(self, text: str, logprobs: list[Words]) -> Iterator[Words]:
        """More of its text."""
        self.texts.append(text)
        self.logprobs += logprobs
        if text and self.kind.read is None:
            yield self._event(f"{self.kind.events}.delta", delta=text, **self._logged(logprobs))

    def closed(self, status: str) -> Iterator[Words]:
        """It ends; the last of these events holds all of it."""
        text = self.text
        if text and self.kind.read is not None:
            yield self._event(f"{self.kind.events}.delta", delta=text)
        whole = {self.kind.text: text} | self._logged(self.logprobs)
        yield self._event(f"{self.kind.events}.done", **whole)
        parts: list[Words] = []
        if self.kind.part:
            parts.append(self._part(self.kind.part))
            yield self._event(f"{self.kind.part.events}.done", part=parts[0])
        yield self._item_event("done", status, parts)

    def _part(self, part: _Part) -> Words:
        noted = {"annotations": []} if isinstance(self.begin, Content) else {}
        words = {"type": part.type, "text": self.text}
        return words | noted | self._logged(self.logprobs)

    def _logged(self, logprobs: list[Words]) -> Words:
        return {"logprobs": list(logprobs)} if isinstance(self.begin, Content) else {}

    def _item_event(self, what: str, status: str, parts: list[Words]) -> Words:
        item = {"id": self.id, "status": status} | self.kind.words(self, parts)
        type_ = f"response.output_item.{what}"
        return {"type": type_, "output_index": self.index, "item": item}

    def _event(self, type_: str, **words: Any) -> Words:
        place = {"type": type_, "item_id": self.id, "output_index": self.index}
        return place | ({self.kind.part.number: 0} if self.kind.part else {}) | words


def _reasoning(item: _Item, parts: list[Words]) -> Words:
    return {"type": "reasoning", "summary": [], "content": parts, "encrypted_content": None}


def _summary(item: _Item, parts: list[Words]) -> Words:
    return {"type": "reasoning", "summary": parts, "content": [], "encrypted_content": None}


def _message(item: _Item, parts: list[Words]) -> Words:
    return {"type": "message", "role": "assistant", "content": parts}


def _function_call(item: _Item, parts: list[Words]) -> Words:
    call = {"type": "function_call", "call_id": item.call_id}
    return call | item.tool | {"arguments": item.text}


def _custom_call(item: _Item, parts: list[Words]) -> Words:
    call = {"type": "custom_tool_call", "call_id": item.call_id}
    return call | item.tool | {"input": item.text}


_THOUGHT_PART, _TEXT_PART = _Part("reasoning_text"), _Part("output_text")
_KINDS: dict[type[Part], _Kind] = {
    Reasoning: _Kind("rs", "response.reasoning_text", "text", _THOUGHT_PART, _reasoning),
    Content: _Kind("msg", "response.output_text", "text", _TEXT_PART, _message),
    CallBegin: _Kind("fc", "response.function_call_arguments", "arguments", None, _function_call),
}
# A thought as its own summary, which is all that many clients show of one.
_SUMMARY_PART = _Part("summary_text", "response.reasoning_summary_part", "summary_index")
_SUMMARY = _Kind("rs", "response.reasoning_summary_text", "text", _SUMMARY_PART, _summary)
_CUSTOM = _Kind(
    "ctc", "response.custom_tool_call_input", "input", None, _custom_call, read=custom_input
)


class Output:
    """An answer's items, in the order in which they are said.

    The events, in order, add up to `items`: pieces to texts, texts to items.

    Args:
        sealed: thoughts also come as `encrypted_content`, for clients that keep nothing else of
            them. It is not encrypted: nothing here is secret to who asked.
        summarised: thoughts come as summaries.
        tools: those that have namespaces or take any text are called in other words.
        keep: takes each item as it ends.

    Attributes:
        items: those that have ended.
    """

    def __init__(
        self,
        sealed: bool = False,
        summarised: bool = False,
        tools: Sequence[FlatTool] = (),
        keep: Callable[[Words], None] | None = None,
    ) -> None:
        self.items: list[Words] = []
        self._sealed, self._summarised, self._keep = sealed, summarised, keep
        self._tools = {tool.function["name"]: tool for tool in tools}
        self._open: _Item | None = None

    def take(self, part: Part, logprobs: list[Words]) -> Iterator[Words]:
        """Events that tell of one more part, with the log probabilities of its tokens."""
        if self._open is None or not self._open.goes_on(part):
            yield from self.close("completed")
            self._open = self._begun(part)
            yield from self._open.opened()
        if not isinstance(part, CallBegin):
            yield from self._open.said(part.text, logprobs)

    def _begun(self, part: Part) -> _Item:
        tool = self._tools.get(part.name) if isinstance(part, CallBegin) else None
        kind = self._kind(part, tool)
        item = _Item(kind, part, len(self.items), new_id(kind.prefix))
        if isinstance(part, CallBegin):  # a model may make a name up
            item.tool = {"name": part.name} if tool is None else tool.words
        return item

    def _kind(self, part: Part, tool: FlatTool | None) -> _Kind:
        if isinstance(part, Reasoning) and self._summarised:
            return _SUMMARY
        return _CUSTOM if tool and tool.type == "custom" else _KINDS[type(part)]

    def close(self, status: str) -> Iterator[Words]:
        """Events that tell of the end of the item that goes on, if one does."""
        if self._open is None:
            return
        *events, end = self._open.closed(status)
        if self._sealed and end["item"]["type"] == "reasoning":
            end["item"]["encrypted_content"] = SEAL + self._open.text
        self.items.append(end["item"])
        if self._keep is not None:
            self._keep(end["item"])
        self._open = None
        yield from (*events, end)

    @property
    def answers(self) -> bool:
        """Whether anything but thoughts is in it."""
        return any(item["type"] != "reasoning" for item in self.items) or (
            self._open is not None and not isinstance(self._open.begin, Reasoning)
        )


def usage(last: ChoiceDelta) -> Words:
    """Tokens counted."""
    return {
        "input_tokens": last.prompt_tokens,
        "input_tokens_details": {"cached_tokens": last.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": last.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": last.reasoning_tokens},
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }


def echo(body: ResponsesRequest) -> Words:
    """What an answer repeats of its request.

    Raises:
        InvalidRequestError: something that no JSON answer can hold.
    """
    reasoning, text = body.reasoning or ReasoningOptions(), body.text or TextOptions()
    form = text.format or TextFormat.model_validate({"type": "text"})
    given = {
        "tools": body.tools or [],
        "tool_choice": body.tool_choice or "auto",
        "text": {
            "format": form.model_dump(by_alias=True, exclude_unset=True),
            "verbosity": text.verbosity or "medium",
        },
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "safety_identifier": body.safety_identifier,
        "top_logprobs": body.top_logprobs or 0,
        "user": body.user,
    }
    return {name: _json(name, value) for name, value in given.items()}


def head(generation: Generation, served: ServedModel) -> Words:
    """What an answer says of itself, whatever it is and was asked."""
    sampling = generation.specs[0].sampling
    nothing = ("completed_at", "error", "incomplete_details", "previous_response_id", "usage")
    return {
        "id": generation.id,
        "object": "response",
        "created_at": int(time.time()),
        "model": served.name,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "background": False,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
    } | dict.fromkeys(nothing)


def _json(name: str, value: Any) -> orjson.Fragment:
    try:
        return orjson.Fragment(orjson.dumps(value))
    except TypeError as error:
        raise InvalidRequestError(
            f"{name} cannot be repeated in the answer, which is JSON: {error}", name
        ) from None
