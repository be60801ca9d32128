"""Chat messages to a prompt, by the checkpoint's own template. No jax."""

from __future__ import annotations

import bisect
import datetime
import functools
import json
import math
import re
import reprlib
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from glmjax.config import read_json
from glmjax.errors import CheckpointError, InvalidRequestError
from glmjax.text.nesting import MAX_NESTING, levels
from glmjax.text.tool_results import in_call_order

# OpenAI renamed system to developer; templates know the old name only.
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}
# Types of content parts, in all of OpenAI's APIs, and where each has its text.
PART_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# Types of parts that no GLM of this family reads, in all of those APIs, and what they are.
UNREAD = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "input_audio": "audio",
    "document": "document",
    "file": "file",
    "input_file": "file",
}
# Names of a thought, as engines call it; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
MAX_ERROR_CHARS = 500  # of a template's own words, which may quote whole messages
FUNCTION = {"name": "probe_function", "arguments": {"probe_key": "probe value"}}
PROBE: list[dict[str, Any]] = [
    {"role": "user", "content": "probe"},
    {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": FUNCTION}]},
]
PROBE_TOOL = {"type": "function", "function": {"name": FUNCTION["name"], "parameters": {}}}
# What stands between the name and the first argument of a call in each form.
CALL_FORMS: dict[str, Literal["glm45", "glm47"]] = {"\n": "glm45", "": "glm47"}


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja, in the dialect that `transformers` reads.
        special_tokens: texts such as `bos_token` that the template may name.

    Raises:
        CheckpointError: the source does not compile.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the chat template does not compile: {error}") from None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """A model folder's chat_template.jinja, else that of tokenizer_config.json, else None.

        Raises:
            CheckpointError: it does not compile.
            ConfigError: tokenizer_config.json is not JSON.
        """
        config_file = Path(folder) / "tokenizer_config.json"
        config = read_json(config_file) if config_file.is_file() else {}
        file = Path(folder) / "chat_template.jinja"
        source = file.read_text("utf-8") if file.is_file() else _default(config)
        return None if source is None else cls(source, _special_tokens(config))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, up to where the assistant begins.

        Args:
            messages: as in OpenAI's API. Results of tools are put into the order of the calls.
            tools: reach the template as they are.
            continue_final_message: the prompt ends with the text of the last message, which is
                the assistant's, for the model to go on with. Its thought, if it has one, is over.
                Where the template strips a text, white space at the end of it goes.
            variables: what else the template may read, such as `enable_thinking`.

        Raises:
            InvalidRequestError: messages or tools that are malformed, or that the template
                refuses; or the last message cannot be continued.
        """
        normal = in_call_order(_conversation(messages))
        given = self._special_tokens | variables | {"tools": _tools(tools)}
        given = {"documents": None, "add_generation_prompt": not continue_final_message} | given
        if not continue_final_message:
            return self._fill(normal, given)
        text, mark = _to_continue(normal[-1], given), secrets.token_hex(16)
        normal[-1] = normal[-1] | {"content": f"{text}{mark} "}
        return _up_to_mark(self._fill(normal, given), mark, text)

    @functools.cached_property
    def call_form(self) -> Literal["glm45", "glm47"] | None:
        """How the template writes tool calls: over several lines as GLM-4.5, or on one as GLM-4.7.

        None: in neither of these forms, or not at all.
        """
        call = re.compile(f"<tool_call>{FUNCTION['name']}(.*?)<arg_key>", re.DOTALL)
        found = call.search(self._probe(PROBE, add_generation_prompt=False))
        return CALL_FORMS.get(found[1]) if found else None

    @functools.cached_property
    def takes_tools(self) -> bool:
        """Whether the template shows the tools to the model."""
        return PROBE_TOOL["function"]["name"] in self._probe(PROBE[:1], tools=[PROBE_TOOL])

    def _probe(self, messages: list[dict[str, Any]], **variables: Any) -> str:
        try:
            return self.render(messages, **variables)
        except InvalidRequestError:
            return ""

    def _fill(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        prompt, reason = self._try(messages, variables)
        if reason is None:
            return prompt
        where, param = self._blame(messages, variables, reason)
        raise InvalidRequestError(f"{where}: the chat template refused it: {reason}", param)

    def _blame(
        self, messages: list[dict[str, Any]], variables: dict[str, Any], reason: str
    ) -> tuple[str, str]:
        """The first part of a request with which the template fails for this reason.

        About log2(len(messages)) renderings, as a conversation may be long.
        """

        def fails(messages: list[dict[str, Any]], tools: list[Any] | None) -> bool:
            return self._try(messages, variables | {"tools": tools})[1] == reason

        tools = variables["tools"]
        if tools and not fails(messages, None):
            return f"tools[{_first_bad(tools, lambda some: fails(messages, some))}]", "tools"
        if fails([], tools):
            return "messages", "messages"
        return f"messages[{_first_bad(messages, lambda some: fails(some, tools))}]", "messages"

    def _try(
        self, messages: list[dict[str, Any]], variables: dict[str, Any]
    ) -> tuple[str, str | None]:
        """The prompt, or else what the template says is wrong."""
        try:
            return self._template.render(variables | {"messages": messages}), None
        except Exception as error:  # a template is a program: the user's data can raise anything
            return "", _words(error)


def _first_bad(items: list[Any], fails: Callable[[list[Any]], bool]) -> int:
    """Index of the item with which a list begins to fail; all of it does."""
    shorter = range(1, len(items))
    return bisect.bisect_left(shorter, True, key=lambda length: fails(items[:length]))


def _words(error: Exception) -> str:
    """What an error says, short and as valid Unicode."""
    words = str(error).encode("utf-8", "backslashreplace").decode() or type(error).__name__
    return words if len(words) <= MAX_ERROR_CHARS else words[:MAX_ERROR_CHARS] + "..."


# The dialect of transformers' chat templates: transformers/utils/chat_template_utils.py.


class _Sandbox(ImmutableSandboxedEnvironment):
    """Refuses at once what Jinja's own sandbox lets be looked at, as an undefined value."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__} is unsafe")


class _Generation(Extension):
    """`{% generation %}` marks, for trainers, what an assistant wrote. A prompt only shows it."""

    tags = {"generation"}  # noqa: RUF012, declared by Jinja

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Dict:
    """`dict` without the type's methods: dict.update(x) would change what is immutable."""

    def __call__(self, /, *args: Any, **items: Any) -> dict[Any, Any]:
        return dict(*args, **items)

    def fromkeys(self, keys: Iterable[Any], value: Any = None, /) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` without names that begin with _, which reach into Python's own objects."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace may not hold {name!r}")
        super().__setitem__(name, value)


def _namespace(*args: Any, **attributes: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*args, **attributes).items():
        namespace[name] = value
    return namespace


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _Dict(),
        "namespace": _namespace,
    }
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter would escape it for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _default(config: Mapping[str, Any]) -> str | None:
    """tokenizer_config.json's template; of several named ones, the one called default."""
    template = config.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {k: v.get("content") if isinstance(v, dict) else v for k, v in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


# Requests as templates expect them.


def _tools(tools: Any) -> list[Mapping[str, Any]] | None:
    if tools is None:
        return None
    if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
        raise InvalidRequestError(f"tools is {reprlib.repr(tools)}, expected a list", "tools")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            found = reprlib.repr(tool)
            raise InvalidRequestError(f"tools[{i}] is {found}, expected an object", "tools")
    return list(tools)


def _conversation(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _refusal("messages", messages, "a list")
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one message", "messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _refusal(where: str, found: Any, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{where} is {reprlib.repr(found)}, expected {expected}", "messages")


def _message(message: Any, where: str) -> dict[str, Any]:
    """One message in the form that templates expect: text content, arguments as objects.

    What is null is left out, as transformers does: many templates ask only for the key.
    """
    if not isinstance(message, Mapping):
        raise _refusal(where, message, "an object")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _refusal(f"{where}.role", role, f"one of {', '.join(ROLES)}")
    if role != "assistant" and "content" not in message:
        raise InvalidRequestError(
            f'{where} has no content; it must have one, if only "" or null', "messages"
        )
    content = _text(message.get("content"), f"{where}.content", of_tool=role == "tool")
    normal = {**message, "role": ROLES[role], "content": content}
    normal = {key: value for key, value in normal.items() if value is not None}
    if "tool_calls" in normal:
        normal["tool_calls"] = _tool_calls(normal["tool_calls"], f"{where}.tool_calls")
    return _with_reasoning(normal, where)


def _with_reasoning(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with its thought under the names that templates read."""
    name = next((name for name in REASONING if name in message), None)
    if name is None:
        return message
    thought = message[name]
    if not isinstance(thought, str):
        raise _refusal(f"{where}.{name}", thought, "a string")
    return {"thinking": thought} | message | {"reasoning_content": thought}


def _text(content: Any, where: str, of_tool: bool = False) -> str:
    """Content as a string: null is empty, parts of text are joined.

    What a tool answered that the model cannot read is told of: the model can go on.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list | tuple):
        raise _refusal(where, content, "a string or a list of text parts")
    return "".join(_part(part, f"{where}[{i}]", of_tool) for i, part in enumerate(content))


def _part(part: Any, where: str, of_tool: bool) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _refusal(where, part, "a text part")
    kind = part.get("type")
    if of_tool and isinstance(kind, str) and kind in UNREAD:
        return not_shown(kind)
    if not isinstance(kind, str) or kind not in PART_TEXTS:
        raise InvalidRequestError(
            f"{where} is of type {reprlib.repr(kind)}; images, audio and files are not served, "
            'only text: {"type": "text", "text": ...}',
            "messages",
        )
    text = part.get(PART_TEXTS[kind])
    if not isinstance(text, str):
        raise _refusal(f"{where}.{PART_TEXTS[kind]}", text, "a string")
    return text


def not_shown(kind: str, title: str | None = None) -> str:
    """What stands for a part that the model cannot read, by its type, one of `UNREAD`."""
    named = f"{UNREAD[kind]} {title!r}" if title else UNREAD[kind]
    return f"[{named} not shown: this model reads text only]"


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list | tuple):
        raise _refusal(where, calls, "a list")
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments, JSON in the API, are an object for the template."""
    if not isinstance(call, Mapping):
        raise _refusal(where, call, "an object")
    function = call.get("function")
    if not isinstance(function, Mapping):
        raise _refusal(f"{where}.function", function, "an object with name and arguments")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise _refusal(f"{where}.function.name", name, "the function's name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def _arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Arguments as an object; null and "" are what some clients send where there are none."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        return {}
    found = _parsed(arguments, where) if isinstance(arguments, str) else arguments
    if not isinstance(found, dict):
        raise _refusal(where, found, "a JSON object")
    _check_json(found, where)
    return found


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:
        raise InvalidRequestError(
            f"{where} is not a JSON object: {_words(error)}", "messages"
        ) from None


def _check_json(value: Any, where: str) -> None:
    """Refuse numbers that JSON does not have, and nesting that could not be written again."""
    for depth, level in enumerate(levels(value)):
        if depth == MAX_NESTING:
            raise _too_deep(where)
        if any(isinstance(v, float) and not math.isfinite(v) for v in level):
            raise InvalidRequestError(
                f"{where} holds NaN, Infinity or a number too large; JSON has no such numbers",
                "messages",
            )


def _too_deep(where: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{where} is nested more than {MAX_NESTING} deep, which is not served", "messages"
    )


# Continuing the last message.


def _to_continue(message: Mapping[str, Any], variables: Mapping[str, Any]) -> str:
    """The text of the message that is to be continued, if it can be."""
    faults = {
        "add_generation_prompt begins a new message; leave one of the two out": variables[
            "add_generation_prompt"
        ],
        f"the last message is of role {message['role']}; end with one of role assistant": (
            message["role"] != "assistant"
        ),
        "the last message has tool_calls, behind which no text can follow; leave them out, or "
        "send their results": message.get("tool_calls"),
    }
    for fault, found in faults.items():
        if found:
            raise _not_continued(fault)
    return message["content"]


def _up_to_mark(prompt: str, mark: str, text: str) -> str:
    """The prompt up to the mark that stands behind `text`, with a space behind it.

    If that space is gone, the template strips texts, and the mark kept it from stripping this
    one: that is made up for, as transformers does.
    """
    head, found, tail = prompt.rpartition(mark)
    head = head.replace(f"{mark} ", "").replace(mark, "")  # of a template that shows it twice
    if not found or not head.rstrip().endswith(text.strip()):
        raise _not_continued(
            "the chat template changes the last message's text, so its end cannot be found; send "
            "the thought in it as reasoning_content"
        )
    return head if tail.startswith(" ") else head.rstrip()


def _not_continued(reason: str) -> InvalidRequestError:
    return InvalidRequestError(f"continue_final_message: {reason}", "continue_final_message")
