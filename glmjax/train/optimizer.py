"""Muon for matrices, AdamW for embeddings, norms and biases; balancing for the routers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from glmjax.model.spec import path_name
from glmjax.train.recipe import OptimizerRecipe

# The last two axes of these are a matrix [out, in], the others number matrices: experts, gate and
# up, and in qkv_proj the heads, each of which is a matrix of its own.
MATRICES = frozenset(
    {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "gate",
        "experts_gate_up_proj",
        "experts_down_proj",
        "shared_gate_up_proj",
        "shared_down_proj",
        "eh_proj",
        "lm_head",
    }
)
MATRIX_AXES = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)


def make_optimizer(recipe: OptimizerRecipe, steps: int) -> optax.GradientTransformation:
    """The optimiser of a run of `steps` (GLM-4.5 report, arXiv 2508.06471, section 2.4).

    optax gives Muon's Nesterov momentum to its AdamW too, which so is NAdamW.
    """
    return optax.chain(
        optax.clip_by_global_norm(recipe.max_grad_norm),
        muon(
            learning_rates(recipe, steps),
            ns_steps=recipe.newton_schulz_steps,
            beta=recipe.momentum,
            weight_decay=recipe.weight_decay,
            consistent_rms=recipe.update_rms,
            adam_b2=0.99,
            muon_weight_dimension_numbers=matrix_axes,
        ),
    )


def learning_rates(recipe: OptimizerRecipe, steps: int) -> optax.Schedule:
    """Cycles of a linear warm-up and a cosine, over `steps` in all."""
    starts = [0, *(restart.step for restart in recipe.restarts), steps]
    peaks = [recipe.learning_rate, *(restart.learning_rate for restart in recipe.restarts)]
    cycles = [
        optax.warmup_cosine_decay_schedule(
            0.0, peak, recipe.warmup_steps, end - start, peak * recipe.final_fraction
        )
        for peak, start, end in zip(peaks, starts, starts[1:], strict=False)
    ]
    return optax.join_schedules(cycles, starts[1:-1])


def matrix_axes(params: Any) -> Any:
    """Which axes of a leaf form a matrix; None for what AdamW trains."""

    def axes(path: Any, leaf: Any) -> MuonDimensionNumbers | None:
        return MATRIX_AXES if path_name(path).rsplit("/", 1)[-1] in MATRICES else None

    return jax.tree.map_with_path(axes, params)


def balance(bias: jax.Array, load: jax.Array, rate: float) -> jax.Array:
    """Move each expert's bias against its load, by a fixed step (arXiv 2408.15664).

    Args:
        bias, load: float32 [layers, E].
    """
    # Not the mean: a rounded division would move experts that have exactly their share.
    return bias + rate * jnp.sign(load.sum(-1, keepdims=True) - load.shape[-1] * load)
