"""How the two endpoints of OpenAI's API word their answers."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from glmjax.server.choice import ChoiceDelta, ChoiceSpec
from glmjax.server.collect import Collected
from glmjax.server.draft_words import draft_words
from glmjax.server.logprob_words import Offsets, Place, chat_words, completion_words
from glmjax.text.parts import (
    CallArguments,
    CallBegin,
    Content,
    Message,
    Part,
    Reasoning,
    joined,
)
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import FinishReason


class Shape(NamedTuple):
    """How an endpoint words its answers."""

    prefix: str
    object: str
    chunk_object: str
    opening: dict[str, Any] | None  # what a streamed choice begins with
    piece: Callable[[Part], dict[str, Any]]  # of a stream
    whole: Callable[[Message], dict[str, Any]]
    nothing: dict[str, Any]  # a piece with no part
    logprobs: Callable[[Tokenizer, list[Place]], dict[str, Any]]


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallBegin(call, name):
            return {"tool_calls": [{"index": call} | _call(name, "")]}
        case CallArguments(call, text):
            return {"tool_calls": [{"index": call, "function": {"arguments": text}}]}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _message(said: Message) -> dict[str, Any]:
    """The client may send it back as it is."""
    words: dict[str, Any] = {
        "role": "assistant",
        "content": said.content or (None if said.calls else ""),
        "reasoning_content": said.reasoning or None,
    }
    calls = [_call(call.name, call.arguments) for call in said.calls]
    return words | ({"tool_calls": calls} if calls else {})


CHAT = Shape(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    {"delta": {"role": "assistant", "content": "", "reasoning_content": None}},
    lambda part: {"delta": _delta(part)},
    lambda said: {"message": _message(said)},
    {"delta": {}},
    chat_words,
)
COMPLETION = Shape(
    "cmpl",
    "text_completion",
    "text_completion",
    None,
    lambda part: {"text": part.text if isinstance(part, Content) else ""},
    lambda said: {"text": said.content},
    {"text": ""},
    completion_words,
)


class Writer:
    """Words for what is known of one choice, all at once or piece by piece.

    Args:
        shape: of its endpoint.
        spec: what was asked for.
        tokenizer: the model's.
        echo: the prompt comes first.
        ids: token ids are told, with the prompt's in completions.
    """

    def __init__(
        self, shape: Shape, spec: ChoiceSpec, tokenizer: Tokenizer, echo: bool, ids: bool = False
    ):
        self._shape, self._spec, self._tokenizer = shape, spec, tokenizer
        self._prompt = tokenizer.decode(spec.prompt_ids, skip_special_tokens=False) if echo else ""
        self._echo = echo  # and it has not come yet
        self._offsets = Offsets(tokenizer, spec.skip_special_tokens, len(self._prompt))
        self._ids = ids
        self._begun = self._called = False

    def whole(self, choice: Collected) -> dict[str, Any]:
        """The whole choice."""
        said, end = choice.message, choice.last.finish_reason
        said.content = self._prompt + said.content
        logprobs = self._logprobs(choice)
        words = _choice(
            choice.last, self._shape.whole(said), logprobs, _finish(end, bool(said.calls))
        )
        return words | self._token_ids(choice, first=True)

    def pieces(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """What a delta adds, behind the opening if it is the first; and its end by itself."""
        first, self._begun = not self._begun, True
        opening = [self._shape.opening] if first and self._shape.opening else []
        parts = [self._shape.piece(part) for part in self._with_prompt(delta.parts)]
        logprobs, ids = self._logprobs(delta), self._token_ids(delta, first)
        end, tokens = delta.finish_reason, delta.token_ids or (ids and first)
        self._called = self._called or any(isinstance(part, CallBegin) for part in delta.parts)
        if (logprobs or ids) and tokens and not parts:
            parts = [self._shape.nothing]
        words = [_choice(delta, part, None, None) for part in opening]
        words += [_choice(delta, part, logprobs, None) | ids for part in parts[:1]]
        words += [_choice(delta, part, None, None) for part in parts[1:]]
        if end is not None:
            words.append(_choice(delta, self._shape.nothing, None, _finish(end, self._called)))
        return words

    def _with_prompt(self, parts: Sequence[Part]) -> list[Part]:
        """`parts`, and before the very first the prompt where it is wanted."""
        return joined([Content(self._prompt), *parts]) if self._echo else list(parts)

    def _logprobs(self, more: ChoiceDelta | Collected) -> dict[str, Any] | None:
        """Log probabilities of what comes next."""
        tokens = self._offsets.places(more.token_ids, more.logprobs)
        if self._echo:
            self._echo = False
            offsets = Offsets(self._tokenizer, skip_special_tokens=False)
            tokens = offsets.places(self._spec.prompt_ids, more.prompt_logprobs) + tokens
        asked = self._spec.sampling.logprobs is not None
        return self._shape.logprobs(self._tokenizer, tokens) if asked else None

    def _token_ids(self, more: ChoiceDelta | Collected, first: bool) -> dict[str, Any]:
        """Those of what comes next, if they are told."""
        if not self._ids:
            return {}
        prompt = {"prompt_token_ids": self._spec.prompt_ids} if self._shape is COMPLETION else {}
        return {"token_ids": more.token_ids} | (prompt if first else {})


def _finish(end: FinishReason | None, called: bool) -> str | None:
    """In OpenAI's words; an answer that is cut off in a call is not one of calls."""
    return "tool_calls" if called and end is FinishReason.STOP else end


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
            "reasoning_tokens": sum(delta.reasoning_tokens for delta in last),
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": sum(d.drafted_tokens for d in last) - accepted,
        },
    } | ({"speculative_decoding": drafts} if drafts else {})
