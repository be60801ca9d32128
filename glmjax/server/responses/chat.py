"""From a request of the Responses API to the same one of chat completions."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from glmjax.errors import InvalidRequestError
from glmjax.server.openai.requests import ChatRequest
from glmjax.server.responses.requests import (
    CallItem,
    CustomCallItem,
    Item,
    MessageItem,
    ReasoningItem,
    ResponsesRequest,
    ResultItem,
    Text,
    TextFormat,
)
from glmjax.server.responses.tools import FlatTool, chat_tool_choice, flat_name
from glmjax.server.sampling_fields import spelled

# Fields of both, which mean the same.
SHARED = (ResponsesRequest.model_fields.keys() & ChatRequest.model_fields.keys()) - {
    "reasoning",
    "stream_options",
}
# The client's names of what errors may be about.
SPELLING = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "min_tokens": "min_tokens",
    "prompt": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
# What errors begin with.
PLACE = re.compile(r"\Amessages\[(\d+)\](\.content|\.tool_calls\[\d+\])?(?:\.function)?")
TOOL_PLACE = re.compile(r"\Atools\[(\d+)\](?:\.function)?")

Message = dict[str, Any]


@dataclass
class Turn:
    """A message of the conversation.

    Attributes:
        message: as in chat completions.
        places: where in the request its parts stand, by their place in the message.
        thoughts: what the assistant thought in it, piece by piece.
    """

    message: Message
    places: dict[str, str]
    thoughts: list[str] = field(default_factory=list)


def chat_request(
    body: ResponsesRequest, turns: Sequence[Turn], tools: Sequence[FlatTool]
) -> ChatRequest:
    """The request that gives the same answer.

    Args:
        body: what was asked for.
        turns: its conversation.
        tools: its tools.

    Raises:
        InvalidRequestError: tool_choice or text.format are malformed.
    """
    own = {
        "messages": [turn.message for turn in turns],
        "max_completion_tokens": body.max_output_tokens,
        "tools": [{"type": "function", "function": tool.function} for tool in tools],
        "tool_choice": chat_tool_choice(body.tool_choice, tools),
        "response_format": _response_format(body.text.format if body.text else None),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "logprobs": body.logprobs,
    }
    return ChatRequest(**{name: getattr(body, name) for name in SHARED} | own)


@contextlib.contextmanager
def told(turns: Sequence[Turn], tools: Sequence[FlatTool]) -> Iterator[None]:
    """Make errors about a `chat_request` of these name what the client sent."""

    def place(found: re.Match[str]) -> str:
        places, part = turns[int(found[1])].places, found[2] or ""
        return places.get(part) or places[""] + part

    with spelled(SPELLING):
        try:
            yield
        except InvalidRequestError as error:
            words = PLACE.sub(place, str(error))
            words = TOOL_PLACE.sub(lambda found: tools[int(found[1])].place, words)
            raise type(error)(words, error.param) from None


# The conversation


def conversation(body: ResponsesRequest) -> list[Turn]:
    """A request's instructions and input.

    What the assistant thought, said and called, one behind the other, is one turn of its, as the
    model wrote it in one go; a thought begins the next one, and so does a second text.
    """
    turns: list[Turn] = []
    if body.instructions:
        turns.append(_text_turn("system", body.instructions, "instructions"))
    if isinstance(body.input, str):
        turns.append(_text_turn("user", body.input, "input"))
    else:
        for i, item in enumerate(body.input):
            _add(turns, item, f"input[{i}]")
    for turn in turns:
        if turn.thoughts:
            turn.message["reasoning_content"] = "\n".join(turn.thoughts)
    return turns


def _text_turn(role: str, text: str, place: str) -> Turn:
    return Turn({"role": role, "content": text}, {"": place, ".content": place})


def _add(turns: list[Turn], item: Item, place: str) -> None:
    match item:
        case MessageItem(role="assistant"):
            _say(turns, item, place)
        case MessageItem():
            turns.append(Turn({"role": item.role, "content": item.content}, {"": place}))
        case ReasoningItem():
            _think(turns, item, place)
        case CallItem() | CustomCallItem():
            _call(turns, item, place)
        case ResultItem():
            message = {"role": "tool", "tool_call_id": item.call_id, "content": item.output}
            turns.append(Turn(message, {"": place, ".content": f"{place}.output"}))


def _say(turns: list[Turn], item: MessageItem, place: str) -> None:
    turn = _assistant(turns, place, lambda said: "content" in said and "tool_calls" not in said)
    turn.places[".content"] = f"{place}.content"
    turn.message.setdefault("content", []).extend(_parts(item.content))


def _think(turns: list[Turn], item: ReasoningItem, place: str) -> None:
    if not item.text:
        return
    turn = _assistant(turns, place, lambda said: "content" in said or "tool_calls" in said)
    turn.thoughts.append(item.text)


def _call(turns: list[Turn], item: CallItem | CustomCallItem, place: str) -> None:
    turn = _assistant(turns, place, lambda said: False)
    calls = turn.message.setdefault("tool_calls", [])
    turn.places[f".tool_calls[{len(calls)}]"] = place
    function = {"name": flat_name(item.namespace, item.name), "arguments": item.arguments}
    calls.append({"id": item.call_id, "type": "function", "function": function})


def _assistant(turns: list[Turn], place: str, full: Callable[[Message], bool]) -> Turn:
    """The assistant's turn that goes on, else a new one."""
    last = turns[-1].message if turns else {}
    if last.get("role") != "assistant" or full(last):
        turns.append(Turn({"role": "assistant"}, {"": place}))
    return turns[-1]


def _parts(content: Text) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


# Formats


def _response_format(asked: TextFormat | None) -> dict[str, Any] | None:
    if asked is None:
        return None
    if asked.type != "json_schema":
        return {"type": asked.type}
    if asked.schema_ is None:
        raise InvalidRequestError(
            'text.format is of type "json_schema", but has no schema: send {"type": "json_schema", '
            '"name": ..., "schema": {...}}',
            "text.format",
        )
    named = {"name": asked.name, "schema": asked.schema_, "strict": asked.strict}
    return {"type": "json_schema", "json_schema": named}
