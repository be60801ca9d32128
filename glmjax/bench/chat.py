"""How much of a long chat's prompts is found in the prefix cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import GREEDY
from glmjax.bench.streams import answer, follow
from glmjax.engine import Engine
from glmjax.server.served import ServedModel
from glmjax.tables import Table
from glmjax.types import Request, SamplingParams

TOOL_CALL = "<tool_call>"


def _tool(name: str, description: str, **kinds: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in kinds.items()}
    parameters = {"type": "object", "properties": properties, "required": list(kinds)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("sky_report", "Get the weather", city="string"),
    _tool("set_timer", "Set a timer", minutes="integer"),
    _tool("price_lookup", "Look up the price", item="string"),
]
# A question, and what a tool says if one is called.
TURNS = (
    ("Please check the weather in Bergen.", {"weather": "rain"}),
    ("Set a timer for 12 minutes.", {"status": "done"}),
    ("What is the price of lamp?", {"price": 35}),
    ("Check the weather in Oslo and set a timer for 5 minutes.", {"status": "done"}),
    ("What is 4821 + 397?", {"error": "unknown"}),
    ("Look up the price of chair.", {"price": 18}),
)

Message = dict[str, Any]


class Sizes(NamedTuple):
    """How many questions, and how long answers may be."""

    rounds: int = 1
    turns: int = len(TURNS)
    new_tokens: int = 128


QUICK = Sizes(turns=2, new_tokens=8)


class Asked(NamedTuple):
    """One request of a chat.

    Attributes:
        turn: number of the question.
        last: role of the message before the answer.
        prompt: its tokens.
        cached: how many of them were found in the cache.
        shared: how many are those of the request before it, or of the answer to that.
        thought_at: where the first answer to the question before begins, if that answer's thought
            is shown no more; there a prompt cannot go on as the one before did.
    """

    turn: int
    last: str
    prompt: int
    cached: int
    shared: int
    thought_at: int | None


class Chat:
    """A chat with an engine, whose own answers become part of the prompts.

    Args:
        thinking: `enable_thinking` of the chat template.
    """

    def __init__(self, engine: Engine, served: ServedModel, new_tokens: int, thinking: bool):
        self._engine, self._served, self._thinking = engine, served, thinking
        self._sampling = SamplingParams(new_tokens, temperature=GREEDY.temperature)
        self._messages: list[Message] = []
        self._before: Sequence[int] = ()  # the last prompt, and what was answered
        self._question_at: int | None = None  # where the answers to the last question began
        self.asked: list[Asked] = []

    def turn(self, number: int, question: str, result: Any) -> None:
        """Ask; if a tool is called, give its result and ask again."""
        called = self._ask(number, {"role": "user", "content": question})
        if called:
            self._ask(number, {"role": "tool", "content": json.dumps(result)})

    def _ask(self, number: int, message: Message) -> bool:
        """Send a message; whether the answer calls a tool."""
        self._messages.append(message)
        prompt = self._prompt()
        broken = self._question_at if message["role"] == "user" and self._thinking else None
        done = answer(self._engine, [Request("chat", tuple(prompt), self._sampling)])
        shared, cached = _common(prompt, self._before), done.cached["chat"]
        self.asked.append(Asked(number, message["role"], len(prompt), cached, shared, broken))
        if message["role"] == "user":
            self._question_at = len(prompt)
        self._before = [*prompt, *done.tokens["chat"]]
        text = self._served.tokenizer.decode(done.tokens["chat"])
        self._messages.append({"role": "assistant", "content": text})
        return TOOL_CALL in text

    def _prompt(self) -> list[int]:
        variables: dict[str, Any] = {} if self._thinking else {"enable_thinking": False}
        return self._served.chat_prompt(self._messages, tools=TOOLS, **variables)


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Cached share of each prompt of a chat with tools, and of whole chats."""
    chats = {thinking: _run(engines, sizes, thinking) for thinking in (True, False)}
    columns = (
        "question",
        "last message",
        "prompt tokens",
        "cached",
        "share",
        "as before",
        "first thought at",
    )
    rows = [_row(asked) for asked in chats[True]]
    note = (
        "A chat with tools, thinking on, each prompt with the model's own answers. As before: "
        "tokens that go on like the request before and its answer. First thought: where the answer "
        "to the question before begins, whose thought the template leaves out once another "
        "question follows."
    )
    whole = [("thinking" if on else "not thinking", *_total(chats[on])) for on in chats]
    return [
        Table("Chat, by request", columns, rows, note),
        Table("Whole chats", ("chat", "requests", "prompt tokens", "cached", "share"), whole),
    ]


def _run(engines: Engines, sizes: Sizes, thinking: bool) -> list[Asked]:
    engine = engines.engine()
    engine.flush_cache()
    chat = Chat(engine, engines.served, sizes.new_tokens, thinking)
    label = "chat" if thinking else "chat, not thinking"
    for i, (question, result) in enumerate(follow(TURNS[: sizes.turns], label), 1):
        chat.turn(i, question, result)
    return chat.asked


def _row(asked: Asked) -> tuple[Any, ...]:
    share = asked.cached / asked.prompt
    counts = asked.prompt, asked.cached, share, asked.shared, asked.thought_at
    return (str(asked.turn), asked.last, *counts)


def _total(asked: Sequence[Asked]) -> tuple[Any, ...]:
    prompt, cached = sum(a.prompt for a in asked), sum(a.cached for a in asked)
    return len(asked), prompt, cached, cached / prompt


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of first tokens that are equal."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
