"""What crosses the boundaries between servers, scheduler and runner. numpy only, never jax.

The contract between host and device: the scheduler makes a `StepPlan`, a `Runner` launches it and
returns a `StepHandle` at once, and `StepHandle.result()` blocks for the `StepResult`. A plan never
carries decoded token values: those stay on the device, in its last token of each slot.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from glmjax.errors import InvalidRequestError

MAX_SEED = 2**32 - 1
MAX_INT = 2**31 - 1  # plans cross to the device as int32


class FinishReason(enum.StrEnum):
    """Why a request ended, in the words of OpenAI's and SGLang's APIs."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to end.

    Attributes:
        max_new_tokens: end after this many tokens; None: as far as the context reaches.
        temperature: 0 is greedy.
        top_k: sample among the k most likely; -1: all.
        top_p: sample among the smallest set whose probability reaches top_p.
        seed: unsigned 32 bits; what a request samples depends on it and on the position only.
        stop_token_ids: these end the request, besides the model's own end tokens.
        ignore_eos: do not end on the model's own end tokens.

    Raises:
        InvalidRequestError: a value is out of its range or of a wrong type; `param` names it.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules: dict[str, tuple[Callable[[Any], bool], str]] = {
            "max_new_tokens": (lambda n: n is None or _is_int(n, 1), "1 or more"),
            "temperature": (lambda t: 0.0 <= t < float("inf"), "0 or more"),
            "top_k": (lambda k: k == -1 or _is_int(k, 1), f"-1 (all) or 1 to {MAX_INT}"),
            "top_p": (lambda p: 0.0 < p <= 1.0, "above 0 and at most 1"),
            "seed": (lambda s: _is_int(s, 0, MAX_SEED), f"between 0 and {MAX_SEED}"),
            "stop_token_ids": (lambda ids: all(map(_is_int, ids)), "a collection of token ids"),
        }
        for name, (holds, expected) in rules.items():
            _check(name, getattr(self, name), holds, expected)
        object.__setattr__(self, "stop_token_ids", frozenset(self.stop_token_ids))


def _is_int(value: Any, least: int = 0, most: int = MAX_INT) -> bool:
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return whole and bool(least <= value <= most)


def _check(name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
    try:
        fine = holds(value)
    except TypeError:
        fine = False
    if not fine:
        raise InvalidRequestError(f"{name} is {value!r}, but must be {expected}", name)


@dataclass(frozen=True)
class Request:
    """One sequence to generate.

    Attributes:
        id: unique among the requests alive in an engine.
        prompt_ids: the prompt's token ids, at least one.
        sampling: how to continue it.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)


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
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    matched_stop: int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class EngineLoad(NamedTuple):
    """How busy an engine is, for health checks, gateways and metrics.

    Attributes:
        running: requests that hold a slot.
        waiting: requests in the queue.
        used_tokens: token positions in pages that are held.
        max_total_tokens: token positions in all pages.
        max_running_requests: slots.
    """

    running: int
    waiting: int
    used_tokens: int
    max_total_tokens: int
    max_running_requests: int


class Bucket(NamedTuple):
    """The static shape of a step, for one data group.

    Attributes:
        rows: sequences.
        tokens: query tokens of all rows together, packed.
        max_q_len: the longest row; 1 in decode.
    """

    rows: int
    tokens: int
    max_q_len: int


@dataclass(frozen=True)
class Limits:
    """What a runner offers a scheduler. A data group is one replica of the KV pool and its slots.

    Attributes:
        groups: data groups; every launch runs one bucket in all of them.
        slots: sequences held at once, a group.
        pages: KV pages, a group. Page 0 is scratch for padding and never handed out.
        page_size: token positions a page.
        max_seq_len: longest sequence, prompt and output together.
        decode_buckets: compiled shapes with max_q_len 1, ascending.
        prefill_buckets: compiled shapes for chunks of prompt, ascending.
    """

    groups: int
    slots: int
    pages: int
    page_size: int
    max_seq_len: int
    decode_buckets: tuple[Bucket, ...]
    prefill_buckets: tuple[Bucket, ...]

    @property
    def pages_per_seq(self) -> int:
        """Width of a page table row."""
        return -(-self.max_seq_len // self.page_size)


class Row(NamedTuple):
    """One sequence's part in a step.

    Attributes:
        slot: where its state lives on the device, within its group.
        start: position of the first query token; -1: go on where the device's length stands.
        token_ids: prompt tokens to compute, or None: the device's last token (one, in decode).
        q_len: query tokens.
        page_index: place of the first new page in the sequence's page table.
        new_pages: page ids to enter there.
        sample: whether a token is sampled after the row's last query token.
        sampling: temperature, top_k, top_p and seed for it.
    """

    slot: int
    start: int
    token_ids: np.ndarray | None  # int32 [q_len]
    q_len: int
    page_index: int
    new_pages: tuple[int, ...]
    sample: bool
    sampling: SamplingParams


@dataclass(frozen=True)
class StepPlan:
    """What one launch computes: a bucket, and for each data group at most `bucket.rows` rows."""

    bucket: Bucket
    groups: tuple[tuple[Row, ...], ...]


@dataclass(frozen=True)
class StepResult:
    """What a launch produced; rows in the plan's order, padded to the bucket.

    Attributes:
        tokens: int32 [groups, rows, 1]; sampled tokens of each row, `accept_lens` of them valid.
        accept_lens: int32 [groups, rows]; 0 for rows that did not sample.
    """

    tokens: np.ndarray
    accept_lens: np.ndarray


class StepHandle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Block until the step is done and return its tokens."""
        ...


class Runner(Protocol):
    """Device side of the contract."""

    @property
    def limits(self) -> Limits: ...

    def launch(self, plan: StepPlan) -> StepHandle:
        """Dispatch a step and return at once.

        Raises:
            KeyError: the plan's bucket was not compiled.
        """
        ...

    def update_params(self, params: Any) -> None:
        """Launch the next steps with other weights; steps launched already keep the old ones.

        Args:
            params: weights in the runner's own form.

        Raises:
            ConfigError: they do not fit the model that runs; nothing has changed then.
        """
        ...
