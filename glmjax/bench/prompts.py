"""What the engines are asked."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

from glmjax.errors import CheckpointError
from glmjax.server.served import ServedModel
from glmjax.text.chat import ChatTemplate
from glmjax.train.data.encode import render_prompt
from glmjax.train.data.mixture import draw
from glmjax.types import Request, SamplingParams

LEAST_ID, MOST_ID = 100, 400  # words, in a vocabulary of any size

GREEDY = SamplingParams(temperature=0.0)


def held_out(served: ServedModel, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of chats that training never showed to glm-nano.

    Raises:
        CheckpointError: the model has no chat template.
    """
    template, rng = template_of(served), random.Random(seed)
    texts = [render_prompt(draw(rng, "held_out"), template) for _ in range(count)]
    return [tuple(ids) for ids in served.tokenizer.encode_batch(texts)]


def template_of(served: ServedModel) -> ChatTemplate:
    """A model's chat template.

    Raises:
        CheckpointError: it has none.
    """
    if served.template is None:
        raise CheckpointError(
            f"{served.name} has no chat template to ask it with; name measures that need none: "
            "host, prefix, scheduling"
        )
    return served.template


def random_tokens(rng: np.random.Generator, length: int) -> tuple[int, ...]:
    """Tokens that mean nothing."""
    return tuple(rng.integers(LEAST_ID, MOST_ID, length).tolist())


def requests(prompts: Iterable[tuple[int, ...]], sampling: SamplingParams) -> list[Request]:
    """One for each prompt, numbered."""
    return [Request(str(i), prompt, sampling) for i, prompt in enumerate(prompts)]


def exactly(new_tokens: int) -> SamplingParams:
    """Greedy, and so many tokens whatever comes."""
    return SamplingParams(new_tokens, temperature=0.0, ignore_eos=True)
