"""What a generator makes: a conversation whose last message is the one right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

Split = Literal["train", "held_out"]
Message = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """A conversation in OpenAI's form.

    Attributes:
        task: a name of the mixture, such as "add".
        messages: the whole conversation; the last one is the assistant's, the answer asked for.
        tools: function schemas offered to the model.
        thinking: `enable_thinking` for the chat template.
    """

    task: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    thinking: bool = True


class Exchange(NamedTuple):
    """One question with its answer; the thought is shown only where thinking is on."""

    user: str
    thought: str
    answer: str


def conversation(
    task: str,
    exchanges: Sequence[Exchange],
    thinking: bool,
    system: str | None = None,
    tools: Sequence[dict[str, Any]] = (),
) -> Problem:
    """A problem of questions and answers in turn; only the last answer has its thought."""
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for exchange in exchanges:
        messages.append({"role": "user", "content": exchange.user})
        messages.append({"role": "assistant", "content": exchange.answer})
    if thinking:
        messages[-1]["reasoning_content"] = exchanges[-1].thought
    return Problem(task, tuple(messages), tuple(tools), thinking)
