"""KV heads repeated over devices, where a mesh has more devices than the model has KV heads.

Leaves laid out by KV head are [.., K, G + 2, ..]: the G query heads of each KV head, its key, its
value. With r devices a KV head they become [.., K * r, G / r + 2, ..], so that each device holds a
KV head and its share of the query heads. The order of query heads stays, and with it o_proj.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from glmjax.model.spec import ParamSpec
from glmjax.sharding import partition_spec

KV_AXES = {"qkv_proj": 0, "qkv_bias": 1}  # leaves laid out by KV head, and the axis of K

Shape = tuple[int, ...]


def tensor_size(mesh: Mesh) -> int:
    """Devices over which KV heads are laid out."""
    return mesh.shape[partition_spec(("kv_heads",))[0]]


def kv_axis(path: str) -> int | None:
    """The axis of KV heads in the leaf at `path` ("layers/1/self_attn/qkv_proj/values"), if any."""
    return next((KV_AXES[name] for name in path.split("/") if name in KV_AXES), None)


def unsplit(path: str, spec: ParamSpec, kv_heads: int) -> ParamSpec:
    """How a stored leaf is restored: with all KV heads on each device where they are repeated."""
    axis = kv_axis(path)
    if axis is None or spec.shape[axis] == kv_heads:
        return spec
    return replace(spec, axes=(*spec.axes[:axis], None, *spec.axes[axis + 1 :]))


def stored_shape(path: str, shape: Shape, kv_heads: int) -> Shape:
    """The shape with `kv_heads` KV heads of a leaf that has `shape` with repeated ones."""
    axis = kv_axis(path)
    if axis is None:
        return shape
    repeats = shape[axis] // kv_heads
    return (*shape[:axis], kv_heads, (shape[axis + 1] - 2) * repeats + 2, *shape[axis + 2 :])


def repeat(path: str, array: jax.Array, kv_heads: int, sharding: Sharding) -> jax.Array:
    """Repeat the KV heads of a leaf up to `kv_heads`, each device its own part; others as they are.

    Args:
        path: which leaf; `array` may be it, or the values or scales of it.
        sharding: of the result.
    """
    axis = kv_axis(path)
    if axis is None or array.shape[axis] == kv_heads:
        return array
    # Only equivalent to what was asked for until it is put there, which copies nothing.
    return jax.device_put(_repeat(array, axis, kv_heads, sharding), sharding)


@partial(jax.jit, static_argnames=("axis", "kv_heads", "sharding"))
def _repeat(array: jax.Array, axis: int, kv_heads: int, sharding: Sharding) -> jax.Array:
    """As a program of the mesh, in which each device computes its own part only."""
    return jax.lax.with_sharding_constraint(repeat_heads(array, axis, kv_heads), sharding)


def repeat_heads(array: jax.Array, axis: int, kv_heads: int) -> jax.Array:
    """[.., K, G + 2, ..] with K at `axis` -> [.., kv_heads, G * K / kv_heads + 2, ..]."""
    queries, kv = jnp.split(array, [array.shape[axis + 1] - 2], axis=axis + 1)
    shape = (*array.shape[:axis], kv_heads, -1, *array.shape[axis + 2 :])
    kv = jnp.repeat(kv, kv_heads // array.shape[axis], axis=axis)
    return jnp.concatenate([queries.reshape(shape), kv], axis=axis + 1)
