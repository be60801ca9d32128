"""Parameters, declared once: everything else about them derives from a tree of `ParamSpec`."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from glmjax.model.quant import QuantArray
from glmjax.sharding import Axes, named_sharding

FP8 = "float8_e4m3fn"


@dataclass(frozen=True)
class ParamSpec:
    """One array of the model.

    Attributes:
        shape: global shape. Matrices keep HF's [out, in] order: the contraction is the last axis.
        dtype: name of the stored dtype.
        axes: one logical axis a dimension; `glmjax.sharding` places them.
    """

    shape: tuple[int, ...]
    dtype: str
    axes: Axes

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def param(shape: tuple[int, ...], dtype: str, axes: Axes) -> nnx.Param:
    """Declare a parameter of a module. Modules hold specs; steps merge arrays into their place."""
    return nnx.Param(ParamSpec(shape, dtype, axes))


def specs_of(module: nnx.Module) -> dict[Any, Any]:
    """The parameters that a freshly made module declares, as nested dicts of `ParamSpec`."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


def quantize_specs(
    specs: dict[Any, Any], paths: Collection[str], block: int | None
) -> dict[Any, Any]:
    """Replace the leaves at `paths` ("layers/1/mlp/down_proj") by FP8 values and scales.

    `block` is how many columns share a scale; None: all of them, one scale an output channel.
    """

    def convert(path: Any, spec: ParamSpec) -> Any:
        return quantized(spec, block) if path_name(path) in paths else spec

    return jax.tree.map_with_path(convert, specs)


def quantized(spec: ParamSpec, block: int | None) -> QuantArray:
    """FP8 values of `spec`'s shape, and float32 scales [..., out, ceil(in / block)]."""
    blocks = -(-spec.shape[-1] // block) if block else 1
    last_axis = spec.axes[-1] if block else None
    values = ParamSpec(spec.shape, FP8, spec.axes)
    scale = ParamSpec((*spec.shape[:-1], blocks), "float32", (*spec.axes[:-1], last_axis))
    return QuantArray(values, scale, block)


def path_name(path: Any) -> str:
    """A JAX key path as "layers/1/mlp/down_proj"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def axes_tree(specs: Any) -> Any:
    """The logical axes of every leaf, for `glmjax.sharding.shard_map`."""
    return jax.tree.map(lambda spec: spec.axes, specs)


def abstract(specs: Any, mesh: Mesh) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings: restore targets and arguments to compile for."""

    def leaf(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            spec.shape, jnp.dtype(spec.dtype), sharding=named_sharding(mesh, spec.axes)
        )

    return jax.tree.map(leaf, specs)
