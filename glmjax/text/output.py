"""From the engine's outputs of one request to its text."""

from __future__ import annotations

from typing import NamedTuple

from glmjax.text.detokenizer import Detokenizer
from glmjax.types import FinishReason, RequestOutput, TokenLogprobs


class TextDelta(NamedTuple):
    """What an output adds to a request's text.

    Attributes:
        text: new text; "" while it may yet become a stop string.
        token_ids: new tokens, those included that only ended the request.
        finish_reason: None while it goes on.
        matched: the stop string or token id that ended it, when one did.
        logprobs: one for each of `token_ids`, where they were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    matched: str | int | None
    logprobs: tuple[TokenLogprobs, ...] = ()


def take_output(detokenizer: Detokenizer, output: RequestOutput) -> TextDelta:
    """Feed an output to its request's detokenizer. Tokens after a stop string are dropped."""
    ids, logprobs = output.token_ids, output.logprobs
    body = ids if output.matched_stop is None else ids[:-1]
    pieces: list[str] = []
    for n, token_id in enumerate(body, 1):
        pieces.append(detokenizer.push(token_id))
        if (stop := detokenizer.matched) is not None:
            return TextDelta("".join(pieces), ids[:n], FinishReason.STOP, stop, logprobs[:n])
    if output.finish_reason is not None:
        pieces.append(detokenizer.finish())
    stop, text = detokenizer.matched, "".join(pieces)
    if stop is not None:
        return TextDelta(text, ids, FinishReason.STOP, stop, logprobs)
    return TextDelta(text, ids, output.finish_reason, output.matched_stop, logprobs)
