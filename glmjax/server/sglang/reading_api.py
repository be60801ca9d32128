"""SGLang's endpoints that take a text apart as served answers are: its thought, its calls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import Response

from glmjax.errors import InvalidRequestError
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.served import END_THINK, ServedModel
from glmjax.server.tool_fields import toolset
from glmjax.server.unserved import Exact
from glmjax.text.parts import Message, Part, message
from glmjax.text.reader import AnswerReader, Opening, Reading
from glmjax.text.tool_calls import Tools

# All read thoughts and calls alike; the longer names are those that gateways send.
PARSERS = ("glm", "glm45", "glm47", "glm45_moe", "glm47_moe", "glm4_moe")

router = APIRouter(route_class=JsonRoute)


class ParseFunctionCallRequest(Exact):
    """POST /parse_function_call.

    Attributes:
        tool_choice: what the answer was asked for with; with "none" it has no calls.
    """

    text: str
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = None
    tool_call_parser: str | None = None


class SeparateReasoningRequest(Exact):
    """POST /separate_reasoning."""

    text: str
    reasoning_parser: str | None = None


@router.post("/parse_function_call")
async def parse_function_call(body: ParseFunctionCallRequest, frontend: FrontendOf) -> Response:
    """The tool calls of an answer's text, and the rest of it.

    A thought is left in the text, tags and all, and what looks like a call in it is none. Values
    are typed by the tools' schemas. `tool_index` is the tool's place in `tools`, -1 if it is not
    there; `parameters` is the text of a JSON object.
    """
    served = frontend.served
    _check_parser(body.tool_call_parser, "tool_call_parser")
    checked = toolset(body.tools, body.tool_choice, None, served)
    tools = None if body.tool_choice == "none" else checked.schemas or {}
    said = await asyncio.to_thread(_calls_of, body.text, tools, served)
    names = [tool["function"]["name"] for tool in checked.tools]
    calls = [
        {"tool_index": _index(call.name, names), "name": call.name, "parameters": call.arguments}
        for call in said.calls
    ]
    return JSONResponse({"normal_text": said.content, "calls": calls})


@router.post("/separate_reasoning")
async def separate_reasoning(body: SeparateReasoningRequest, frontend: FrontendOf) -> Response:
    """The thought of an answer's text, and the rest of it.

    The text begins where the model's does, in a conversation in which it thinks: a template that
    opens the thought itself, as GLM-4.7's does, leaves the model inside it, so that all is thought
    up to `</think>`; with others a thought begins with `<think>`, and without one there is none.
    """
    _check_parser(body.reasoning_parser, "reasoning_parser")
    said = await asyncio.to_thread(_thought_of, body.text, frontend.served)
    return JSONResponse({"reasoning_text": said.reasoning, "text": said.content})


def _check_parser(name: str | None, field: str) -> None:
    if name is not None and name not in PARSERS:
        raise InvalidRequestError(
            f"{field} is {name!r}, but answers of this model are read by glm, glm45 or glm47; "
            "leave it out",
            field,
        )


def _index(name: str, names: Sequence[str]) -> int:
    return names.index(name) if name in names else -1


def _calls_of(text: str, tools: Tools | None, served: ServedModel) -> Message:
    """Where the thought was taken off before, `</think>` is not there, and all is the answer."""
    opening = _opening(served) if END_THINK in text else Opening()
    return _read(text, Reading(tools, separate_reasoning=False), opening, served)


def _thought_of(text: str, served: ServedModel) -> Message:
    return _read(text, Reading(), _opening(served), served)


def _opening(served: ServedModel) -> Opening:
    """Where the prompt of a conversation leaves the model, if it has one."""
    if served.template is None:
        return Opening()
    return served.opening(served.chat_prompt([{"role": "user", "content": ""}]))


def _read(text: str, reading: Reading, opening: Opening, served: ServedModel) -> Message:
    """A whole answer's parts. Special tokens written out in it are its text."""
    tokenizer = served.tokenizer
    reader = AnswerReader(tokenizer, reading, opening, skip_special_tokens=False)
    parts: list[Part] = []
    for token_id in tokenizer.encode(text):
        parts += reader.push(token_id)
    return message(parts + reader.finish(truncated=False))
