"""Log probabilities of an answer's text alone, for protocols that tell of it apart."""

from __future__ import annotations

from collections.abc import Iterable

from glmjax.server.choice import ChoiceDelta, ChoiceSpec
from glmjax.server.logprob_words import Place
from glmjax.server.served import ServedModel
from glmjax.text.lexer import Tag
from glmjax.text.parts import Content, Part
from glmjax.text.reader import AnswerReader, Reading
from glmjax.types import FinishReason, TokenLogprobs


class TextLogprobs:
    """Finds the tokens of the text among those of an answer, by reading it token by token.

    Tokens are not cut: at the text's ends they may hold white space that is no part of it.

    Args:
        spec: the answer that was asked for.
        served: the model.
    """

    def __init__(self, spec: ChoiceSpec, served: ServedModel):
        reading = spec.reading or Reading(separate_reasoning=False)
        opening = served.opening(spec.prompt_ids)
        self._reader = AnswerReader(
            served.tokenizer, reading, opening, spec.stops, spec.skip_special_tokens
        )
        self._bytes = served.tokenizer.token_bytes
        found = ((served.tokenizer.find(tag.value), tag.value) for tag in Tag)
        self._tags = {token_id: text for token_id, text in found if token_id is not None}
        self._held: list[Place] = []  # tokens of which it is not known whose they are

    def take(self, delta: ChoiceDelta) -> list[Place]:
        """Those of the tokens so far that are now known to be text."""
        matched = isinstance(delta.matched, int)  # the token that ended it says nothing
        pairs = list(zip(delta.token_ids, delta.logprobs, strict=False))
        places = self._read(pairs[:-1] if matched else pairs)
        if delta.finish_reason is not None and not self._reader.ended:
            truncated = delta.finish_reason is not FinishReason.STOP
            places += self._text(self._reader.finish(truncated))
        return places

    def _read(self, pairs: Iterable[tuple[int, TokenLogprobs]]) -> list[Place]:
        places: list[Place] = []
        for token_id, logprobs in pairs:
            if self._reader.ended:
                break
            self._held.append(Place(token_id, logprobs))
            places += self._text(self._reader.push(token_id))
            if token_id in self._tags:
                self._held = []
        return places

    def _text(self, parts: list[Part]) -> list[Place]:
        """The tokens of the text among `parts`; white space behind it may be the next one's."""
        text = "".join(part.text for part in parts if isinstance(part, Content))
        if not text:
            return []
        held, self._held = self._held, []
        own = [place for place in held if self._tags.get(place.token_id, text) in text]
        while own and self._blank(own[0]) and not text[:1].isspace():
            own.pop(0)
        while own and self._blank(own[-1]) and not text[-1:].isspace():
            self._held.insert(0, own.pop())
        return own

    def _blank(self, place: Place) -> bool:
        return self._bytes(place.token_id).isspace()
