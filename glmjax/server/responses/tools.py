"""Tools of the Responses API in the form of chat completions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import pydantic_core

from glmjax.errors import InvalidRequestError
from glmjax.text.tool_calls import MAX_NAME, is_name

NAMESPACE = "namespace"  # the type of a group of tools, which has a name
MEMBERS = ("type", "name", "description", "tools")  # the fields of one
SEPARATOR = "__"  # between it and a tool's own name, as agents name the tools of MCP servers
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


class FlatTool(NamedTuple):
    """A tool as the model knows it, to which there are no namespaces.

    Attributes:
        place: where in the request it stands.
        type: "function" or "custom".
        namespace: the name of the one it is in; None: it is in none.
        name: its own, as it was given.
        function: in the form of chat completions, under the name that the model knows.
    """

    place: str
    type: str
    namespace: str | None
    name: Any
    function: dict[str, Any]

    @property
    def words(self) -> dict[str, Any]:
        """What a call of it says of it."""
        named = {"name": self.name}
        return named if self.namespace is None else {"namespace": self.namespace} | named


def flat_name(namespace: str | None, name: str) -> str:
    """What the model calls a tool."""
    return name if namespace is None else f"{namespace}{SEPARATOR}{name}"


def flat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[FlatTool]:
    """A request's tools, those of its namespaces among them, in their order.

    Raises:
        InvalidRequestError: one is of a kind, or has a field, that is not served; or the model
            could not tell two of them apart.
    """
    flat: list[FlatTool] = []
    for i, tool in enumerate(tools or ()):
        grouped = tool.get("type") == NAMESPACE
        flat += _members(tool, f"tools[{i}]") if grouped else [_flat(tool, f"tools[{i}]", None)]
    _check_apart(flat)
    return flat


def _flat(tool: Mapping[str, Any], place: str, namespace: str | None) -> FlatTool:
    """One tool, its own fields as they were given."""
    _check_kind(tool.get("type"), place)
    _check_unseen(tool, place)
    function = {name: value for name, value in tool.items() if name not in ("type", *UNSEEN)}
    if tool["type"] == "custom":
        function = _of_text(function, place)
    name = function.get("name")
    if namespace is not None and isinstance(name, str) and name:
        function["name"] = _joined(namespace, name, place)
    return FlatTool(place, tool["type"], namespace, name, function)


def _check_unseen(tool: Mapping[str, Any], place: str) -> None:
    for name, neutral in UNSEEN.items():
        value = tool.get(name)
        if value is not None and ... not in neutral and value not in neutral:
            raise InvalidRequestError(f"{place}.{name} is not served yet; leave it out", "tools")


def _joined(namespace: str, name: str, place: str) -> str:
    whole = flat_name(namespace, name)
    if not is_name(whole):
        raise InvalidRequestError(
            f"{place}: with its namespace its name is {whole!r}, but must have at most {MAX_NAME} "
            "characters, without spaces, quotes or brackets",
            "tools",
        )
    return whole


def _members(group: Mapping[str, Any], place: str) -> list[FlatTool]:
    """The tools of a namespace; the first of them tells the model what they are all for."""
    name, about, tools = _group(group, place)
    flat = [_flat(tool, f"{place}.tools[{i}]", name) for i, tool in enumerate(tools)]
    if about and flat:
        function = flat[0].function
        note = f"About all tools whose names begin with {flat_name(name, '')}: {about}"
        own = function.get("description")
        function["description"] = f"{own}\n\n{note}" if own else note
    return flat


def _group(group: Mapping[str, Any], place: str) -> tuple[str, str | None, list[Mapping[str, Any]]]:
    """A namespace's name, description and tools."""
    name, about, tools = (group.get(field) for field in MEMBERS[1:])
    _check_unseen(group, place)
    faults = {
        f"name is {name!r}, but must be a name without spaces, quotes or brackets": not (
            isinstance(name, str) and is_name(name)
        ),
        "description must be a string": not isinstance(about, str | None),
        "tools must be a list of tools": not (
            isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
        ),
    }
    others = group.keys() - {*MEMBERS, *UNSEEN}
    faults |= {f"{field} is unknown": group[field] not in (None, False) for field in others}
    for fault, found in faults.items():
        if found:
            raise InvalidRequestError(f"{place}.{fault}", "tools")
    return cast(Any, (name, about, tools))


def _check_apart(flat: Sequence[FlatTool]) -> None:
    """That no namespaces make equal names; those that are equal by themselves are told later."""
    known: dict[str, FlatTool] = {}
    for tool in flat:
        name = tool.function.get("name")
        first = known.setdefault(name, tool) if isinstance(name, str) else tool
        if first is not tool and (first.namespace, tool.namespace) != (None, None):
            raise InvalidRequestError(
                f"{first.place} and {tool.place} are both {name!r} to the model, as a tool's name "
                "there is its namespace's and its own; give one of them another name",
                "tools",
            )


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


def chat_tool_choice(choice: str | dict[str, Any] | None, tools: Sequence[FlatTool]) -> Any:
    """The same choice in the form of chat completions; that knows which tools there are.

    Raises:
        InvalidRequestError: it is malformed, or asks for a tool of a kind that is not served.
    """
    if choice is None or choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict) and (made := _named(choice, tools) or _allowed(choice, tools)):
        return made
    raise InvalidRequestError(f"tool_choice is {choice!r}; {EXPECTED}", "tool_choice")


def _allowed(choice: Mapping[str, Any], tools: Sequence[FlatTool]) -> dict[str, Any] | None:
    mode, allowed = choice.get("mode"), choice.get("tools")
    named = [_named(tool, tools) for tool in allowed] if isinstance(allowed, list) else []
    fits = choice.get("type") == "allowed_tools" and mode in ("auto", "required")
    if not (fits and named and all(named)):
        return None
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}


def _named(tool: Any, tools: Sequence[FlatTool]) -> dict[str, Any] | None:
    """A tool by its name, in the form of chat completions; None: it is none."""
    if not isinstance(tool, Mapping) or tool.get("type") not in NAMED:
        return None
    namespace, name = tool.get("namespace"), tool.get("name")
    if not isinstance(name, str) or not isinstance(namespace, str | None):
        return None
    return {"type": "function", "function": {"name": _meant(namespace, name, tools)}}


def _meant(namespace: str | None, name: str, tools: Sequence[FlatTool]) -> str:
    """What the model calls a tool. Its namespace may be left out where one tool alone fits."""
    whole = flat_name(namespace, name)
    known: list[Any] = [tool.function.get("name") for tool in tools]
    fitting = [called for tool, called in zip(tools, known, strict=True) if tool.name == name]
    alone = namespace is None and whole not in known and len(fitting) == 1
    return fitting[0] if alone else whole
