"""The main model against what transformers computed, and proof that the comparison can see."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import glmjax.model.layers
import glmjax.model.moe
from cases import CASES, GOLDENS, prompt_ids
from harness import Forward
from pallas_kernels import rope, router
from pallas_kernels.norm import rms_norm

RELATIVE = 1e-4
REAL_ROTATE = rope.rotate


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / f"{name}.npz"))


def error(logits: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tensor", [1, 4])
def test_prefill_equals_transformers(name, tensor, load_case):
    model = load_case(name, tensor)
    logits, _ = Forward(*model).main(prompt_ids(CASES[name]))
    expected = golden(name)["logits"]
    assert error(logits, expected) < RELATIVE
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("name", CASES)
def test_token_by_token_decode_equals_transformers(name, load_case):
    forward = Forward(*load_case(name, 1))
    rows = [forward.main(prompt_ids(CASES[name])[i : i + 1])[0] for i in range(24)]
    expected = golden(name)["logits"]
    assert error(np.concatenate(rows), expected) < RELATIVE
    np.testing.assert_array_equal(np.concatenate(rows).argmax(-1), expected.argmax(-1))


def test_chunks_equal_one_prefill(load_case):
    forward = Forward(*load_case("qk_norm", 1))
    ids = prompt_ids(CASES["qk_norm"])
    rows = [forward.main(ids[a:b])[0] for a, b in ((0, 5), (5, 6), (6, 17), (17, 24))]
    assert error(np.concatenate(rows), golden("qk_norm")["logits"]) < RELATIVE


def interleaved_rope(x, cos, sin):
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]
    even, odd = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return jnp.concatenate([turned.reshape(*x.shape[:-1], -1), x[..., 2 * half :]], axis=-1)


def bf16_bias(logits, bias, **options):
    return router.route(logits, bias.astype(jnp.bfloat16).astype(jnp.float32), **options)


def biased_weights(logits, bias, *, norm_topk_prob, scaling_factor, top_k, valid, **_):
    scores, ids = jax.lax.top_k(jax.nn.sigmoid(logits) + bias, top_k)
    ids = jnp.where(valid[:, None], ids, logits.shape[1])
    return ids, scaling_factor * scores / jnp.sum(scores, axis=-1, keepdims=True)


def norm_after_rope(qkv, rotation):
    q, k, v = REAL_ROTATE(qkv, replace(rotation, q_norm=None, k_norm=None))
    return rms_norm(q, rotation.q_norm, 1e-5), rms_norm(k, rotation.k_norm, 1e-5), v


def scaled_shared_expert(*args):
    return 2.5 * glmjax.model.layers.swiglu(*args)


TRAPS = {
    "interleaved rope": (rope, "apply_rope", interleaved_rope),
    "bf16 correction bias": (glmjax.model.moe, "route", bf16_bias),
    "weights from biased scores": (glmjax.model.moe, "route", biased_weights),
    "scaled shared expert": (glmjax.model.moe, "swiglu", scaled_shared_expert),
    "qk-norm after rope": (rope, "rotate", norm_after_rope),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_would_be_seen(trap, load_case, monkeypatch):
    monkeypatch.setattr(*TRAPS[trap])
    jax.clear_caches()  # the inner jit of a layer remembers the right form
    try:
        logits, _ = Forward(*load_case("qk_norm", 1)).main(prompt_ids(CASES["qk_norm"]))
    finally:
        jax.clear_caches()
    assert error(logits, golden("qk_norm")["logits"]) > 100 * RELATIVE
