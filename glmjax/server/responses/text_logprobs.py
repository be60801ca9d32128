"""Log probabilities of an answer's text alone, for protocols that tell of it apart."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from glmjax.server.choice import ChoiceDelta, ChoiceSpec
from glmjax.server.logprob_words import Place
from glmjax.server.served import ServedModel
from glmjax.text.lexer import Lexer, Symbol, Tag, tag_ids, written
from glmjax.text.parts import Content, Part, Reasoning
from glmjax.text.reader import AnswerReader, Reading
from glmjax.types import FinishReason, TokenLogprobs

THOUGHTS = (Tag.THINK, Tag.END_THINK)


class _Held(NamedTuple):
    """A symbol of which it is not known whether it is text, and its token, if that is its own."""

    symbol: Symbol
    place: Place | None

    @property
    def blank(self) -> bool:
        """Whether it says nothing as long as no text has begun."""
        return self.symbol in THOUGHTS or not written(self.symbol).strip()


class TextLogprobs:
    """Finds the tokens of the text among those of an answer, by reading it token by token.

    Tokens are not cut: at the text's ends they may hold white space that is no part of it.

    Args:
        spec: the answer that was asked for.
        served: the model.
    """

    def __init__(self, spec: ChoiceSpec, served: ServedModel):
        tokenizer, skipped = served.tokenizer, spec.skip_special_tokens
        reading = spec.reading or Reading(separate_reasoning=False)
        opening = served.opening(spec.prompt_ids)
        keep = spec.keep_stop
        self._reader = AnswerReader(tokenizer, reading, opening, spec.stops, skipped, keep)
        self._lexer = Lexer(tokenizer, skipped)
        self._tags = set(tag_ids(tokenizer).values())
        self._silent = tokenizer.special_ids - self._tags if skipped else frozenset()
        self._apart = reading.separate_reasoning
        self._begun = not (opening.fresh or opening.in_thought)  # text or a call has
        self._held: list[_Held] = []
        self._given: Place | None = None  # the last that was

    def take(self, delta: ChoiceDelta) -> list[Place]:
        """Those of the tokens so far that are now known to be text."""
        matched = isinstance(delta.matched, int)  # the token that ended it says nothing
        pairs = list(zip(delta.token_ids, delta.logprobs, strict=False))
        places = self._read(pairs[:-1] if matched else pairs)
        if delta.finish_reason is not None and not self._reader.ended:
            truncated = delta.finish_reason is not FinishReason.STOP
            self._held += [_Held(symbol, None) for symbol in self._lexer.finish()]
            places += self._text(self._reader.finish(truncated))
        return places

    def _read(self, pairs: Iterable[tuple[int, TokenLogprobs]]) -> list[Place]:
        places: list[Place] = []
        for token_id, logprobs in pairs:
            if self._reader.ended:
                break
            parts = self._reader.push(token_id)
            if token_id not in self._silent:
                self._hold(Place(token_id, logprobs))
            places += self._text(parts)
        return places

    def _hold(self, place: Place) -> None:
        """Put a token's symbols to those held; half a character has none yet."""
        *before, last = self._lexer.push(place.token_id) or [""]
        theirs = None if place.token_id in self._tags else place  # a tag ends half a character
        self._held += [*(_Held(symbol, theirs) for symbol in before), _Held(last, place)]
        thoughts = last in THOUGHTS and self._apart and not self._begun
        if thoughts and all(held.blank for held in self._held):
            self._held = []

    def _text(self, parts: list[Part]) -> list[Place]:
        """The tokens of the text among `parts`.

        All text is among the symbols held, as it is. Before it may stand what belongs to thoughts
        and calls, or white space that belongs to nothing; behind it what is not sure.
        """
        places: list[Place] = []
        for part in parts:
            if isinstance(part, Content):
                places += self._cut(part.text)
            elif isinstance(part, Reasoning):
                self._held = []
            else:  # the tag that ends a call may begin the next one
                self._held = [held for held in self._held[-1:] if held.symbol is Tag.CALL]
            self._begun = self._begun or not isinstance(part, Reasoning)
        return places

    def _cut(self, text: str) -> list[Place]:
        """Take `text`, and all before it, out of what is held."""
        whole = "".join(written(held.symbol) for held in self._held)
        if text not in whole:
            text = text.removeprefix("\n")  # which parts it from the text before a call
        begin, at = whole.find(text), 0
        end = begin + len(text)
        places: list[Place] = []
        rest: list[_Held] = []
        for held in self._held:
            start, at = at, at + len(written(held.symbol))
            if start >= end:
                rest.append(held)
                continue
            if at > end:
                rest.append(held._replace(symbol=written(held.symbol)[end - start :]))
            if max(at, start + 1) > begin:  # half a character is "" here
                places += self._give(held.place)
        self._held = rest
        return places

    def _give(self, place: Place | None) -> list[Place]:
        """A token that is text; it may have more symbols than one."""
        if place is None or place is self._given:
            return []
        self._given = place
        return [place]
