"""Converted folders as they are restored, leaf by leaf."""

from __future__ import annotations

import jax
import numpy as np

from glmjax.config import MeshConfig
from glmjax.model.spec import path_name
from glmjax.runner.weights import load, load_mtp
from glmjax.sharding import make_mesh


def restored(folder, mtp: bool = True, dtype: str | None = None) -> dict[str, np.ndarray]:
    """Every leaf by path, the MTP block under "mtp/"."""
    mesh = make_mesh(MeshConfig())
    _, params = load(folder, mesh, dtype)
    whole = params | ({"mtp": load_mtp(folder, mesh, dtype)} if mtp else {})
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(whole)}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Same paths, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for path, array in expected.items():
        found = actual[path]
        assert (found.shape, found.dtype) == (array.shape, array.dtype), path
        np.testing.assert_array_equal(found, array, err_msg=path)
