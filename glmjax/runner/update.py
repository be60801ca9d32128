"""Other weights in the places of those that run."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.errors import ConfigError
from glmjax.model.spec import path_name
from glmjax.runner.kv_heads import kv_axis, repeat, stored_shape
from glmjax.sharding import named_sharding


def fit(params: Any, running: Any, kv_heads: int) -> Any:
    """Copies of `params` with the dtypes and shardings of `running`, whole when this returns.

    Args:
        params: float arrays on any devices or in numpy, at the paths of `running`.
        running: arrays on a mesh.
        kv_heads: KV heads of the model as stored, where `running` may have them repeated; `params`
            may have either.

    Raises:
        ConfigError: a path, a shape or a dtype that does not fit; names the first.
    """
    flat, structure = jax.tree.flatten_with_path(running)
    wanted = {path_name(path): leaf for path, leaf in flat}
    given = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    _check(given, wanted, kv_heads)
    placed = [_place(path, given[path], like) for path, like in wanted.items()]
    return jax.tree.unflatten(structure, placed)


def _place(path: str, leaf: Any, like: Any) -> jax.Array:
    """One leaf, waited for, so that what it passes through is gone before the next one comes."""
    axis = kv_axis(path)
    if axis is not None and leaf.shape != like.shape:
        whole = jax.device_put(leaf, named_sharding(like.sharding.mesh, (None,) * leaf.ndim))
        leaf = repeat(path, whole, like.shape[axis], like.sharding)
    placed = jax.device_put(leaf, like.sharding)
    # A copy, always: device_put may alias arrays that a trainer donates to its next step.
    return jax.block_until_ready(jnp.array(placed, dtype=like.dtype, copy=True))


def _check(given: dict[str, Any], wanted: dict[str, jax.Array], kv_heads: int) -> None:
    faults = (_fault(path, given, like, kv_heads) for path, like in wanted.items())
    unknown = (f"{path} is no parameter of it" for path in given if path not in wanted)
    fault = next(filter(None, (*faults, *unknown)), None)
    if fault:
        raise ConfigError(
            f"the new parameters are not those of the running model: {fault}; give the whole tree "
            "of the model that the engine was built from. The engine goes on with what it has"
        )


def _fault(path: str, given: dict[str, Any], like: jax.Array, kv_heads: int) -> str | None:
    """What is wrong with the leaf at `path`, if anything."""
    if path not in given:
        return f"{path} is missing"
    leaf = given[path]
    if not isinstance(leaf, jax.Array | np.ndarray) or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{path} is {getattr(leaf, 'dtype', type(leaf).__name__)}, expected a float array"
    shapes = {like.shape, stored_shape(path, like.shape, kv_heads)}
    if leaf.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in sorted(shapes))
        return f"{path} is {list(leaf.shape)}, expected {expected}"
    return None
