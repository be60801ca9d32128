"""What users of an engine hand in and get back. numpy only, never jax."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from glmjax.errors import InvalidRequestError

MAX_SEED = 2**32 - 1
MAX_INT = 2**31 - 1  # plans cross to the device as int32
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_END_IDS = 64  # stop tokens and the model's own end tokens together
MAX_STOP_IDS = 48


class FinishReason(enum.StrEnum):
    """Why a request ended, in the words of OpenAI's and SGLang's APIs."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to end.

    A token's logit is changed by the penalties, then by its bias; then temperature, top_k, top_p
    and min_p choose among what is left. Frequency and presence penalties count the output only,
    the repetition penalty the prompt too (OpenAI's and CTRL's formulas).

    Attributes:
        max_new_tokens: end after this many tokens; None: as far as the context reaches.
        min_new_tokens: no end token is sampled before this many tokens, unless a constraint
            allows nothing else.
        temperature: 0 is greedy.
        top_k: sample among the k most likely; -1: all.
        top_p: sample among the smallest set whose probability reaches top_p.
        min_p: sample among tokens at least min_p times as likely as the likeliest.
        frequency_penalty: taken from a token's logit for each time it was put out, -2 to 2.
        presence_penalty: taken from a token's logit once it was put out, -2 to 2.
        repetition_penalty: divides positive logits, multiplies negative ones of tokens seen.
        logit_bias: added to the logits of these token ids.
        seed: unsigned 32 bits; what a request samples depends on it and on the position only.
        stop_token_ids: these end the request, besides the model's own end tokens.
        ignore_eos: do not end on the model's own end tokens.
        logprobs: also give the log probability of each new token, and of this many likeliest
            tokens in its place, 0 to 20; None: of none. They are the model's own: from its logits
            before temperature, penalties, bias and constraints.
        prompt_logprobs_start: also give those of prompt tokens, from this position on; None: of
            none. Needs `logprobs`. The first token has none: nothing comes before it.

    Raises:
        InvalidRequestError: a value is out of its range or of a wrong type; `param` names it.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs_start: int | None = None

    def __post_init__(self) -> None:
        for name, (holds, expected) in _RULES.items():
            _check(name, getattr(self, name), holds, expected)
        object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        if self.prompt_logprobs_start is not None and self.logprobs is None:
            raise InvalidRequestError("prompt_logprobs_start needs logprobs", "logprobs")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise InvalidRequestError(
                f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                f"{self.max_new_tokens}",
                "min_new_tokens",
            )

    @property
    def penalised(self) -> bool:
        """Whether logits depend on which tokens came before."""
        penalties = self.frequency_penalty, self.presence_penalty, self.repetition_penalty
        return penalties != (0.0, 0.0, 1.0)


def _is_int(value: Any, least: int = 0, most: int = MAX_INT) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(least <= value <= most)


def _is_bias(bias: Any) -> bool:
    fits = isinstance(bias, Mapping) and len(bias) <= MAX_LOGIT_BIAS
    return fits and all(_is_int(i) and math.isfinite(value) for i, value in bias.items())


_PENALTY = (lambda p: -2.0 <= p <= 2.0, "between -2 and 2")
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda n: n is None or _is_int(n, 1), f"1 or more, at most {MAX_INT}"),
    "min_new_tokens": (_is_int, "0 or more"),
    "temperature": (lambda t: 0.0 <= t < float("inf"), "0 or more"),
    "top_k": (lambda k: k == -1 or _is_int(k, 1), f"-1 (all) or 1 to {MAX_INT}"),
    "top_p": (lambda p: 0.0 < p <= 1.0, "above 0 and at most 1"),
    "min_p": (lambda p: 0.0 <= p <= 1.0, "between 0 and 1"),
    "frequency_penalty": _PENALTY,
    "presence_penalty": _PENALTY,
    "repetition_penalty": (lambda p: 0.0 < p <= 10.0, "above 0 and at most 10; 1 changes nothing"),
    "logit_bias": (_is_bias, f"numbers by token id, at most {MAX_LOGIT_BIAS}"),
    "seed": (lambda s: _is_int(s, 0, MAX_SEED), f"between 0 and {MAX_SEED}"),
    "stop_token_ids": (
        lambda ids: all(map(_is_int, ids)) and len(set(ids)) <= MAX_STOP_IDS,
        f"a collection of token ids, at most {MAX_STOP_IDS}",
    ),
    "logprobs": (
        lambda n: n is None or _is_int(n, 0, MAX_LOGPROBS),
        f"between 0 and {MAX_LOGPROBS}",
    ),
    "prompt_logprobs_start": (lambda n: n is None or _is_int(n), "0 or more"),
}


