"""The jitted training step, data-parallel over the mesh."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import ParamSpec, axes_tree, path_name, specs_of
from glmjax.sharding import named_sharding, psum_data, shard_map
from glmjax.train.data.packing import Packed
from glmjax.train.loss import LossWeights, Metrics, Params, TrainBatch, total_loss
from glmjax.train.optimizer import MATRICES, balance
from glmjax.train.recipe import Recipe, Stage

BATCH_AXES = TrainBatch(*(("rows", None),) * 4)  # pyright: ignore[reportArgumentType]
BIAS = "e_score_correction_bias"
TO_RESIDUAL = ("o_proj", "down_proj")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a run carries from step to step; donated to each.

    Attributes:
        params: {"model": tree of `Decoder`, "mtp": tree of `MTP`}, float32.
        optimizer: optax's state.
        step: int32 [], steps done.
    """

    params: Params
    optimizer: Any
    step: Any


def put(packed: Packed, mesh: Mesh) -> TrainBatch:
    """A batch on the mesh, each device its own rows."""
    batch = TrainBatch(packed.tokens, packed.segments, packed.positions, packed.trained)  # pyright: ignore[reportArgumentType]
    return jax.device_put(batch, named_sharding(mesh, BATCH_AXES.tokens))  # pyright: ignore[reportArgumentType]


TrainStep = Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
Measure = Callable[[Params, TrainBatch], Metrics]


def param_specs(config: ModelConfig) -> Params:
    """ParamSpecs of the whole model: the trees that serving restores."""
    return {"model": specs_of(Decoder(config)), "mtp": specs_of(MTP(config))}


def init_state(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> TrainState:
    """A new model on the mesh, whole on each device."""

    def make() -> TrainState:
        params = init_params(param_specs(config), config, jax.random.key(seed))
        return TrainState(params, optimizer.init(params), jnp.int32(0))

    return jax.jit(make, out_shardings=named_sharding(mesh, ()))()


def init_params(specs: Params, config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters: each leaf from a key of its own, which only its path decides."""

    def leaf(path: Any, spec: ParamSpec) -> jax.Array:
        name = path_name(path)
        own_key = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        noise = jax.random.normal(own_key, spec.shape)
        return noise * _std(name.rsplit("/", 1)[-1], spec, config) + ("norm" in name)

    return jax.tree.map_with_path(leaf, specs)


def _std(name: str, spec: ParamSpec, config: ModelConfig) -> float:
    """Matrices keep variance; those that add to the residual stream shrink with depth."""
    if name == "embed_tokens":
        return 0.5
    if name not in MATRICES:
        return 0.0
    depth = 2 * config.num_hidden_layers if name.endswith(TO_RESIDUAL) else 1
    return (spec.shape[-1] * depth) ** -0.5


def make_train_step(
    recipe: Recipe, stage: Stage, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainStep:
    """The step of a stage: (state, batch) -> (state, metrics), the state donated."""
    weights = LossWeights(recipe.prompt_weight, stage.mtp_weight, recipe.balance_weight)
    gradients = _gradients(recipe.model, weights, mesh)

    def step(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        grads, metrics = gradients(state.params, batch)
        metrics |= {"grad_norm": optax.tree.norm(grads)}
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        params = {
            "model": _balanced(params["model"], metrics["load"], stage.bias_rate),
            "mtp": _balanced(params["mtp"], metrics["mtp_load"], stage.bias_rate),
        }
        return TrainState(params, optimizer_state, state.step + 1), metrics

    return jax.jit(step, donate_argnums=0)


def _balanced(params: Params, load: jax.Array, rate: float) -> Params:
    """A tree with its correction biases moved against the load."""
    vectors = params["vectors"]
    return params | {"vectors": vectors | {BIAS: balance(vectors[BIAS], load, rate)}}


def make_measure(config: ModelConfig, mesh: Mesh) -> Measure:
    """The metrics of a batch, without learning from it."""
    axes = axes_tree(param_specs(config))

    def local(params: Params, batch: TrainBatch) -> Metrics:
        return psum_data(total_loss(params, batch, config, LossWeights(0.0, 0.0, 0.0))[1])

    return jax.jit(shard_map(local, mesh, in_axes=(axes, BATCH_AXES), out_axes=()))


def _gradients(config: ModelConfig, weights: LossWeights, mesh: Mesh) -> Callable[..., Any]:
    """Gradients and metrics of a batch, each device working on its own rows."""
    axes = axes_tree(param_specs(config))

    def local(params: Params, batch: TrainBatch) -> tuple[Params, Metrics]:
        grads, metrics = jax.grad(total_loss, has_aux=True)(params, batch, config, weights)
        return psum_data((grads, metrics))

    return shard_map(local, mesh, in_axes=(axes, BATCH_AXES), out_axes=(axes, ()))
