"""What a request must give, from a plain forward pass over its whole text. Sampling in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from answers import Answer
from tiny import TINY

from glmjax.config import MeshConfig
from glmjax.sharding import make_mesh
from glmjax.types import FinishReason, Request, SamplingParams
from harness import Forward

TEXT = 64  # tokens; one shape, since nothing looks at what comes later
NEAR = 2e-3  # in logits: sums in another order


@dataclass
class Neighbours:
    """A constraint: a token's remainder by 3 differs from that of the one before it."""

    ends, over = True, False

    last: int = 0

    def allowed(self) -> np.ndarray:
        """bool [V], what may come next."""
        return np.arange(TINY.vocab_size) % 3 != self.last % 3

    def masks(self, drafts: Sequence[int]) -> np.ndarray:
        ahead, rows = Neighbours(self.last), []
        for draft in (*drafts, None):
            allowed = ahead.allowed()
            rows.append(np.packbits(allowed, bitorder="little").view(np.uint32))
            if draft is None or not allowed[draft]:
                break
            ahead.advance([draft])
        return np.stack(rows)

    def advance(self, tokens: Iterable[int]) -> None:
        for self.last in tokens:
            pass


class Oracle:
    """Checks answers of the model with these parameters, {"model": tree}, on one device."""

    def __init__(self, params: Any):
        self._forward = Forward(TINY, make_mesh(MeshConfig()), params["model"])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 [n, V], after each of at most TEXT tokens."""
        self._forward.lens["main"] = 0
        padded = np.pad(np.asarray(ids, np.int32), (0, TEXT - len(ids)))
        return self._forward.main(padded)[0][: len(ids)]

    def check(self, request: Request, answer: Answer) -> None:
        """Raise AssertionError unless an answer is what this model and these parameters give."""
        assert answer.error is None
        prompt = list(request.prompt_ids)
        logits = self.logits(prompt + answer.tokens)
        self._check_end(request.sampling, answer)
        self._check_tokens(request, answer.tokens, logits[len(prompt) - 1 :])
        self._check_logprobs(request, answer, logits)

    def _check_end(self, sampling: SamplingParams, answer: Answer) -> None:
        *before, last = answer.tokens
        assert not sampling.stop_token_ids & set(before)
        stopped = last in sampling.stop_token_ids
        assert answer.reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert stopped or len(answer.tokens) == sampling.max_new_tokens

    def _check_tokens(self, request: Request, tokens: list[int], logits: np.ndarray) -> None:
        constraint = Neighbours() if request.constraint else None
        for i, token in enumerate(tokens):
            scores = adjusted(logits[i], request, tokens[:i])
            if constraint:
                scores = np.where(constraint.allowed(), scores, -np.inf)
                constraint.advance([token])
            scores = noisy(scores, request.sampling, len(request.prompt_ids) + i)
            assert scores[token] >= scores.max() - NEAR, (request.id, i, token, scores.argmax())

    def _check_logprobs(self, request: Request, answer: Answer, logits: np.ndarray) -> None:
        sampling, start = request.sampling, request.sampling.prompt_logprobs_start
        text, prompt = [*request.prompt_ids, *answer.tokens], len(request.prompt_ids)
        places = [] if sampling.logprobs is None else list(range(prompt, len(text)))
        assert len(answer.logprobs) == len(places)
        got = dict(zip(places, answer.logprobs, strict=True))
        if start is None:
            assert answer.prompt_logprobs == []
        else:
            got |= dict(zip(range(start, prompt), answer.prompt_logprobs, strict=True))
        for place, value in got.items():
            if place == 0:
                assert value is None
            else:
                check_logprob(value, logits[place - 1], text[place], sampling.logprobs or 0)


def check_logprob(value: Any, logits: np.ndarray, token: int, most: int) -> None:
    """One place's log probabilities are those of its logits, float32 [V]."""
    expected = logits - np.logaddexp.reduce(logits)
    assert len(value.top) == most
    ids = [token, *(i for i, _ in value.top)]
    np.testing.assert_allclose(
        [value.logprob, *(p for _, p in value.top)], expected[ids], atol=NEAR, rtol=0
    )
    likeliest = np.sort(expected)[::-1][:most]
    np.testing.assert_allclose([p for _, p in value.top], likeliest, atol=NEAR, rtol=0)


def adjusted(logits: np.ndarray, request: Request, output: Sequence[int]) -> np.ndarray:
    """Logits [V] changed by penalties, bias and what is barred, after this output."""
    s, new = request.sampling, logits.astype(np.float64)
    counts = np.bincount(output, minlength=len(new)) if len(output) else np.zeros(len(new))
    seen = sorted({*request.prompt_ids, *output})
    r = s.repetition_penalty
    new[seen] = np.where(new[seen] > 0, new[seen] / r, new[seen] * r)
    new -= s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    for token, bias in s.logit_bias.items():
        new[token] += bias
    if len(output) < s.min_new_tokens:
        new[sorted(s.stop_token_ids)] = -np.inf
    return new


def noisy(logits: np.ndarray, sampling: SamplingParams, position: int) -> np.ndarray:
    """Logits [V] cut as asked, with the noise of the request's seed and the position."""
    s = sampling
    if not s.temperature:
        return logits
    logits = logits / s.temperature
    order = np.argsort(-logits, kind="stable")
    kept = order[: s.top_k] if s.top_k > 0 else order
    probs = np.exp(logits[kept] - logits.max())
    probs /= probs.sum()
    kept = kept[np.cumsum(probs) - probs < s.top_p]
    kept = kept[logits[kept] >= logits.max() + np.log(max(s.min_p, 1e-300))]
    key = jax.random.fold_in(jax.random.key(s.seed), position)
    noise = np.asarray(jax.random.gumbel(key, logits.shape, np.float32))
    scores = np.full(logits.shape, -np.inf)
    scores[kept] = logits[kept] + noise[kept]
    return scores
