"""Taking an answer apart while it is generated: thought, text, tool calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from glmjax.text.detokenizer import Detokenizer, StopCutter
from glmjax.text.lexer import Lexer, Symbol, Tag, written
from glmjax.text.parts import Content, Part, Reasoning
from glmjax.text.tokenizer import Tokenizer
from glmjax.text.tool_calls import CallReader, Tools

FRONT = re.compile(r"(?:[ \t]*[\r\n]+)*")  # line breaks, and blank lines


class Reader(Protocol):
    """What makes parts of an answer's tokens.

    Attributes:
        ended: the answer is over, whatever else the model would say; nothing may be pushed then.
        matched: the stop string that ended it, if one did.
        reasoning_tokens: tokens of its thought so far.
    """

    @property
    def ended(self) -> bool: ...
    @property
    def matched(self) -> str | None: ...
    @property
    def reasoning_tokens(self) -> int: ...

    def push(self, token_id: int) -> list[Part]:
        """Take the next token; return what became sure."""
        ...

    def finish(self, truncated: bool) -> list[Part]:
        """The rest, when no more tokens come; `truncated`: the model would have gone on."""
        ...


class TextReader:
    """A `Reader` to which everything is text."""

    reasoning_tokens = 0

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer

    @property
    def matched(self) -> str | None:
        return self._detokenizer.matched

    @property
    def ended(self) -> bool:
        return self.matched is not None

    def push(self, token_id: int) -> list[Part]:
        return _content(self._detokenizer.push(token_id))

    def finish(self, truncated: bool) -> list[Part]:
        return _content(self._detokenizer.finish())


@dataclass(frozen=True)
class Reading:
    """How an answer is taken apart.

    Attributes:
        tools: the tools that may be called, with the JSON schemas of their parameters; None: calls
            are text like any other.
        separate_reasoning: the thought is no content; else it is, tags and all.
        stream_reasoning: the thought comes piece by piece, rather than whole at its end.
        parallel: there may be several calls; else the answer ends with the first.
    """

    tools: Tools | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    parallel: bool = True


@dataclass(frozen=True)
class Opening:
    """Where a prompt leaves the model.

    Attributes:
        in_thought: in a thought that its last turn opens and does not close.
        fresh: at the beginning of that thought, or of the answer; else in its middle.
    """

    in_thought: bool = False
    fresh: bool = True


class AnswerReader:
    """A `Reader` of one answer of a conversation.

    The parts, joined, are the same however the text is cut into tokens and the tokens into steps.

    - A thought is what stands between its tags at the beginning, or right behind another thought;
      nothing in it begins anything else. Later on these tags are text. One that is not closed goes
      on to the end.
    - White space around thoughts and calls is left out, but before text only its line breaks. At
      the end of the text it stays.
    - What is no call is text, as it was written. `CallReader` says what is left out of a call.
    - Stop strings end the text, and are not looked for in thoughts and calls, nor across them.

    Args:
        tokenizer: of the tokens.
        reading: what to take apart.
        opening: where the prompt leaves the model.
        stops: stop strings, none of them empty.
        skip_special_tokens: special tokens add no text.
        keep_stop: the text ends behind the stop string, else before it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        reading: Reading,
        opening: Opening,
        stops: Sequence[str] = (),
        skip_special_tokens: bool = True,
        keep_stop: bool = False,
    ):
        self.reasoning_tokens = 0
        self.ended = False
        self._reading = reading
        self._raw = not reading.separate_reasoning
        self._lexer = Lexer(tokenizer, skip_special_tokens)
        self._cutter = StopCutter(stops, keep_stop)
        self._blank: list[str] = []  # white space before it is known what begins
        self._thought = _Trimmed(front=opening.fresh)
        self._withheld: list[str] = []  # the thought, where it comes whole
        self._text = _Trimmed(front=False)
        self._at_front = opening.fresh or opening.in_thought
        self._front: list[str] = []  # white space there
        self._between = ""  # what parts text from text before a call
        self._call: CallReader | None = None
        self._calls = 0
        begins_with = self._in_thought if opening.in_thought else self._in_text
        begins = opening.fresh and not opening.in_thought
        self._state: Callable[[Symbol], list[Part]] = self._at_begin if begins else begins_with

    @property
    def matched(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._cutter.matched

    def push(self, token_id: int) -> list[Part]:
        """Take the next token; return what became sure."""
        thinking = self._state == self._in_thought
        parts = self._take(self._lexer.push(token_id))
        self.reasoning_tokens += thinking and self._state == self._in_thought
        return parts

    def finish(self, truncated: bool) -> list[Part]:
        """The rest, when no more tokens come; `truncated`: the model would have gone on."""
        parts = self._take(self._lexer.finish())
        if self.ended:
            return parts
        if self._call is not None:
            parts += self._called(self._call.finish(truncated))
            self.ended = self.matched is not None
        parts += self._end_thought()
        return parts + _content(self._text.push(self._cutter.finish()) + self._text.rest())

    def _take(self, symbols: list[Symbol]) -> list[Part]:
        parts: list[Part] = []
        for symbol in symbols:
            if not self.ended:
                parts += self._state(symbol)
        return parts

    # States

    def _at_begin(self, symbol: Symbol) -> list[Part]:
        """Nothing but white space has come since the turn or the thought before."""
        if isinstance(symbol, str) and symbol.isspace():
            self._blank.append(symbol)
            return []
        blank, self._blank = "".join(self._blank), []
        if symbol in (Tag.THINK, Tag.END_THINK):
            self._state = self._in_thought if symbol is Tag.THINK else self._at_begin
            return self._show(blank + written(symbol)) if self._raw else []
        self._state = self._in_text
        return self._take([blank, symbol])

    def _in_thought(self, symbol: Symbol) -> list[Part]:
        if symbol is Tag.END_THINK:
            self._state = self._at_begin
            return self._show(symbol.value) if self._raw else self._end_thought()
        if self._raw:
            return self._show(written(symbol))
        if symbol is Tag.THINK and not self._thought.begun:
            return []
        return self._think(written(symbol))

    def _in_text(self, symbol: Symbol) -> list[Part]:
        if symbol is Tag.CALL and self._reading.tools is not None:
            return self._begin_call(self._reading.tools)
        return self._say(written(symbol))

    def _in_call(self, symbol: Symbol) -> list[Part]:
        assert self._call is not None
        return self._called(self._call.take(symbol))

    # What they do

    def _say(self, text: str) -> list[Part]:
        if self._at_front:
            self._front.append(text)
            if not text.strip():
                return []
            text = self._between + _without_front("".join(self._front))
            self._front, self._at_front = [], False
        self._between = "\n"
        sure = self._text.push(self._cutter.push(text))
        self.ended = self.matched is not None
        return _content(sure + self._text.rest() if self.ended else sure)

    def _show(self, text: str) -> list[Part]:
        """A thought as text, in which stop strings mean nothing."""
        self._at_front, self._between = False, "\n"
        return _content(self._text.push(self._cutter.finish() + text))

    def _think(self, text: str) -> list[Part]:
        sure = self._thought.push(text)
        if self._reading.stream_reasoning:
            return [Reasoning(sure)] if sure else []
        self._withheld.append(sure)
        return []

    def _end_thought(self) -> list[Part]:
        whole, self._withheld = "".join(self._withheld), []
        self._thought = _Trimmed(front=True)
        return [Reasoning(whole)] if whole else []

    def _begin_call(self, tools: Tools) -> list[Part]:
        self._call, self._state = CallReader(self._calls, tools), self._in_call
        return _content(self._text.push(self._cutter.finish()))

    def _called(self, parts: list[Part]) -> list[Part]:
        """Parts of the call; and what follows from its end, if that was it."""
        call = self._call
        assert call is not None
        if call.broken is None and (parts or call.done):
            self._text.rest()  # white space between text and call belongs to neither
        if not call.done:
            return parts
        self._call, self._state = None, self._in_text
        if call.broken is not None:
            parts += self._say(call.broken)
        else:
            self._calls += 1
            self._at_front = True
            self.ended = not self._reading.parallel
        return parts if call.left is None else parts + self._take([call.left])


class _Trimmed:
    """Text without white space behind it, which is held until more text comes.

    Args:
        front: also without white space before it.
    """

    def __init__(self, front: bool):
        self.begun = not front
        self._held: list[str] = []

    def push(self, text: str) -> str:
        """Take more text; return what is sure."""
        text = text if self.begun else text.lstrip()
        self.begun = self.begun or bool(text)
        body = text.rstrip()
        if not body:
            self._held.append(text)
            return ""
        sure = self.rest() + body
        self._held.append(text[len(body) :])
        return sure

    def rest(self) -> str:
        """The white space held; it is forgotten then."""
        held, self._held = "".join(self._held), []
        return held


def _without_front(text: str) -> str:
    front = FRONT.match(text)
    return text[front.end() :] if front else text


def _content(text: str) -> list[Part]:
    return [Content(text)] if text else []
