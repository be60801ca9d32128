"""Conversations packed into rows of one length, for training."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.encode import encode_batch
from glmjax.train.data.mixture import WEIGHTS, draw
from glmjax.train.data.problem import Split

Encoded = tuple[list[int], list[bool]]

# Rows are filled to this share from conversations as they come, then the gaps with what fits.
FILL = 0.93
MAX_PADDING = 0.03
TOP_UPS = 12
CHUNK = 64


@dataclass(frozen=True)
class Packed:
    """Rows of whole conversations.

    Attributes:
        tokens: int32 [R, T]; 0 in padding.
        segments: int32 [R, T], 1, 2, ... by conversation in the row; 0 in padding.
        positions: int32 [R, T], from 0 in each conversation.
        trained: bool [R, T], whether this token is the model's own to write.
    """

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray
    trained: np.ndarray


def pack_batch(
    rng: random.Random,
    split: Split,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    rows: int,
    seq_len: int,
    weights: Mapping[str, float] = WEIGHTS,
) -> Packed:
    """Draw conversations and pack them; the same `rng` state gives the same batch.

    Those longer than `seq_len` are dropped. The last few percent of the tokens lean to short
    conversations, because only these fit.
    """

    def drawn(count: int) -> list[Encoded]:
        problems = [draw(rng, split, weights=weights) for _ in range(count)]
        found = encode_batch(problems, template, tokenizer)
        return [item for item in found if len(item[0]) <= seq_len]

    pool: list[Encoded] = []
    while sum(len(ids) for ids, _ in pool) < FILL * rows * seq_len:
        pool += drawn(min(CHUNK, rows * 4))
    bins: list[list[Encoded]] = [[] for _ in range(rows)]
    free = [seq_len] * rows
    _place(pool, bins, free)
    for _ in range(TOP_UPS):
        if sum(free) <= MAX_PADDING * rows * seq_len:
            break
        _place(drawn(min(CHUNK, rows * 4)), bins, free)
    return _arrays(bins, seq_len)


def _place(items: list[Encoded], bins: list[list[Encoded]], free: list[int]) -> None:
    """Best fit, longest first; what fits nowhere is left out. Changes `bins` and `free`."""
    for item in sorted(items, key=lambda item: -len(item[0])):
        length = len(item[0])
        room, row = min(((f, row) for row, f in enumerate(free) if f >= length), default=(0, -1))
        if row >= 0:
            bins[row].append(item)
            free[row] = room - length


def _arrays(bins: list[list[Encoded]], seq_len: int) -> Packed:
    shape = (len(bins), seq_len)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    trained = np.zeros(shape, bool)
    for row, items in enumerate(bins):
        start = 0
        for number, (ids, mask) in enumerate(items, 1):
            part = np.s_[row, start : start + len(ids)]
            tokens[part], trained[part] = ids, mask
            segments[part], positions[part] = number, np.arange(len(ids))
            start += len(ids)
    return Packed(tokens, segments, positions, trained)
