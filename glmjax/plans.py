"""The contract between host and device. numpy only, never jax.

The scheduler makes a `StepPlan`, a `Runner` launches it and returns a `StepHandle` at once, and
`StepHandle.result()` blocks for the `StepResult`. A plan never carries decoded token values: those
stay on the device, in its last token and drafts of each slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from glmjax.types import SamplingParams


class Bucket(NamedTuple):
    """The static shape of a step, for one data group.

    Attributes:
        rows: sequences that decode, each with its last token and its drafts.
        drafts: drafts a row has verified at most, and gets anew; 0: the step neither verifies nor
            drafts.
        chunk_rows: sequences with a chunk of known tokens.
        chunk_tokens: tokens of all chunks together, packed one after another.
    """

    rows: int
    drafts: int
    chunk_rows: int
    chunk_tokens: int


@dataclass(frozen=True)
class Limits:
    """What a runner offers a scheduler. A data group is one replica of the KV pool and its slots.

    Attributes:
        groups: data groups; every launch runs one bucket in all of them.
        slots: sequences held at once, a group.
        pages: KV pages, a group. Page 0 is scratch for padding and never handed out.
        page_size: token positions a page.
        max_seq_len: longest sequence, prompt and output together.
        num_drafts: drafts a step makes for each sequence; 0: the runner has no drafting.
        vocab_size: token ids are below it.
        buckets: compiled shapes.
    """

    groups: int
    slots: int
    pages: int
    page_size: int
    max_seq_len: int
    num_drafts: int
    vocab_size: int
    buckets: tuple[Bucket, ...]

    @property
    def pages_per_seq(self) -> int:
        """Pages that the longest sequence takes."""
        return -(-self.max_seq_len // self.page_size)

    @property
    def chunk_tokens(self) -> int:
        """Tokens of known text that a step computes at most."""
        return max(b.chunk_tokens for b in self.buckets)

    @property
    def chunk_rows(self) -> int:
        """Chunks that a step takes at most."""
        return max(b.chunk_rows for b in self.buckets)


class DecodeRow(NamedTuple):
    """A sequence that goes on from the device's last token and drafts.

    Attributes:
        slot: where its state lives on the device, within its group.
        drafts: how many of the device's drafts to verify.
        page_index: place of the first new page in the sequence's page table, and so the number of
            pages it has had.
        new_pages: page ids to enter there. Positions beyond all its pages go to scratch.
        masks: uint32 [drafts + 1, words], tokens allowed after the last token and after each
            draft; None: all.
    """

    slot: int
    drafts: int
    page_index: int
    new_pages: tuple[int, ...]
    masks: np.ndarray | None = None


class History(NamedTuple):
    """What the device must know of a sequence whose logits are changed, besides its parameters.

    Attributes:
        prompt_ids, output_ids: its tokens so far.
        end_ids: token ids barred while it is below its `min_len`.
    """

    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    end_ids: tuple[int, ...]


class ChunkRow(NamedTuple):
    """A chunk of known tokens of a sequence.

    Attributes:
        slot: where its state lives on the device, within its group.
        start: position of the first token.
        token_ids: int32 [n].
        next_token: the known token that follows; -1 where `sample`.
        sample: whether a token is sampled after the last one, and drafts are made.
        page_index: place of the first new page in the sequence's page table.
        new_pages: page ids to enter there; a first chunk brings those of its cached prefix too.
        sampling: how to sample.
        min_len: no end token is sampled at a position below it.
        history: for a sequence with penalties, bias or `min_len`, with its first chunk; else None.
        mask: uint32 [1, words], tokens allowed after the last one; None: all.
    """

    slot: int
    start: int
    token_ids: np.ndarray
    next_token: int
    sample: bool
    page_index: int
    new_pages: tuple[int, ...]
    sampling: SamplingParams
    min_len: int = 0
    history: History | None = None
    mask: np.ndarray | None = None


class GroupRows(NamedTuple):
    """One data group's part of a step: at most as many rows as the bucket has."""

    decode: tuple[DecodeRow, ...] = ()
    chunks: tuple[ChunkRow, ...] = ()


@dataclass(frozen=True)
class StepPlan:
    """What one launch computes.

    Attributes:
        bucket: its shape.
        groups: rows of each data group.
        logprobs: whether log probabilities of sampled tokens are wanted.
        prompt_logprobs: whether those of chunks' following tokens are.
    """

    bucket: Bucket
    groups: tuple[GroupRows, ...]
    logprobs: bool = False
    prompt_logprobs: bool = False


class LogprobArrays(NamedTuple):
    """Log probabilities of n places in each group, N = MAX_LOGPROBS.

    Attributes:
        chosen: float32 [groups, n], of the token that stands there.
        top_ids: int32 [groups, n, N], most likely first.
        top: float32 [groups, n, N].
    """

    chosen: np.ndarray
    top_ids: np.ndarray
    top: np.ndarray


@dataclass(frozen=True)
class StepResult:
    """What a launch produced. Rows are the bucket's: its `rows`, then its `chunk_rows`.

    Attributes:
        tokens: int32 [groups, R, D + 1]; new tokens of each row, `accept_lens` of them valid.
        accept_lens: int32 [groups, R]; 0 for rows that did not sample.
        drafts: int32 [groups, R, D], what the device drafted to follow.
        faults: bool [groups, R]; the row's logits were not finite, and its token means nothing.
        logprobs: of sampled tokens; place r * (D + 1) + i is token i of decode row r, place
            rows * (D + 1) + c that of chunk row c. None where the plan did not ask.
        prompt_logprobs: of the tokens that follow each chunk token, by its place in the packed
            chunks; a chunk's last is of its `next_token`, and means nothing where it samples.
    """

    tokens: np.ndarray
    accept_lens: np.ndarray
    drafts: np.ndarray
    faults: np.ndarray
    logprobs: LogprobArrays | None = None
    prompt_logprobs: LogprobArrays | None = None


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

    def reset(self) -> None:
        """Forget all sequences and pages, after a step that failed."""
        ...

    def update_params(self, params: Any) -> None:
        """Launch the next steps with other weights; steps launched already keep the old ones.

        Args:
            params: weights in the runner's own form.

        Raises:
            ConfigError: they do not fit the model that runs; nothing has changed then.
        """
        ...
