"""Parameters and state as they would lie on a mesh: shapes, no memory and no checkpoint."""

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

ROOTS = {"model": "", "mtp": "mtp/"}  # tree -> what its leaves' paths begin with in a checkpoint


def abstract_params(
    config: ModelConfig, mesh: Mesh, drafting: bool, quantized: Collection[str] | None = None
) -> dict[str, Any]:
    """What a step takes as its params, as `param_specs` describes them, placed on `mesh`."""
    config = config.replicated(tensor_size(mesh))
    return abstract(param_specs(config, drafting, quantized), mesh)


def param_specs(
    config: ModelConfig, drafting: bool, quantized: Collection[str] | None = None
) -> dict[str, Any]:
    """{"model": tree of ParamSpec}, with `drafting` also {"mtp": tree}.

    Args:
        config: as it runs, KV heads repeated.
        quantized: leaves that are `QuantArray`s, those of the MTP block under "mtp/"; None: what an
            FP8 release has so, where `config.quant` says that it is one.
    """
    trees: dict[str, Any] = {"model": specs_of(Decoder(config))}
    if drafting:
        trees["mtp"] = specs_of(MTP(config))
    if not config.quant:
        return trees
    return {name: _quantize(tree, ROOTS[name], config, quantized) for name, tree in trees.items()}


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


def _quantize(tree: Any, root: str, config: ModelConfig, quantized: Collection[str] | None) -> Any:
    assert config.quant is not None
    leaves = {root + path_name(path) for path, _ in jax.tree.leaves_with_path(tree)}
    found = fp8_leaves(config, config.quant, leaves) if quantized is None else leaves & {*quantized}
    block = config.quant.block_size
    return quantize_specs(
        tree, {leaf.removeprefix(root) for leaf in found}, block[1] if block else None
    )
