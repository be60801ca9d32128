"""Tokens to the tags and the text between them."""

from __future__ import annotations

import codecs
import enum
from collections.abc import Iterable

from glmjax.text.stops import StopMatcher, stop_matcher
from glmjax.text.tokenizer import Tokenizer


class Tag(enum.Enum):
    """What marks the parts of an answer; the value is how it is written."""

    THINK = "<think>"
    END_THINK = "</think>"
    CALL = "<tool_call>"
    END_CALL = "</tool_call>"
    KEY = "<arg_key>"
    END_KEY = "</arg_key>"
    VALUE = "<arg_value>"
    END_VALUE = "</arg_value>"


Symbol = Tag | str


def tag_ids(tokenizer: Tokenizer) -> dict[Tag, int | None]:
    """Of each tag its token; None where it is spelled by several."""
    return {tag: tokenizer.find(tag.value) for tag in Tag}


def written(symbol: Symbol) -> str:
    """The text of a tag, or text itself."""
    return symbol if isinstance(symbol, str) else symbol.value


class Lexer:
    """Tags and text, as soon as they are sure, whatever the tokens they come in.

    A tag that is a token of the tokenizer is known by its id: the same letters from other tokens
    are text, as a model writes them that speaks of tags. Others are found in the text.

    Args:
        tokenizer: of the tokens.
        skip_special_tokens: special tokens that are no tags add no text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        ids = tag_ids(tokenizer)
        self._tags = {token_id: tag for tag, token_id in ids.items() if token_id is not None}
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spelled = _Spelled(tag for tag, token_id in ids.items() if token_id is None)

    def push(self, token_id: int) -> list[Symbol]:
        """Take the next token."""
        tag = self._tags.get(token_id)
        if tag is not None:
            return [*self.finish(), tag]
        if token_id in self._skipped:
            return []
        return self._spelled.push(self._utf8.decode(self._token_bytes(token_id)))

    def finish(self) -> list[Symbol]:
        """The rest, when no more text comes; half a character becomes U+FFFD."""
        return self._spelled.push(self._utf8.decode(b"", True)) + self._spelled.finish()


class _Spelled:
    """Finds tags that are written out in text."""

    def __init__(self, tags: Iterable[Tag]):
        self._tags = {tag.value: tag for tag in tags}
        self._matcher: StopMatcher | None = stop_matcher(tuple(self._tags)) if self._tags else None
        self._state = 0
        self._held = ""

    def push(self, text: str) -> list[Symbol]:
        if self._matcher is None:
            return [text] if text else []
        symbols: list[Symbol] = []
        pending, begin = self._held + text, 0
        for end, char in enumerate(text, len(self._held) + 1):
            self._state = self._matcher.step(self._state, char)
            if length := self._matcher.matched(self._state):
                tag = self._tags[pending[end - length : end]]
                symbols += [pending[begin : end - length], tag]
                begin, self._state = end, 0
        sure = len(pending) - self._matcher.pending(self._state)
        symbols.append(pending[begin:sure])
        self._held = pending[sure:]
        return [symbol for symbol in symbols if symbol]

    def finish(self) -> list[Symbol]:
        held, self._held, self._state = self._held, "", 0
        return [held] if held else []
