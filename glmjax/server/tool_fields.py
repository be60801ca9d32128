"""The tools of a conversation: which may be called, and which must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

from glmjax.errors import InvalidRequestError
from glmjax.server.served import ServedModel
from glmjax.text.grammar import MAX_GRAMMAR_CHARS, GrammarSpec
from glmjax.text.lexer import Tag, tag_ids
from glmjax.text.tool_calls import MAX_NAME, Tools, is_name
from glmjax.text.tool_grammar import StrictToolError, tool_grammar

Tool = Mapping[str, Any]
Mode = Literal["none", "auto", "required"]

ANSWERS = {"json_object": {"type": "object"}, "json_schema": None}  # kinds that go with tools
EXPECTED_TOOLS = "functions whose schemas make one grammar together"
THOUGHT = {Tag.THINK, Tag.END_THINK}
RESULT = "<tool_response>"  # what begins a tool's answer, which the model does not write
BANNED = -1e9  # a logit bias
EXPECTED = (
    'expected "none", "auto", "required", {"type": "function", "function": {"name": ...}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}'
)


class ToolChoice(NamedTuple):
    """Whether tools are called, which of them may be (None: any), and how often at most."""

    mode: Mode
    names: tuple[str, ...] | None = None
    most: int | None = None


@dataclass(frozen=True)
class Toolset:
    """What a request says of tools.

    Attributes:
        tools: as they were given, for the chat template.
        choice: which are called.
    """

    tools: Sequence[Tool]
    choice: ToolChoice

    @property
    def callable(self) -> list[Tool]:
        """The tools that may be called."""
        mode, names, _ = self.choice
        allowed = [t for t in self.tools if names is None or t["function"]["name"] in names]
        return [] if mode == "none" else allowed

    @property
    def schemas(self) -> Tools | None:
        """Of the parameters, for who reads calls; of all tools, as the model sees them all."""
        if not self.callable:
            return None
        functions = [tool["function"] for tool in self.tools]
        return {function["name"]: function.get("parameters") for function in functions}

    def bias(self, served: ServedModel) -> dict[int, float]:
        """Logit biases that keep the model from calling tools that it sees but may not call."""
        if not self.tools or self.callable:
            return {}
        tags = [token for tag, token in tag_ids(served.tokenizer).items() if tag not in THOUGHT]
        banned = [*tags, served.tokenizer.find(RESULT)]
        return {token: BANNED for token in banned if token is not None}

    def grammar(self, answer: GrammarSpec | None, served: ServedModel) -> GrammarSpec | None:
        """What the output must be.

        Args:
            answer: what it must be where no tool is called.
            served: the model, for the form of its calls.

        Raises:
            InvalidRequestError: `answer` does not compile, or a model cannot choose it over a call;
                or a strict tool's parameters are not served; or all together are too long.
        """
        mode, names, _ = self.choice
        strict = any(tool["function"].get("strict") for tool in self.callable)
        forced = mode == "required" or strict or names is not None
        if not self.callable or not (forced or answer):
            return answer
        if answer is not None:
            self._check(answer, served)
        lark, lead = self._lark(answer, served), served.answer_lead
        spec = GrammarSpec("lark", lark, "tools", EXPECTED_TOOLS, lead)
        try:
            served.constraint(spec, (), thinks=False)
        except InvalidRequestError:
            if len(lark) > MAX_GRAMMAR_CHARS:
                raise  # care makes it no shorter
            return spec._replace(value=self._lark(answer, served, careful=True))
        return spec

    def _check(self, answer: GrammarSpec, served: ServedModel) -> None:
        """So that an error in it is told as one in it, not in the tools."""
        if self.choice.mode != "required" and answer.kind not in ANSWERS:
            raise InvalidRequestError(
                f"{answer.param} does not go with tools that may be called: use response_format, "
                'or tool_choice "none"',
                answer.param,
            )
        served.constraint(answer, (), thinks=False)

    def _lark(self, answer: GrammarSpec | None, served: ServedModel, careful: bool = False) -> str:
        required = self.choice.mode == "required"
        schema = None if required or answer is None else ANSWERS[answer.kind] or answer.value
        try:
            return tool_grammar(
                self.callable,
                cast(Any, served.call_form),
                {tag.value: token for tag, token in tag_ids(served.tokenizer).items()},
                least=int(required),
                most=self.choice.most,
                text=not required and schema is None,
                answer=schema,
                careful=careful,
            )
        except StrictToolError as error:
            place = [tool["function"]["name"] for tool in self.tools].index(error.name)
            where = f"tools[{place}].function.parameters"
            raise InvalidRequestError(
                f"{where} are strict, but cannot be held to: {error.cause}", "tools"
            ) from None


def toolset(
    tools: Sequence[Any] | None, choice: Any, parallel: bool | None, served: ServedModel
) -> Toolset:
    """The tools of a request, checked.

    Args:
        tools: OpenAI's `tools`.
        choice: OpenAI's `tool_choice`.
        parallel: OpenAI's `parallel_tool_calls`; None: true.
        served: the model.

    Raises:
        InvalidRequestError: a tool or the choice is malformed, or the model calls no tools.
    """
    checked = [_checked(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in checked]
    if twice := {name for name, count in Counter(names).items() if count > 1}:
        raise InvalidRequestError(f"tools has {min(twice)!r} more than once", "tools")
    if checked and served.call_form is None:
        raise InvalidRequestError(
            f"{served.name} calls no tools: its chat template does not show how, or its server was "
            "told to read no calls; leave tools out",
            "tools",
        )
    if checked and served.template and not served.template.takes_tools:
        raise InvalidRequestError(
            f"{served.name}'s chat template does not show tools to the model; leave tools out",
            "tools",
        )
    made = _choice(choice, names)
    most = 1 if parallel is False else made.most
    return Toolset(checked, made._replace(most=most))


def _checked(tool: Any, where: str) -> Tool:
    kind = tool.get("type") if isinstance(tool, Mapping) else None
    if kind != "function":
        raise InvalidRequestError(
            f'{where}.type is {kind!r}, but only tools of type "function" are served', "tools"
        )
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise InvalidRequestError(f"{where}.function must be an object with a name", "tools")
    name = function.get("name")
    if not isinstance(name, str) or not is_name(name):
        raise InvalidRequestError(
            f"{where}.function.name is {name!r}, but must be a name of at most {MAX_NAME} "
            "characters, without spaces, quotes or brackets",
            "tools",
        )
    if tool.get("strict") not in (None, False):
        raise InvalidRequestError(
            f"{where}.strict has no meaning there; put it into {where}.function", "tools"
        )
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidRequestError(
            f"{where}.function.strict is {function['strict']!r}, but must be true or false", "tools"
        )
    if not isinstance(function.get("parameters"), Mapping | None):
        raise InvalidRequestError(f"{where}.function.parameters must be a JSON schema", "tools")
    return tool


def _choice(choice: Any, names: Sequence[str]) -> ToolChoice:
    """`tool_choice`, given the tools' names."""
    if choice is None:
        return ToolChoice("auto" if names else "none")
    if choice in ("none", "auto"):
        return ToolChoice(choice)
    if not names:
        raise InvalidRequestError("tool_choice asks for a tool, but there is none", "tool_choice")
    if choice == "required":
        return ToolChoice("required")
    made = _named(choice) or _allowed(choice)
    if made is None:
        raise InvalidRequestError(f"tool_choice is {choice!r}; {EXPECTED}", "tool_choice")
    for name in made.names or ():
        if name not in names:
            raise InvalidRequestError(
                f"tool_choice names {name!r}, but the tools are {', '.join(names)}", "tool_choice"
            )
    return made


def _named(choice: Any) -> ToolChoice | None:
    name = _name(choice)
    return None if name is None else ToolChoice("required", (name,), most=1)


def _allowed(choice: Any) -> ToolChoice | None:
    """OpenAI's {"type": "allowed_tools", "allowed_tools": {"mode": ..., "tools": [...]}}."""
    allowed = choice.get("allowed_tools") if isinstance(choice, Mapping) else None
    if not isinstance(allowed, Mapping) or not isinstance(allowed.get("tools"), list):
        return None
    names = [_name(tool) for tool in allowed["tools"]]
    mode = allowed.get("mode")
    if mode not in ("auto", "required") or not names or None in names:
        return None
    return ToolChoice(mode, tuple(cast("list[str]", names)))


def _name(named: Any) -> str | None:
    """The name in {"type": "function", "function": {"name": ...}}."""
    function = named.get("function") if isinstance(named, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) and named.get("type") == "function" else None
