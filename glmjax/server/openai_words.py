"""How the two endpoints of OpenAI's API word their answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from glmjax.server.choice import ChoiceDelta, ChoiceSpec
from glmjax.server.collect import Collected
from glmjax.server.draft_words import draft_words
from glmjax.server.logprob_words import Offsets, Place, chat_words, completion_words
from glmjax.text.tokenizer import Tokenizer


class Shape(NamedTuple):
    """How an endpoint words its answers."""

    prefix: str
    object: str
    chunk_object: str
    opening: dict[str, Any] | None  # first chunk of a streamed choice
    piece: Callable[[str], dict[str, Any]]  # text, in a stream
    whole: Callable[[str], dict[str, Any]]  # text, at once
    logprobs: Callable[[Tokenizer, list[Place]], dict[str, Any]]


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    {"delta": {"role": "assistant", "content": ""}},
    lambda text: {"delta": {"content": text} if text else {}},
    lambda text: {"message": {"role": "assistant", "content": text}},
    chat_words,
)
COMPLETION = Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    None,
    lambda text: {"text": text},
    lambda text: {"text": text},
    completion_words,
)


class Writer:
    """Words for what is known of one choice, all at once or piece by piece.

    Args:
        shape: of its endpoint.
        spec: what was asked for.
        tokenizer: the model's.
        echo: the prompt comes first.
    """

    def __init__(self, shape: Shape, spec: ChoiceSpec, tokenizer: Tokenizer, echo: bool):
        self._shape, self._spec, self._tokenizer = shape, spec, tokenizer
        self._prompt = tokenizer.decode(spec.prompt_ids, skip_special_tokens=False) if echo else ""
        self._echo = echo  # and it has not come yet
        self._offsets = Offsets(tokenizer, spec.skip_special_tokens, len(self._prompt))

    def whole(self, choice: Collected) -> dict[str, Any]:
        """The whole choice."""
        text, logprobs = self._take(choice)
        return _choice(choice.last, self._shape.whole(text), logprobs, choice.last.finish_reason)

    def pieces(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """What a delta adds, and its end by itself."""
        text, logprobs = self._take(delta)
        words, end = [], delta.finish_reason
        if text or (logprobs and delta.token_ids):
            words.append(_choice(delta, self._shape.piece(text), logprobs, None))
        if end is not None:
            words.append(_choice(delta, self._shape.piece(""), None, end))
        return words

    def _take(self, more: ChoiceDelta | Collected) -> tuple[str, dict[str, Any] | None]:
        """Text and log probabilities of what comes next."""
        text, tokens = more.text, self._offsets.places(more.token_ids, more.logprobs)
        if self._echo:
            self._echo, text = False, self._prompt + text
            offsets = Offsets(self._tokenizer, skip_special_tokens=False)
            tokens = offsets.places(self._spec.prompt_ids, more.prompt_logprobs) + tokens
        asked = self._spec.sampling.logprobs is not None
        return text, self._shape.logprobs(self._tokenizer, tokens) if asked else None


def opening(shape: Shape, index: int) -> dict[str, Any] | None:
    """What a choice's stream begins with, if with anything."""
    first = ChoiceDelta(index=index)
    return None if shape.opening is None else _choice(first, shape.opening, None, None)


def _choice(
    delta: ChoiceDelta, words: dict[str, Any], logprobs: dict[str, Any] | None, end: str | None
) -> dict[str, Any]:
    matched = {"matched_stop": delta.matched} if end else {}
    return {"index": delta.index, **words, "logprobs": logprobs, "finish_reason": end} | matched


def usage(choices: list[Collected], n: int) -> dict[str, Any]:
    """Tokens counted; a prompt counts once, however many choices it has."""
    last = [choice.last for choice in choices]
    prompt_tokens = sum(delta.prompt_tokens for delta in last[::n])
    completion_tokens = sum(delta.completion_tokens for delta in last)
    accepted = sum(delta.accepted_tokens for delta in last)
    drafts = draft_words(delta.accept_lengths for delta in last)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(d.cached_tokens for d in last[::n])},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(d.drafted_tokens for d in last) - accepted,
        },
    } | ({"speculative_decoding": drafts} if drafts else {})
