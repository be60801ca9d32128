"""Parameters and state of an official release as they would lie on a mesh: shapes, no memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import Mesh

from convert.mapping import Fp8, places
from glmjax.config import ModelConfig, QuantConfig
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import abstract, path_name, quantize_specs, specs_of
from glmjax.plans import Limits
from glmjax.runner.kv_heads import tensor_size
from glmjax.runner.runner import pool_dtype
from glmjax.runner.state import DeviceState, state_specs


def abstract_params(config: ModelConfig, mesh: Mesh, drafting: bool) -> dict[str, Any]:
    """What a step takes as its params: {"model": tree}, with `drafting` also {"mtp": tree}.

    KV heads are repeated as `mesh` needs them. Where `config.quant` says so, linear layers are
    `QuantArray`s, as converted from an FP8 release.
    """
    config = config.replicated(tensor_size(mesh))
    trees: dict[str, Any] = {"model": specs_of(Decoder(config))}
    if drafting:
        trees["mtp"] = specs_of(MTP(config))
    if config.quant:
        roots = {"model": "", "mtp": "mtp/"}
        trees = {name: _quantize(tree, roots[name], config) for name, tree in trees.items()}
    return abstract(trees, mesh)


def abstract_state(
    config: ModelConfig, mesh: Mesh, limits: Limits, kv_dtype: str | None = None
) -> DeviceState:
    """What a step takes as its state. `kv_dtype`: of K and V; None: the model's dtype."""
    config = config.replicated(tensor_size(mesh))
    dtype = pool_dtype(kv_dtype or config.dtype, mesh)
    return abstract(state_specs(config, limits, dtype), mesh)


def fp8_leaves(config: ModelConfig, quant: QuantConfig, leaves: Collection[str]) -> set[str]:
    """Those of `leaves` that an FP8 release stores in FP8: linear layers that it does not ignore.

    Leaves of the MTP block are under "mtp/", as the converter has them.
    """
    quantized: dict[str, list[bool]] = defaultdict(list)
    for place in places(config, leaves):
        ignored = place.tensor.removesuffix(".weight") in quant.ignore
        quantized[place.leaf].append(place.fp8 is Fp8.EXPECTED and not ignored)
    return {leaf for leaf, parts in quantized.items() if all(parts)}


def _quantize(tree: Any, root: str, config: ModelConfig) -> Any:
    assert config.quant is not None
    leaves = {root + path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
    found = fp8_leaves(config, config.quant, leaves)
    block = config.quant.block_size
    return quantize_specs(
        tree, {leaf.removeprefix(root) for leaf in found}, block[1] if block else None
    )
