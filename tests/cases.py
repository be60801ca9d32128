"""Models that tests compare with transformers: small, and unlike each other in every switch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from glmjax.config import ModelConfig

GOLDENS = Path(__file__).parent / "goldens"
SEED = 11

_QK_NORM = ModelConfig(
    vocab_size=192,
    hidden_size=64,
    intermediate_size=96,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=16,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_shared_experts=1,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    use_qk_norm=True,
    attention_bias=True,
    partial_rotary_factor=0.5,
    rope_theta=1e6,
    max_position_embeddings=512,
    dtype="float32",
)

CASES = {
    "qk_norm": _QK_NORM,
    "no_qk_norm": replace(
        _QK_NORM,
        use_qk_norm=False,
        n_shared_experts=2,
        first_k_dense_replace=2,
        routed_scaling_factor=1.0,
        rope_theta=1e4,
    ),
    "groups": replace(
        _QK_NORM,
        attention_bias=False,
        n_group=4,
        topk_group=2,
        norm_topk_prob=False,
        num_key_value_heads=4,
        partial_rotary_factor=1.0,
    ),
}


SERVED_PROMPTS, SERVED_TOKENS = 16, 64


def served_prompts(config: ModelConfig) -> list[list[int]]:
    """The prompts whose greedy continuation the served model's golden holds, 3 to 90 tokens."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(3, 90, SERVED_PROMPTS)
    return [rng.integers(0, config.vocab_size, n).tolist() for n in lengths]


def prompt_ids(config: ModelConfig, length: int = 24) -> np.ndarray:
    """The prompt whose logits the goldens hold, int32 [length]."""
    return np.random.default_rng(SEED).integers(0, config.vocab_size, length, np.int32)
