"""Chat messages to a prompt, by the checkpoint's own template. No jax."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glmjax.config import read_json
from glmjax.errors import CheckpointError, InvalidRequestError

# OpenAI renamed system to developer; templates know the old name only.
ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"developer": "system"}


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

    def render(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> str:
        """The prompt for `messages`, up to where the assistant begins.

        Args:
            messages: as in OpenAI's API.
            variables: what else the template may read, such as `enable_thinking`.

        Raises:
            InvalidRequestError: messages that are malformed, or that the template refuses.
        """
        variables = {"add_generation_prompt": True} | self._special_tokens | variables
        normal = [_message(message, i) for i, message in enumerate(messages)]
        try:
            return self._template.render(variables | {"messages": normal})
        except Exception as error:  # a template is a program: the user's data can raise anything
            raise InvalidRequestError(
                f"the model's chat template refused the messages: {error}", "messages"
            ) from None


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
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


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One message in the form that templates expect: text content, arguments as objects."""
    where = f"messages[{index}]"
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(
            f"{where}.role is {role!r}, expected one of {', '.join(ROLES)}", "messages"
        )
    normal = {**message, "role": ROLES[role], "content": _text(message.get("content"), where)}
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise InvalidRequestError(f"{where}.tool_calls must be a list", "messages")
        normal["tool_calls"] = [_tool_call(call, where) for call in calls]
    return normal


def _text(content: Any, where: str) -> str:
    """Content as a string: null is empty, parts of text are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    texts = [p["text"] for p in parts if isinstance(p, dict) and isinstance(p.get("text"), str)]
    if len(texts) < len(parts) or any(part.get("type") != "text" for part in parts):
        raise InvalidRequestError(
            f"{where}.content must be a string or a list of text parts; images, audio and files "
            "are not served",
            "messages",
        )
    return "".join(texts)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments, JSON in the API, are an object for the template."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = json.loads(arguments or "{}")
        if not isinstance(arguments, dict):
            raise TypeError
        return {**call, "function": {**function, "arguments": arguments}}
    except (KeyError, TypeError, ValueError):
        raise InvalidRequestError(
            f"{where}.tool_calls: function.arguments must be a JSON object", "messages"
        ) from None
