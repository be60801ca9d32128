"""Tokens to text while they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from glmjax.text.stops import stop_matcher
from glmjax.text.tokenizer import Tokenizer


class StopCutter:
    """Text up to the stop string that is first complete, as soon as it is sure.

    Where several are complete at once, the longest counts.

    Args:
        stops: stop strings, none of them empty.
        keep: the text ends behind the stop string, else before it.

    Attributes:
        matched: the stop string that was found, or None. Nothing may be pushed after it.
    """

    def __init__(self, stops: Sequence[str], keep: bool = False):
        self.matched: str | None = None
        self._keep = keep
        self._matcher = stop_matcher(tuple(stops)) if stops else None
        self._state = 0
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what became sure."""
        if self._matcher is None:
            return text
        pending = self._held + text
        for end, char in enumerate(text, len(self._held) + 1):
            self._state = self._matcher.step(self._state, char)
            length = self._matcher.matched(self._state)
            if length:
                self.matched, self._held = pending[end - length : end], ""
                return pending[: end if self._keep else end - length]
        sure = len(pending) - self._matcher.pending(self._state)
        self._held = pending[sure:]
        return pending[:sure]

    def finish(self) -> str:
        """The rest, when no more text comes."""
        held, self._held, self._state = self._held, "", 0
        return held


class Detokenizer:
    """The text of one sequence, handed out as soon as it is sure; in time linear in its length.

    What is not sure yet is half a character, or what may become a stop string. The text is the same
    however it is cut into tokens.

    Args:
        tokenizer: gives the bytes of a token.
        stops: stop strings, none of them empty.
        skip_special_tokens: special tokens add no text.
        keep_stop: the text ends behind the stop string, else before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._cutter = StopCutter(stops, keep_stop)

    @property
    def matched(self) -> str | None:
        """The stop string that was found, or None. Nothing may be pushed after it."""
        return self._cutter.matched

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that became sure."""
        if token_id in self._skipped:
            return ""
        return self._cutter.push(self._utf8.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """The rest, when no more tokens come; half a character becomes U+FFFD."""
        text = self._cutter.push(self._utf8.decode(b"", True))
        return text if self.matched is not None else text + self._cutter.finish()