def _check(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    try:
        fine = holds(value)
    except TypeError:
        fine = False
    if not fine:
        raise InvalidRequestError(f"{name} is {value!r}, but must be {expected}", name)


class Constraint(Protocol):
    """Which tokens may come next in one request, by the tokens so far. It has state.

    Attributes:
        ends: it may come to allow nothing but end tokens, which end the request whatever is asked.
        over: from here on it allows every token.
    """

    @property
    def ends(self) -> bool: ...
    @property
    def over(self) -> bool: ...

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        """What is allowed next, and after each draft; the state stays as it is.

        Args:
            drafts: tokens that may come next, one after another.

        Returns:
            uint32 [n + 1, words], bit t % 32 of word t // 32 for token t. Drafts beyond the first
            that is not allowed have no row: n is how many are.

        Raises:
            InvalidRequestError: nothing may come next.
        """
        ...

    def advance(self, tokens: Iterable[int]) -> None:
        """Take in tokens that were generated.

        Raises:
            InvalidRequestError: one is not allowed.
        """
        ...


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        id: unique among the requests alive in an engine.
        prompt_ids: the prompt's token ids, at least one.
        sampling: how to continue it.
        constraint: which tokens may come; owned by this request alone. None: any.
        priority: higher goes first. A difference of one is worth 64 places in the queue, so that
            nobody waits for ever.
        deadline_s: on the clock of time.monotonic; ended then, whatever it has. None: never.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
    priority: int = 0
    deadline_s: float | None = None


class TokenLogprobs(NamedTuple):
    """Log probabilities at one place.

    Attributes:
        logprob: of the token that stands there.
        top: token ids and log probabilities of the likeliest, most likely first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class RequestOutput(NamedTuple):
    """What one engine step added to one request.

    Attributes:
        request_id: whose it is.
        token_ids: the new tokens, in order; a matched stop token is the last of them.
        finish_reason: None while the request goes on.
        matched_stop: the token id that ended it, when one did.
        prompt_tokens: length of the prompt.
        completion_tokens: tokens generated so far, these included.
        cached_tokens: prompt tokens whose KV was reused rather than computed.
        logprobs: one for each of `token_ids`, where they were asked for.
        prompt_logprobs: of the prompt tokens from `prompt_logprobs_start` on, None in place of the
            very first token; in the request's first output with tokens only.
        drafted_tokens, accepted_tokens: drafts that were verified so far, and that were accepted.
        accept_lengths: how often 0, 1, 2, ... drafts of a verification were accepted so far.
        weight_version: of the weights that computed this output's tokens.
        error: what went wrong, where `finish_reason` is ABORT and it was not the client's wish.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    matched_stop: int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    weight_version: str = "default"
    error: str | None = None
    accept_lengths: tuple[int, ...] = ()


class EngineLoad(NamedTuple):
    """How busy an engine is, for health checks, gateways and metrics.

    Attributes:
        running: requests that hold a slot.
        waiting: requests in the queue.
        used_tokens: token positions in pages that running requests hold.
        max_total_tokens: token positions in all pages.
        max_running_requests: slots.
        cached_tokens: token positions in pages that only the prefix cache holds.
    """

    running: int
    waiting: int
    used_tokens: int
    max_total_tokens: int
    max_running_requests: int
    cached_tokens: int = 0


class EngineCounters(NamedTuple):
    """What an engine has done since it was made; only ever growing.

    Attributes:
        steps: steps read.
        prompt_tokens: tokens of prompts that were admitted.
        cached_tokens: of those, found in the prefix cache.
        computed_tokens: prompt tokens computed, again after preemption too.
        generated_tokens: tokens put out.
        preemptions: requests taken off the device to be computed again.
        verifications: times that drafts of a request were verified.
        drafted: by place in the chain, drafts that were verified.
        accepted: by place in the chain, drafts that were accepted.
        failed_requests: ended by an error of the engine.
    """

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    verifications: int = 0
    drafted: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()
    failed_requests: int = 0
