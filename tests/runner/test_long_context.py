"""131,072 positions: what the last of them give is what attention over all of them says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from answers import Answer, ask
from tiny import TINY, random_params

from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.engine import Engine
from glmjax.plans import Bucket
from glmjax.runner import compiled
from glmjax.runner.runner import DeviceRunner
from glmjax.scheduler.limits import make_limits
from glmjax.sharding import make_mesh
from glmjax.types import Request, SamplingParams

# One layer, whose keys and values depend on nothing but a token and its place: a reference for any
# position takes no more than a product with them.
CONFIG = replace(
    TINY,
    num_hidden_layers=1,
    first_k_dense_replace=1,
    hidden_size=32,
    intermediate_size=32,
    num_attention_heads=2,
    num_key_value_heads=1,
    vocab_size=64,
    max_position_embeddings=1 << 17,
)
NEW = 12
LONGEST = CONFIG.max_position_embeddings
NEAR = 5e-6  # in log probabilities; a page more or less would be a multiple of it


# As users have it: here running is longer than compiling.
OPTIMISED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}


class Reference:
    """The model in numpy. Angles of the rotary embedding are float32, by definition."""

    def __init__(self, config: ModelConfig, params: Any):
        self.config = config
        self.w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        self.vectors = {name: rows[0] for name, rows in self.w["vectors"].items()}

    def logprobs(self, ids: np.ndarray, last: int) -> np.ndarray:
        """[last, V], after each of the last tokens of a text int32 [T]."""
        layer, vectors = self.w["layers"][0], self.vectors
        x = self.w["embed_tokens"][ids]
        qkv = np.einsum(
            "tD,KghD->tKgh",
            self.norm(x, vectors["input_layernorm"]),
            layer["self_attn"]["qkv_proj"],
        )
        qkv = (qkv + vectors["qkv_bias"])[:, 0]
        places = np.arange(len(ids))
        k = self.rotate(self.norm(qkv[:, -2:-1], vectors["k_norm"]), places)[:, 0]
        q = self.rotate(self.norm(qkv[-last:, :-2], vectors["q_norm"]), places[-last:])
        out = self.attend(q, k, qkv[:, -1], places[-last:])
        x = x[-last:] + out.reshape(last, -1) @ layer["self_attn"]["o_proj"].T
        x = x + self.mlp(self.norm(x, vectors["post_attention_layernorm"]), layer["mlp"])
        logits = self.norm(x, self.w["norm"]) @ self.w["lm_head"].T
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.config.rms_norm_eps) * weight

    def rotate(self, x: np.ndarray, places: np.ndarray) -> np.ndarray:
        """x [T, heads, h]."""
        half = self.config.rotary_dim // 2
        exponent = np.arange(0, 2 * half, 2, dtype=np.float32) / np.float32(2 * half)
        scales = np.power(np.float32(self.config.rope_theta), exponent)
        angles = (places.astype(np.float32)[:, None] / scales)[:, None].astype(np.float64)
        first, second, rest = np.split(x, [half, 2 * half], axis=-1)
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], -1)

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray, places: np.ndarray):
        """q [n, H, h] at `places` over k and v [T, h]."""
        scores = np.einsum("nHh,Th->nHT", q, k) * self.config.head_dim**-0.5
        seen = np.arange(len(k)) <= places[:, None, None]
        weights = np.where(seen, np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
        return np.einsum("nHT,Th->nHh", weights / weights.sum(-1, keepdims=True), v)

    def mlp(self, x: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
        gate, up = np.einsum("tD,uFD->utF", x, weights["gate_up_proj"])
        return (gate / (1 + np.exp(-gate)) * up) @ weights["down_proj"].T


@pytest.fixture(scope="module")
def params():
    """Keys are long, so attention is sharp; and its part is large: every page can be seen."""
    drawn = random_params(CONFIG, make_mesh(MeshConfig()), 2)
    drawn["vectors"]["k_norm"] *= 3.0
    drawn["layers"][0]["self_attn"]["o_proj"] *= 30.0
    return drawn


def make_runner(params: Any, max_seq_len: int, chunk: int) -> DeviceRunner:
    sizes = {"chunked_prefill_size": chunk, "speculative_num_steps": 0}
    scheduler = SchedulerConfig(1, max_seq_len=max_seq_len, **sizes)
    limits = make_limits(CONFIG, MeshConfig(), CacheConfig(), scheduler)
    limits = replace(limits, buckets=(Bucket(1, 0, 0, 0), Bucket(1, 0, 1, chunk)))
    return DeviceRunner(CONFIG, params, make_mesh(MeshConfig()), limits)


def check(params: Any, request: Request, answer: Answer) -> None:
    """Log probabilities of all new tokens are those of the reference, and tokens the likeliest."""
    assert answer.error is None
    assert len(answer.tokens) == NEW
    text = np.array([*request.prompt_ids, *answer.tokens], np.int32)
    expected = Reference(CONFIG, params).logprobs(text[:-1], NEW)
    chosen = expected[np.arange(NEW), answer.tokens]
    np.testing.assert_allclose([p.logprob for p in answer.logprobs], chosen, atol=NEAR)
    assert (chosen >= expected.max(axis=1) - NEAR).all()


def check_length(params: Any, max_seq_len: int, chunk: int) -> None:
    """A text of the greatest length, twice: computed, then found in the cache."""
    runner = make_runner(params, max_seq_len, chunk)
    limits, kv = runner.limits, runner._state.kv
    planned = limits.pages * limits.page_size * CONFIG.kv_bytes_per_token()
    assert limits.max_seq_len == max_seq_len
    assert kv.k.nbytes + kv.v.nbytes == planned
    length = max_seq_len - NEW
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, length)
    sampling = SamplingParams(max_new_tokens=NEW, temperature=0.0, ignore_eos=True, logprobs=0)
    request, engine = Request("", tuple(ids.tolist()), sampling), Engine(runner)
    first = ask(engine, [request])[""]
    check(params, request, first)
    again = ask(engine, [request])[""]
    check(params, request, again)
    assert again.tokens == first.tokens
    assert first.cached == 0
    assert again.cached == (length - 1) // limits.page_size * limits.page_size
    assert engine.counters().computed_tokens == length + length - again.cached


def test_six_thousand_positions(params):
    check_length(params, 6000, 512)


@pytest.mark.slow
def test_all_positions_of_the_largest_context(params, monkeypatch):
    monkeypatch.setattr(compiled, "CPU_OPTIONS", compiled.CPU_OPTIONS | OPTIMISED)
    check_length(params, LONGEST, 4096)


@pytest.mark.parametrize("length", [6000, LONGEST])
def test_one_page_of_other_tokens_would_be_seen(params, length):
    ids = np.random.default_rng(1).integers(0, CONFIG.vocab_size, length, np.int32)
    reference = Reference(CONFIG, params)
    whole, changed = reference.logprobs(ids, 1), ids.copy()
    changed[1008:1024] = (changed[1008:1024] + 1) % CONFIG.vocab_size
    assert np.abs(reference.logprobs(changed, 1) - whole).max() > 4 * NEAR
