"""The batch of every step: a pure function of recipe and step, so a resumed run sees the same."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
from tokenizers import Tokenizer as Backend

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.mixture import WEIGHTS
from glmjax.train.data.packing import Packed, pack_batch
from glmjax.train.data.problem import Split
from glmjax.train.recipe import Recipe


class Batches:
    """Draws batches.

    Args:
        recipe: seed and stages.
        tokenizer: trained for it.
    """

    def __init__(self, recipe: Recipe, tokenizer: Backend):
        self._recipe = recipe
        self._tokenizer = Tokenizer(tokenizer)
        self._template = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))

    def at(self, step: int, split: Split = "train") -> Packed:
        """The batch of a step, counted from 0."""
        stage = self._recipe.stage_at(step)
        rng = random.Random(f"{self._recipe.seed} {split} {step}")
        parts = self._template, self._tokenizer
        weights = stage.tasks or WEIGHTS
        packed = pack_batch(rng, split, *parts, stage.rows, stage.seq_len, weights)
        return _joined(packed) if stage.joined else packed


def _joined(packed: Packed) -> Packed:
    """Rows whose conversations form one text each."""
    segments = (packed.segments > 0).astype(np.int32)
    places = np.arange(segments.shape[1], dtype=np.int32)
    return replace(packed, segments=segments, positions=np.broadcast_to(places, segments.shape))
