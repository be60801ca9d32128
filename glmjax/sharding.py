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
    "expert_shards": TENSOR,
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
    """A mesh over the first devices of each host, one host after another.

    So a tensor-parallel group lies within a host wherever it fits into one.

    Raises:
        ConfigError: there are fewer devices, or fewer hosts.
    """
    devices = jax.devices() if devices is None else devices
    chosen = list(devices[: config.size]) if config.hosts == 1 else _by_host(config, devices)
    if len(chosen) < config.size:
        raise ConfigError(
            f"mesh {config.data}x{config.tensor} needs {config.size} devices, but there are "
            f"{len(devices)}: {', '.join(str(d) for d in devices)}"
        )
    grid = np.array(chosen).reshape(config.data, config.tensor)
    return Mesh(grid, (DATA, TENSOR))


def _by_host(config: MeshConfig, devices: Sequence[Any]) -> list[Any]:
    """`devices_per_host` devices of each process, in the order of processes."""
    hosts: dict[int, list[Any]] = {}
    for device in sorted(devices, key=lambda device: (device.process_index, device.id)):
        hosts.setdefault(device.process_index, []).append(device)
    counts = [len(found) for found in hosts.values()]
    if len(counts) != config.hosts or min(counts) < config.devices_per_host:
        raise ConfigError(
            f"mesh {config} over {config.hosts} hosts needs {config.devices_per_host} devices on "
            f"each, but {len(counts)} hosts have {', '.join(map(str, counts))}"
        )
    return [device for found in hosts.values() for device in found[: config.devices_per_host]]


def partition_spec(axes: Axes) -> PartitionSpec:
    """Logical axes, one a dimension, to a PartitionSpec."""
    return PartitionSpec(*(LOGICAL_AXES[axis] for axis in axes))


def shape_on_device(shape: tuple[int, ...], axes: Axes, mesh: MeshConfig) -> tuple[int, ...]:
    """The shape of a device's part of an array, of logical axes that `mesh` divides."""
    ways = {DATA: mesh.data, TENSOR: mesh.tensor, None: 1}
    return tuple(n // ways[LOGICAL_AXES[axis]] for n, axis in zip(shape, axes, strict=True))


def named_sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    """Logical axes, one a dimension, to a sharding on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def crosses_hosts(mesh: Mesh) -> bool:
    """Whether devices of `mesh`, real or described, belong to more than one process."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def place(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """`values`, which every host has alike, on the devices of `sharding`.

    Over several hosts `device_put` would first compare them, a collective of milliseconds.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(values, sharding)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


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


def gather_groups(x: jax.Array) -> jax.Array:
    """Join the data groups' parts along the first axis. Inside `shard_map` only."""
    return jax.lax.all_gather(x, DATA, axis=0, tiled=True)


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
