"""Models to run steps of: a converted folder, or an official release with a few layers of noise."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from day import Day
from jax.sharding import Mesh

from glmjax.bench.synthetic import default_config
from glmjax.bundled import converted
from glmjax.config import ModelConfig
from glmjax.devices import kernel_backend
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import abstract, path_name, quantize_specs, specs_of
from glmjax.releases import KNOWN_MODELS
from glmjax.runner.kv_heads import tensor_size
from glmjax.runner.weights import load, load_mtp

LAYERS = 4  # of an official release: it fits one GPU, and layers are alike
USUAL = ("glm-nano", "zai-org/GLM-4.5-Air", "zai-org/GLM-4.5-Air-FP8")
STD, BIAS = 0.02, 7.0  # of weights; the correction bias lies near 7 in trained models


@dataclass(frozen=True)
class Model:
    """A model on a mesh: `params` is {"model": tree, "mtp": tree}, as steps take them."""

    name: str
    config: ModelConfig
    params: dict[str, Any]
    mesh: Mesh


def models(day: Day) -> list[str]:
    """Names for `restore`."""
    return ["tiny"] if day.rehearse else list(day.models or USUAL)


def restore(name: str, mesh: Mesh) -> Model:
    """Restore "glm-nano" or a folder; make up an official release, or what a rehearsal runs."""
    if name == "tiny":
        config, params = noise(replace(default_config(), num_hidden_layers=2), mesh)
    elif name in KNOWN_MODELS:
        config, params = noise(replace(KNOWN_MODELS[name], num_hidden_layers=LAYERS), mesh)
        name = f"{name}, {LAYERS} layers"
    else:
        folder = converted(mesh.size) if name == "glm-nano" else Path(name)
        config, model = load(folder, mesh)
        params = {"model": model, "mtp": load_mtp(folder, mesh)}
    kernels = kernel_backend("auto", mesh)
    return Model(name, replace(config, kernels=kernels), params, mesh)


def noise(config: ModelConfig, mesh: Mesh) -> tuple[ModelConfig, dict[str, Any]]:
    """Random weights on a mesh, those in FP8 that the official FP8 releases have in FP8."""
    config = config.replicated(tensor_size(mesh))
    specs = {"model": specs_of(Decoder(config)), "mtp": specs_of(MTP(config))}
    if config.quant:
        flat = jax.tree.leaves_with_path(specs)
        paths = {path_name(path) for path, _ in flat}
        linear = {p for p in paths if "layer" in p and p.endswith("_proj")}
        specs = quantize_specs(specs, linear, None)
    leaves, structure = jax.tree.flatten_with_path(abstract(specs, mesh))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    made = [_leaf(path_name(p), x, key) for (p, x), key in zip(leaves, keys, strict=True)]
    return config, jax.tree.unflatten(structure, made)


def _leaf(name: str, target: jax.ShapeDtypeStruct, key: jax.Array) -> jax.Array:
    """Made where it will lie: nothing is whole on the host."""

    def make(key: jax.Array) -> jax.Array:
        drawn = jax.random.normal(key, target.shape, jnp.bfloat16).astype(target.dtype)
        if name.endswith("scale"):
            return jnp.full_like(drawn, STD)
        if "norm" in name:
            return jnp.ones_like(drawn)
        if name.endswith("e_score_correction_bias"):
            return BIAS + 0.1 * drawn
        return drawn if target.dtype.itemsize == 1 else (drawn * STD).astype(target.dtype)

    return jax.jit(make, out_shardings=target.sharding)(key)
