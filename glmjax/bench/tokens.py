"""How long the tokens of a long chat take, of which each request sends all messages again."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import tokenizers

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import template_of
from glmjax.bench.streams import in_turn, ratios
from glmjax.server.served import ServedModel
from glmjax.tables import Table
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.mixture import draw

COLUMNS = ("case", "characters", "tokens", "ms", "ratio", "least", "most")


class Sizes(NamedTuple):
    """How many messages a chat has, and how long each is at least."""

    rounds: int = 5
    messages: int = 120
    chars: int = 3_000


QUICK = Sizes(rounds=1, messages=4, chars=100)


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Seconds to the tokens of a rendered chat, relative to the library on the whole text."""
    served = engines.served
    rng = random.Random(0)
    contents = [_content(rng, sizes.chars) for _ in range(sizes.messages)]
    before, text = _chat(served, contents[:-2]), _chat(served, contents)
    cases = {
        "whole text": partial(_library, served, text),
        "first request": partial(_encoded, served, "", text),
        "next request": partial(_encoded, served, before, text),
    }
    found = in_turn(cases, sizes.rounds, "tokens")
    tokens = len(served.tokenizer.encode(text))
    rows = [_row(name, text, tokens, found) for name in cases]
    note = (
        f"A chat of {sizes.messages} messages. Whole text: by the tokenizers library, on one core. "
        "First request: cut at special tokens, pieces encoded on all cores. Next request: the chat "
        f"was encoded before its last two messages came. Medians of {sizes.rounds} rounds."
    )
    return [Table("Tokens of a chat", COLUMNS, rows, note)]


def _chat(served: ServedModel, contents: Sequence[str]) -> str:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return template_of(served).render(messages)


def _content(rng: random.Random, chars: int) -> str:
    """What chats that were never trained on say."""
    text = ""
    while len(text) < chars:
        text += "\n".join(str(m.get("content")) for m in draw(rng, "held_out").messages)
    return text


def _library(served: ServedModel, text: str) -> float:
    backend = tokenizers.Tokenizer.from_file(str(served.folder / "tokenizer.json"))
    start = time.perf_counter()
    backend.encode(text, add_special_tokens=False)
    return time.perf_counter() - start


def _encoded(served: ServedModel, before: str, text: str) -> float:
    tokenizer = Tokenizer.from_folder(served.folder)
    tokenizer.encode(before)
    start = time.perf_counter()
    tokenizer.encode(text)
    return time.perf_counter() - start


def _row(name: str, text: str, tokens: int, found: dict[str, list[float]]) -> tuple[Any, ...]:
    taken: Sequence[float] = found[name]
    ms = 1e3 * statistics.median(taken)
    return (name, len(text), tokens, ms, *ratios(taken, found["whole text"]))
