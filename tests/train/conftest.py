"""A model that has every feature and trains in no time; parameters that all make a difference."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glmjax.config import ModelConfig
from glmjax.model.spec import path_name
from glmjax.sharding import named_sharding
from glmjax.train.step import param_specs
from processes import environment, run_command, start_server

__all__ = ["environment", "run_command", "start_server"]


@pytest.fixture(scope="session")
def tiny() -> ModelConfig:
    """One dense layer, one with experts, and the MTP block."""
    return ModelConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=40,
        moe_intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        n_routed_experts=6,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def random_params():
    """(config, mesh, seed) -> {"model", "mtp"}: biases are not 0 and norms not 1."""

    def make(config: ModelConfig, mesh, seed: int = 0):
        rng = np.random.default_rng(seed)

        def leaf(path, spec):
            noise = rng.standard_normal(spec.shape) * spec.shape[-1] ** -0.5
            values = np.float32(noise + ("norm" in path_name(path)))
            return jax.device_put(values, named_sharding(mesh, spec.axes))

        return jax.tree.map_with_path(leaf, param_specs(config))

    return make
