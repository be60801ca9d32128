"""The only file that names mesh axes: which logical axis lies on which, and what crosses devices.

A step runs inside one `shard_map` over the whole mesh, so model code sees its device's part of
every array and calls the collectives below where parts must meet. On "tensor" lie heads and widths;
on "data" lie requests: slots, pages and the rows of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmjax.config import MeshConfig
from glmjax.errors import ConfigError

DATA, TENSOR = "data", "tensor"

LOGICAL_AXES: dict[str | None, str | None] = {
    None: None,
    "embed": None,
    "experts": None,
    "vocab": TENSOR,
    "kv_heads": TENSOR,
    "heads": TENSOR,
    "mlp": TENSOR,
    "expert_mlp": TENSOR,
    "groups": DATA,
    "slots": DATA,
    "pages": DATA,
    "rows": DATA,
}

Axes = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over the first `config.size` devices.

    Raises:
        ConfigError: there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) < config.size:
        raise ConfigError(
            f"mesh {config.data}x{config.tensor} needs {config.size} devices, but there are "
            f"{len(devices)}: {', '.join(str(d) for d in devices)}"
        )
    grid = np.array(devices[: config.size]).reshape(config.data, config.tensor)
    return Mesh(grid, (DATA, TENSOR))


def partition_spec(axes: Axes) -> PartitionSpec:
    """Logical axes, one a dimension, to a PartitionSpec."""
    return PartitionSpec(*(LOGICAL_AXES[axis] for axis in axes))


def named_sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    """Logical axes, one a dimension, to a sharding on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def shard_map(
    fn: Callable[..., Any], mesh: Mesh, in_axes: Any, out_axes: Any
) -> Callable[..., Any]:
    """`jax.shard_map` over trees of logical axes, or of PartitionSpecs as `placement` gives."""
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=_specs(in_axes),
        out_specs=_specs(out_axes),
        check_vma=False,
    )


def psum_tensor(x: jax.Array) -> jax.Array:
    """Sum the parts that the tensor-parallel devices hold. Inside `shard_map` only."""
    return jax.lax.psum(x, TENSOR)


def psum_data(x: Any) -> Any:
    """Sum a tree over the data groups, as a trainer does. Inside `shard_map` only."""
    return jax.lax.psum(x, DATA)


def gather_tensor(x: jax.Array) -> jax.Array:
    """Join the tensor-parallel devices' parts along the last axis. Inside `shard_map` only."""
    return jax.lax.all_gather(x, TENSOR, axis=x.ndim - 1, tiled=True)


def tensor_index() -> jax.Array:
    """This device's place among its tensor-parallel peers, int32 []. Inside `shard_map` only."""
    return jax.lax.axis_index(TENSOR)


def placement(arrays: Any) -> Any:
    """The PartitionSpecs of a tree of arrays, real or abstract, on a mesh."""
    return jax.tree.map(lambda array: array.sharding.spec, arrays)


def _specs(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: partition_spec(leaf) if is_axes(leaf) else leaf, tree, is_leaf=is_axes
    )


def is_axes(value: Any) -> bool:
    """Whether `value` is one array's logical axes, rather than a tree of them."""
    return type(value) is tuple and all(a is None or isinstance(a, str) for a in value)
