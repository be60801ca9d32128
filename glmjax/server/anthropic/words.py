"""How Anthropic's API words an answer: a list of blocks, whole or piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from glmjax.errors import GlmjaxError
from glmjax.server.anthropic.blocks import SEAL
from glmjax.server.anthropic.pauses import with_pauses
from glmjax.server.choice import ChoiceDelta
from glmjax.server.frontend import Generation
from glmjax.server.http.errors import anthropic_error
from glmjax.text.parts import CallArguments, CallBegin, Content, Part, Reasoning, joined
from glmjax.types import FinishReason

Words = dict[str, Any]
PING: Words = {"type": "ping"}
PING_S = 10.0  # without an event; clients and proxies give up after some minutes of silence
SIGNATURE = "glmjax"  # of thoughts, which nobody checks; but clients drop those without one


class Piece(NamedTuple):
    """How more of a block is told: the delta's type, and the field of its text."""

    type: str
    field: str


PIECES: dict[type[Part], Piece] = {
    Reasoning: Piece("thinking_delta", "thinking"),
    Content: Piece("text_delta", "text"),
    CallArguments: Piece("input_json_delta", "partial_json"),
}


@dataclass(frozen=True)
class Answer:
    """Words for one answer.

    Attributes:
        id: of the message.
        model: its name.
        max_tokens: what the client asked for.
        shows_thoughts: else they are in their signatures alone, for when these are sent back.
        edits: of the conversation, that were applied; None: none were asked for.
    """

    id: str
    model: str
    max_tokens: int
    shows_thoughts: bool = True
    edits: list[Words] | None = None

    async def whole(self, generation: Generation) -> Words:
        """Everything at once. Raises as `Generation` does."""
        parts: list[Part] = []
        last = ChoiceDelta()
        async for last in generation:
            parts += last.parts
        content = _content(parts)
        if not self.shows_thoughts:
            content = [_sealed(block) for block in content]
        called = any(isinstance(part, CallBegin) for part in parts)
        return self._message(content, last) | self._end(last, called) | self._managed

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """The same as server-sent events; an error is the last of them."""
        try:
            async for words in with_pauses(self._pieces(generation), PING_S):
                yield _event(words or PING)
        except GlmjaxError as error:
            yield _event(anthropic_error(error, self.id))

    async def _pieces(self, generation: Generation) -> AsyncIterator[Words]:
        """It begins at once: what is in the cache is known, and told, only at the end."""
        asked = ChoiceDelta(prompt_tokens=len(generation.specs[0].prompt_ids))
        yield {"type": "message_start", "message": self._message([], asked)}
        yield PING
        blocks, last = Blocks(self.shows_thoughts), asked
        async for delta in generation:
            last = delta
            for part in delta.parts:
                for words in blocks.add(part):
                    yield words
        for words in blocks.close():
            yield words
        end = self._end(last, blocks.called)
        yield {"type": "message_delta", "delta": end, "usage": usage(last)} | self._managed
        yield {"type": "message_stop"}

    @property
    def _managed(self) -> Words:
        edits = self.edits
        return {} if edits is None else {"context_management": {"applied_edits": edits}}

    def _message(self, content: list[Words], delta: ChoiceDelta) -> Words:
        head = {"id": self.id, "type": "message", "role": "assistant", "model": self.model}
        end = {"stop_reason": None, "stop_sequence": None}
        return head | {"content": content} | end | {"usage": usage(delta)}

    def _end(self, last: ChoiceDelta, called: bool) -> Words:
        """Why it ended. What an operator ended early was cut off too: it has no word of its own."""
        matched = last.matched if isinstance(last.matched, str) else None
        if last.finish_reason is not FinishReason.STOP:
            asked = last.completion_tokens >= self.max_tokens
            full = last.finish_reason is FinishReason.LENGTH and not asked
            reason = "model_context_window_exceeded" if full else "max_tokens"
        else:
            reason = "tool_use" if called else "stop_sequence" if matched else "end_turn"
        return {"stop_reason": reason, "stop_sequence": matched if not called else None}


class Blocks:
    """The blocks of a streamed answer, one after another.

    Attributes:
        called: a tool was called.
    """

    def __init__(self, shows_thoughts: bool = True) -> None:
        self.called = False
        self._shows_thoughts = shows_thoughts
        self._thought: list[str] = []  # what is not shown of the thought that is open
        self._index = -1
        self._open: type[Part] | None = None

    def add(self, part: Part) -> list[Words]:
        """The events that tell of `part`: what ended and began before it, and its text."""
        if isinstance(part, CallBegin):
            self.called = True
            return self._begin(part)
        new = not isinstance(part, CallArguments) and type(part) is not self._open
        words = self._begin(part) if new else []
        if isinstance(part, Reasoning) and not self._shows_thoughts:
            self._thought.append(part.text)
        elif part.text:
            piece = PIECES[type(part)]
            words.append(self._delta({"type": piece.type, piece.field: part.text}))
        return words

    def close(self) -> list[Words]:
        """The end of the block that is open, if one is."""
        opened, self._open = self._open, None
        thought, self._thought = "".join(self._thought), []
        signature = SIGNATURE if self._shows_thoughts else SEAL + thought
        delta = {"type": "signature_delta", "signature": signature}
        signed = [self._delta(delta)] if opened is Reasoning else []
        stop = {"type": "content_block_stop", "index": self._index}
        return [*signed, stop] if opened else []

    def _begin(self, part: Part) -> list[Words]:
        ended = self.close()
        self._index += 1
        self._open = type(part)
        block = {"content_block": _block(part, empty=True)}
        return [*ended, {"type": "content_block_start", "index": self._index} | block]

    def _delta(self, delta: Words) -> Words:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _content(parts: Iterable[Part]) -> list[Words]:
    """All blocks of an answer."""
    blocks: list[Words] = []
    for part in joined(parts):
        if isinstance(part, CallArguments):
            blocks[-1]["input"] = orjson.Fragment(part.text)  # as it is, whatever its numbers
        else:
            blocks.append(_block(part))
    return blocks


def _block(part: Part, empty: bool = False) -> Words:
    """The block that a part begins, with its text unless that comes piece by piece."""
    text = "" if empty or isinstance(part, CallBegin) else part.text
    match part:
        case Reasoning():
            return {"type": "thinking", "thinking": text, "signature": "" if empty else SIGNATURE}
        case CallBegin(_, name):
            unique = f"toolu_{secrets.token_hex(12)}"
            return {"type": "tool_use", "id": unique, "name": name, "input": {}}
        case _:
            return {"type": "text", "text": text}


def _sealed(block: Words) -> Words:
    """The block as a client has it that does not show thoughts, but sends them back."""
    if block["type"] != "thinking":
        return block
    return block | {"thinking": "", "signature": SEAL + block["thinking"]}


def usage(delta: ChoiceDelta) -> Words:
    """Tokens counted so far; those found in the cache are not among the input tokens."""
    return {
        "input_tokens": delta.prompt_tokens - delta.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": delta.cached_tokens,
        "output_tokens": delta.completion_tokens,
        "output_tokens_details": {"thinking_tokens": delta.reasoning_tokens},
    }


def counted(size: int, edits: list[Words] | None) -> Words:
    """How many tokens there were before the edits that were applied, if any were asked for."""
    if edits is None:
        return {}
    original = size + sum(edit["cleared_input_tokens"] for edit in edits)
    return {"context_management": {"original_input_tokens": original}}


def _event(words: Words) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (words["type"].encode(), orjson.dumps(words))
