"""Models that say what a script says, and what OpenAI's client makes of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import openai
from live import Live, live, wait_until

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.server.served import ServedModel

HI: list[Any] = [{"role": "user", "content": "hi"}]


def function(name: str, properties: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A tool as OpenAI's API has it; every parameter is required."""
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    return {"type": "function", "function": {"name": name, "parameters": parameters} | fields}


WEATHER = function("weather", {"city": {"type": "string"}, "days": {"type": "integer"}})
PING = function("ping", {})
# Whatever a model wants, its arguments end soon.
SWITCH = function("switch", {"lamp": {"enum": ["hall", "desk"]}, "on": {"type": "boolean"}})


def call45(name: str, **arguments: str) -> str:
    pairs = [f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items()]
    return f"\n<tool_call>{name}\n{''.join(pairs)}</tool_call>"


def call47(name: str, **arguments: str) -> str:
    pairs = [f"<arg_key>{k}</arg_key><arg_value>{v}</arg_value>" for k, v in arguments.items()]
    return f"<tool_call>{name}{''.join(pairs)}</tool_call>"


class Form(NamedTuple):
    """How a model writes what comes behind a prompt that leaves the thought to it."""

    template: str
    thought: Callable[[str], str]
    call: Callable[..., str]
    text: str  # what comes before text


FORMS = {
    "glm45": Form("chat_template.jinja", lambda t: f"\n<think>{t}</think>", call45, "\n"),
    "glm47": Form("chat_template_47.jinja", lambda t: f"{t}</think>", call47, ""),
}


def with_form(served: ServedModel, form: str, folder: Path) -> ServedModel:
    """The same model in a folder of its own, with the chat template of a form."""
    shutil.copytree(served.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    template = CHAT_TEMPLATE.with_name(FORMS[form].template)
    shutil.copyfile(template, folder / "chat_template.jinja")
    return ServedModel.load(folder, served.name)


@dataclass
class Said:
    """What a client knows of one choice."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    finish: str | None = None
    tokens: list[tuple[str, float]] = field(default_factory=list)

    @property
    def arguments(self) -> list[Any]:
        """Of each call, as JSON."""
        return [json.loads(arguments) for _, arguments in self.calls]


@dataclass
class Chat:
    """A client of a server whose model follows a script."""

    server: Live
    client: openai.OpenAI
    form: Form = FORMS["glm45"]

    def say(self, text: str, end: bool = True) -> None:
        """What the model says from now on, over and over unless it ends."""
        served = self.server.frontend.served
        ends = list(served.eos_token_ids[:1]) if end else []
        self.server.runner.script = served.tokenizer.encode(text) + ends

    def answer(self, thought: str, text: str = "", *calls: str) -> None:
        """The model thinks, says a text and makes calls, as its form has it."""
        body = self.form.text + text if text else ""
        self.say(self.form.thought(thought) + body + "".join(calls))

    def ask(self, messages: Any = HI, **options: Any) -> Any:
        """The client's own answer; the same seed every time."""
        create, fields = self.client.chat.completions.create, {"seed": 0} | options
        return create(model=self.server.model, messages=messages, **_sorted(fields))

    def stream(self, **options: Any) -> list[Any]:
        """All chunks of a stream."""
        return list(self.ask(stream=True, stream_options={"include_usage": True}, **options))

    def wait_for_drafts(self, **options: Any) -> None:
        """Ask until drafts were right: the server drafts or not, as it is quicker at the time."""

        def accepted() -> bool:
            details = self.ask(**options).usage.completion_tokens_details
            return details.accepted_prediction_tokens > 0

        wait_until(accepted)

    def both(self, **options: Any) -> Said:
        """The one choice, which is the same streamed and in one piece."""
        (said,) = self.all(**options)
        return said

    def all(self, **options: Any) -> list[Said]:
        """Every choice, the same streamed and in one piece."""
        whole, chunks = self.ask(**options), self.stream(**options)
        choices, pieces = [_whole(choice) for choice in whole.choices], streamed(chunks)
        assert choices == pieces, f"{choices} != {pieces}"
        assert _counts(chunks[-1].usage) == _counts(whole.usage)
        return choices


OWN = ("messages", "model", "stream", "stream_options", "tools", "tool_choice", "max_tokens")
OWN += ("response_format", "parallel_tool_calls", "logprobs", "top_logprobs", "n", "stop")
OWN += ("temperature", "reasoning_effort", "seed", "extra_body", "logit_bias")


def _sorted(options: dict[str, Any]) -> dict[str, Any]:
    """Fields that the client does not know go into its extra_body."""
    extra = {name: value for name, value in options.items() if name not in OWN}
    return {k: v for k, v in options.items() if k in OWN} | {"extra_body": extra}


def _counts(usage: Any) -> tuple[int, int, int]:
    details = usage.completion_tokens_details
    return usage.prompt_tokens, usage.completion_tokens, details.reasoning_tokens


def _whole(choice: Any) -> Said:
    message = choice.message
    assert message.role == "assistant"
    calls = message.tool_calls or []
    assert len({call.id for call in calls}) == len(calls)
    assert (message.content is None) <= bool(calls)
    return Said(
        message.reasoning_content or "",
        message.content or "",
        [(call.function.name, call.function.arguments) for call in calls],
        choice.finish_reason,
        _tokens(choice),
    )


def _tokens(choice: Any) -> list[tuple[str, float]]:
    found = choice.logprobs.content if choice.logprobs else []
    return [(token.token, token.logprob) for token in found]


def streamed(chunks: Iterable[Any]) -> list[Said]:
    """The choices that the chunks of a stream make, by index; their order is checked."""
    choices: dict[int, Said] = {}
    ids: dict[tuple[int, int], str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.index not in choices:
                assert choice.delta.role == "assistant"
            said = choices.setdefault(choice.index, Said())
            assert said.finish is None, "something after the end"
            _add(said, choice, ids)
    return [choices[index] for index in sorted(choices)]


def _add(said: Said, choice: Any, ids: dict[tuple[int, int], str]) -> None:
    delta = choice.delta
    said.reasoning += getattr(delta, "reasoning_content", None) or ""
    said.content += delta.content or ""
    said.finish = choice.finish_reason
    said.tokens += _tokens(choice)
    for call in delta.tool_calls or []:
        if call.id is not None:
            assert call.index == len(said.calls), "calls come one after another"
            assert (call.type, call.function.arguments) == ("function", "")
            assert call.id not in ids.values()
            ids[choice.index, call.index] = call.id
            said.calls.append((call.function.name, ""))
        else:
            assert (call.index, call.function.name) == (len(said.calls) - 1, None)
            name, arguments = said.calls[call.index]
            said.calls[call.index] = (name, arguments + call.function.arguments)


@contextlib.contextmanager
def chatting(served: ServedModel, form: str = "glm45", **engine_options: Any) -> Iterator[Chat]:
    """A server, and a client of it."""
    with live(served, **engine_options) as server, server.openai as client:
        yield Chat(server, client, FORMS[form])
