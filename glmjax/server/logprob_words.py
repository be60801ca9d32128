"""Log probabilities in the words of OpenAI's and SGLang's HTTP APIs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from glmjax.text.detokenizer import Detokenizer
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import TokenLogprobs


class Place(NamedTuple):
    """A token in a text.

    Attributes:
        token_id: which.
        logprobs: of it, and of others in its place; None: nothing comes before it.
        offset: characters of the text before it.
    """

    token_id: int
    logprobs: TokenLogprobs | None
    offset: int = 0


class Offsets:
    """Where in a text its tokens begin. Half a character begins where the whole one does.

    Args:
        tokenizer: of the tokens.
        skip_special_tokens: special tokens add no text.
        start: characters before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, start: int = 0):
        self._text = Detokenizer(tokenizer, (), skip_special_tokens)
        self._end = start

    def places(
        self, token_ids: Iterable[int], logprobs: Iterable[TokenLogprobs | None]
    ) -> list[Place]:
        """The text's next tokens; none of those that have no log probabilities."""
        return [
            Place(token_id, each, self._advance(token_id))
            for token_id, each in zip(token_ids, logprobs, strict=False)
        ]

    def _advance(self, token_id: int) -> int:
        begin, self._end = self._end, self._end + len(self._text.push(token_id))
        return begin


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""A token's text; bytes that are no text by themselves are written as \xhh."""
    return tokenizer.token_bytes(token_id).decode("utf-8", "backslashreplace")


def chat_words(tokenizer: Tokenizer, tokens: Iterable[Place]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""

    def word(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        name = token_name(tokenizer, token_id)
        return {"token": name, "logprob": logprob, "bytes": list(data)}

    content = [
        word(place.token_id, place.logprobs.logprob)
        | {"top_logprobs": [word(*other) for other in place.logprobs.top]}
        for place in tokens
        if place.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def completion_words(tokenizer: Tokenizer, tokens: list[Place]) -> dict[str, Any]:
    """The `logprobs` of a completion's choice; `text_offset` counts characters of its text.

    Like OpenAI's API it names half a character "bytes:" and its bytes, so that two tokens of a
    place hardly ever have one name; where they do, the likelier stands.
    """

    def name(token_id: int) -> str:
        text = token_name(tokenizer, token_id)
        return text if text.encode() == tokenizer.token_bytes(token_id) else f"bytes:{text}"

    def top(place: Place) -> dict[str, float] | None:
        if place.logprobs is None:
            return None
        names: dict[str, float] = {}
        for token_id, logprob in (*place.logprobs.top, (place.token_id, place.logprobs.logprob)):
            names.setdefault(name(token_id), logprob)
        return names

    return {
        "tokens": [name(place.token_id) for place in tokens],
        "token_logprobs": [_own(place) for place in tokens],
        "top_logprobs": [top(place) for place in tokens],
        "text_offset": [place.offset for place in tokens],
    }


def native_words(
    tokenizer: Tokenizer,
    kind: str,
    token_ids: Iterable[int],
    logprobs: Iterable[TokenLogprobs | None],
    top: bool,
    texts: bool,
) -> dict[str, Any]:
    """SGLang's lists of [log probability, id, text].

    Args:
        tokenizer: for texts.
        kind: of the tokens, input or output.
        token_ids: the tokens.
        logprobs: of each; None: nothing comes before it.
        top: also give those of the likeliest in each place.
        texts: also give tokens' texts, else null.
    """

    def triple(logprob: float | None, token_id: int) -> list[Any]:
        return [logprob, token_id, token_name(tokenizer, token_id) if texts else None]

    each = list(zip(token_ids, logprobs, strict=False))
    own = [triple(of and of.logprob, token_id) for token_id, of in each]
    others = [of and [triple(logprob, i) for i, logprob in of.top] for _, of in each]
    return {f"{kind}_token_logprobs": own} | ({f"{kind}_top_logprobs": others} if top else {})


def _own(place: Place) -> float | None:
    return None if place.logprobs is None else place.logprobs.logprob
