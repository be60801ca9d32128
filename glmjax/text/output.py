"""From the engine's outputs of one request to what they say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from glmjax.text.parts import Content, Part, joined
from glmjax.text.reader import Reader
from glmjax.types import FinishReason, RequestOutput, TokenLogprobs


class AnswerDelta(NamedTuple):
    """What an output adds to a request's answer.

    Attributes:
        parts: what became sure: nothing while it may yet become a stop string or a tag.
        token_ids: new tokens, those included that only ended the request.
        finish_reason: None while it goes on.
        matched: the stop string or token id that ended it, when one did.
        logprobs: one for each of `token_ids`, where they were asked for.
    """

    parts: tuple[Part, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    matched: str | int | None
    logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def text(self) -> str:
        """The text among its parts."""
        return text_of(self.parts)


def text_of(parts: Iterable[Part]) -> str:
    """The text among parts."""
    return "".join(part.text for part in parts if isinstance(part, Content))


def take_output(reader: Reader, output: RequestOutput, keep_stop: bool = False) -> AnswerDelta:
    """Feed an output to its request's reader. Tokens after the answer's end are dropped.

    Args:
        reader: of the request.
        output: what the engine put out.
        keep_stop: a matched stop token is read like any other, else it adds no text.
    """
    ids, logprobs, end = output.token_ids, output.logprobs, output.finish_reason
    body = ids if output.matched_stop is None or keep_stop else ids[:-1]
    parts: list[Part] = []
    for n, token_id in enumerate(body, 1):
        parts += reader.push(token_id)
        if reader.ended:
            ids, logprobs = ids[:n], logprobs[:n]
            break
    if end is not None and not reader.ended:
        parts += reader.finish(truncated=end is not FinishReason.STOP)
    whole = tuple(joined(parts))
    if reader.ended:
        return AnswerDelta(whole, ids, FinishReason.STOP, reader.matched, logprobs)
    return AnswerDelta(whole, ids, end, output.matched_stop, logprobs)
