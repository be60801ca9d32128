"""Answers as tokens, in any spelling, and what a reader makes of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import tokenizers

import glmjax
from glmjax.text.lexer import Symbol, Tag
from glmjax.text.output import take_output
from glmjax.text.parts import Message, Part, joined, message
from glmjax.text.reader import AnswerReader, Opening, Reading
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import FinishReason, RequestOutput

NANO = Path(glmjax.__file__).parent / "assets" / "glm-nano"
BEYOND = 10**6  # an id that no tokenizer has


class Chunks(Tokenizer):
    """A tokenizer that learns any text, or bytes, as one more token."""

    def __init__(self, base: Tokenizer):
        super().__init__(base._backend)
        self._chunks: dict[int, bytes] = {}

    def learn(self, text: str | bytes) -> int:
        token_id = self.size + len(self._chunks)
        self._chunks[token_id] = text.encode() if isinstance(text, str) else text
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        return self._chunks.get(token_id) or super().token_bytes(token_id)


def without(base: Tokenizer, *removed: Tag) -> Tokenizer:
    """The same tokenizer, in which some tags are letters like any other."""
    config = json.loads(base._backend.to_str())
    tags = {tag.value for tag in removed}
    config["added_tokens"] = [t for t in config["added_tokens"] if t["content"] not in tags]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(config)))


TAGGED = Tokenizer.from_folder(NANO)
PLAIN = without(TAGGED, *Tag)
TAG_IDS = {tag: TAGGED.token_id(tag.value) for tag in Tag}
TAGS_BY_ID = {token_id: tag for tag, token_id in TAG_IDS.items()}
SPECIAL_IDS = sorted(TAGGED.special_ids)
BYTE_IDS = {
    data[0]: i for i in range(TAGGED.size) if len(data := TAGGED.token_bytes(i)) == 1
}  # the tokens that are one byte


def bytes_of(text: str) -> list[int]:
    """A text byte by byte; tags in it are letters."""
    return [BYTE_IDS[byte] for byte in text.encode()]


def spelled(*symbols: Symbol) -> list[int]:
    """Tags as their tokens, text byte by byte."""
    return [i for s in symbols for i in ([TAG_IDS[s]] if isinstance(s, Tag) else bytes_of(s))]


def cut(tokenizer: Chunks, symbols: Iterable[Symbol], seed: int) -> list[int]:
    """Tags as their tokens, text in random pieces; some are single bytes."""
    rng, ids = random.Random(seed), []
    for symbol in symbols:
        if isinstance(symbol, Tag):
            ids.append(TAG_IDS[symbol])
            continue
        while symbol:
            size = rng.choice([1, 1, 2, 3, 8, 99])
            piece, symbol = symbol[:size], symbol[size:]
            ids += bytes_of(piece) if rng.random() < 0.3 else [tokenizer.learn(piece)]
    return ids


def merged(ids: Sequence[int], tokenizer: Tokenizer = TAGGED, skip: bool = True) -> list[Symbol]:
    """What tokens say, by definition: tags, and each text between two of them as one."""
    symbols: list[Symbol] = []
    for tag, run in groupby(ids, TAGS_BY_ID.get):
        run = list(run)
        symbols += [tag] * len(run) if tag is not None else [tokenizer.decode(run, skip)]
    return [symbol for symbol in symbols if symbol]


def marked(text: str) -> list[Symbol]:
    """A text as a tokenizer with tags would see it."""
    return merged(TAGGED.encode(text))


class Answer(NamedTuple):
    """What a reader made of tokens.

    Attributes:
        parts: joined.
        end: why it ended.
        matched: the stop string that ended it, if one did.
        reasoning_tokens: as the reader has them.
        token_ids: the tokens up to the end.
    """

    parts: list[Part]
    end: FinishReason | None
    matched: str | int | None
    reasoning_tokens: int
    token_ids: list[int]

    @property
    def message(self) -> Message:
        return message(self.parts)


def read(
    ids: Sequence[int],
    reading: Reading,
    opening: Opening = Opening(),  # noqa: B008, it is frozen
    stops: Sequence[str] = (),
    *,
    tokenizer: Tokenizer = TAGGED,
    end: FinishReason = FinishReason.STOP,
    steps: Sequence[int] = (1,),
    skip: bool = True,
) -> Answer:
    """Read an answer that comes in steps of so many tokens, again and again."""
    reader = AnswerReader(tokenizer, reading, opening, stops, skip)
    parts: list[Part] = []
    used: list[int] = []
    for step, last in _steps(ids, steps):
        delta = take_output(reader, _output(step, end if last else None))
        assert list(delta.parts) == joined(delta.parts)
        parts += delta.parts
        used += delta.token_ids
        if delta.finish_reason is not None:
            whole = joined(parts)
            return Answer(whole, delta.finish_reason, delta.matched, reader.reasoning_tokens, used)
    raise AssertionError("it did not end")


def _steps(ids: Sequence[int], sizes: Sequence[int]) -> Iterable[tuple[tuple[int, ...], bool]]:
    """Pieces of `ids`, and which is the last."""
    begin, n = 0, 0
    while True:
        end = begin + sizes[n % len(sizes)]
        yield tuple(ids[begin:end]), end >= len(ids)
        if end >= len(ids):
            return
        begin, n = end, n + 1


def _output(ids: tuple[int, ...], end: FinishReason | None) -> RequestOutput:
    return RequestOutput("r", ids, end, None, 1, len(ids), 0)
