"""Tokens to text while they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from glmjax.text.stops import stop_matcher
from glmjax.text.tokenizer import Tokenizer


class Detokenizer:
    """The text of one sequence, handed out as soon as it is sure; in time linear in its length.

    What is not sure yet is half a character, or what may become a stop string. The text is the same
    however it is cut into tokens, and ends before the stop string that is first complete (before
    the longest, where several end at once).

    Args:
        tokenizer: gives the bytes of a token.
        stops: stop strings, none of them empty.
        skip_special_tokens: special tokens add no text.

    Attributes:
        matched: the stop string that was found, or None. Nothing may be pushed after it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: Sequence[str] = (), skip_special_tokens: bool = True
    ):
        self.matched: str | None = None
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matcher = stop_matcher(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that became sure."""
        if token_id in self._skipped:
            return ""
        return self._release(self._utf8.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """The rest, when no more tokens come; half a character becomes U+FFFD."""
        text = self._release(self._utf8.decode(b"", True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self._matcher is None:
            return text
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            self._state = self._matcher.step(self._state, char)
            length = self._matcher.matched(self._state)
            if length:
                self.matched, self._held = pending[end - length : end], ""
                return pending[: end - length]
        sure = len(pending) - self._matcher.pending(self._state)
        self._held = pending[sure:]
        return pending[:sure]
