"""Tools of the Responses API in the form of chat completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pydantic_core

from glmjax.errors import InvalidRequestError

NAMED = ("function", "custom")  # the types that are served; their tools have names
# Kinds that OpenAI's servers run; versions of them begin alike.
RUN_BY_OPENAI = ("code_interpreter", "file_search", "image_generation", "mcp", "web_search")
# Fields that ask for nothing with these values; the model does not see them.
UNSEEN = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
    "output_schema": (...,),
}
EXPECTED = (
    'expected "none", "auto", "required", {"type": "function" or "custom", "name": ...} or '
    '{"type": "allowed_tools", "mode": "auto" or "required", "tools": [...]}'
)
EXPECTED_FORMAT = (
    'expected {"type": "text"} or {"type": "grammar", "syntax": ..., "definition": ...}, of strings'
)

# A custom tool takes any text: to the model it is a function of one string.
INPUT = "input"
PARAMETERS = {"type": "object", "properties": {INPUT: {"type": "string"}}, "required": [INPUT]}


def chat_tool(tool: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A tool in the form of chat completions, its own fields as they were given.

    Args:
        tool: one of the request's.
        place: where in the request it stands.

    Raises:
        InvalidRequestError: it is of a kind, or has a field, that is not served.
    """
    _check_kind(tool.get("type"), place)
    for name, neutral in UNSEEN.items():
        value = tool.get(name)
        if value is not None and ... not in neutral and value not in neutral:
            raise InvalidRequestError(f"{place}.{name} is not served yet; leave it out", "tools")
    function = {name: value for name, value in tool.items() if name not in ("type", *UNSEEN)}
    if tool["type"] == "custom":
        function = _of_text(function, place)
    return {"type": "function", "function": function}


def _check_kind(kind: Any, place: str) -> None:
    if kind in NAMED:
        return
    if isinstance(kind, str) and kind.startswith(RUN_BY_OPENAI):
        why = "but this server runs no tools itself; leave it out"
    elif isinstance(kind, str):
        why = f"but tools of type {kind} are not served; give the model a function instead"
    else:
        why = 'but must be "function" or "custom"'
    raise InvalidRequestError(f"{place}.type is {kind!r}, {why}", "tools")


def _of_text(custom: dict[str, Any], place: str) -> dict[str, Any]:
    """A custom tool as a function. A grammar is told to the model, but does not bind it."""
    rule = _rule(custom.pop("format", None), place)
    described = custom.get("description")
    if not isinstance(described, str | None):
        raise InvalidRequestError(f"{place}.description must be a string", "tools")
    if rule:
        custom["description"] = f"{described}\n\n{rule}" if described else rule
    return custom | {"parameters": PARAMETERS}


def _rule(form: Any, place: str) -> str:
    """What a custom tool's format says of its input; "" where anything will do."""
    if form is None or form == {"type": "text"}:
        return ""
    if isinstance(form, Mapping) and form.get("type") == "grammar":
        syntax, definition = form.get("syntax"), form.get("definition")
        if isinstance(syntax, str) and isinstance(definition, str):
            return f"The input follows this {syntax} grammar:\n{definition}"
    raise InvalidRequestError(f"{place}.format is {form!r}; {EXPECTED_FORMAT}", "tools")


def custom_arguments(text: str) -> str:
    """The arguments that a custom tool's input stands in."""
    return json.dumps({INPUT: text})


def custom_input(arguments: str) -> str:
    """The input in a custom tool's arguments, which may be cut off.

    A model may also name it otherwise: then it is all of the arguments.
    """
    try:
        given = pydantic_core.from_json(arguments or "{}", allow_partial="trailing-strings")
    except ValueError:
        return arguments
    text = given.get(INPUT) if isinstance(given, dict) else None
    if isinstance(text, str):
        return text
    return arguments if given else ""


def chat_tool_choice(choice: str | dict[str, Any] | None) -> Any:
    """The same choice in the form of chat completions; that knows which tools there are.

    Raises:
        InvalidRequestError: it is malformed, or asks for a tool of a kind that is not served.
    """
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict) and (made := _named(choice) or _allowed(choice)):
        return made
    raise InvalidRequestError(f"tool_choice is {choice!r}; {EXPECTED}", "tool_choice")


def _allowed(choice: Mapping[str, Any]) -> dict[str, Any] | None:
    mode, tools = choice.get("mode"), choice.get("tools")
    named = [_named(tool) for tool in tools] if isinstance(tools, list) else []
    fits = choice.get("type") == "allowed_tools" and mode in ("auto", "required")
    if not (fits and named and all(named)):
        return None
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def _named(tool: Any) -> dict[str, Any] | None:
    """A tool by its name, in the form of chat completions; None: it is none."""
    named = isinstance(tool, Mapping) and tool.get("type") in NAMED
    if not named or not isinstance(tool.get("name"), str):
        return None
    return {"type": "function", "function": {"name": tool["name"]}}
