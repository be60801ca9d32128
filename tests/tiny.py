"""A small model with random weights, straight on a mesh: no files. Its MTP block drafts well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
from jax.sharding import Mesh

from cases import CASES
from glmjax.config import ModelConfig
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import ParamSpec, specs_of
from glmjax.sharding import named_sharding

TINY = replace(CASES["qk_norm"], num_hidden_layers=2)
TINY_SEED = 1

# So large that the next token depends on the last one most, but not on it alone: greedy outputs
# differ, and go in circles only after a while.
EMBED_SCALE, HEAD_SCALE = 16.0, 6.0


def random_params(config: ModelConfig, mesh: Mesh, seed: int = 0, module: Any = Decoder) -> Any:
    """Arrays for a module, of order one after each product."""
    rng = np.random.default_rng(seed)

    def leaf(spec: ParamSpec) -> jax.Array:
        scale = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 1.0
        values = (rng.standard_normal(spec.shape) * scale).astype(spec.dtype)
        return jax.device_put(values, named_sharding(mesh, spec.axes))

    return jax.tree.map(leaf, specs_of(module(config)))


def tiny_params(mesh: Mesh, seed: int = TINY_SEED, config: ModelConfig = TINY) -> dict[str, Any]:
    """{"model": tree of `Decoder`, "mtp": tree of `MTP`}; most greedy drafts are accepted."""
    model = random_params(config, mesh, seed)
    model["embed_tokens"] *= EMBED_SCALE
    model["lm_head"] *= HEAD_SCALE
    mtp = random_params(config, mesh, seed + 1, MTP)
    # The block takes the following token's embedding and, a little, the state.
    width = config.hidden_size
    scale = np.concatenate([np.zeros(width), np.full(width, 0.3)])
    token = np.eye(width, 2 * width) * EMBED_SCALE * width**-0.5
    mtp["eh_proj"] = (mtp["eh_proj"] * scale + token).astype(config.dtype)
    mtp["enorm"] = jnp.ones_like(mtp["enorm"])
    mtp["shared_head_norm"] = model["norm"]
    return {"model": model, "mtp": mtp}
