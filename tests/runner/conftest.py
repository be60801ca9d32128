"""Small models with random weights, straight on a mesh: no files."""

from __future__ import annotations

from dataclasses import replace

import jax
import ml_dtypes  # noqa: F401  teaches numpy the name bfloat16
import numpy as np
import pytest

from cases import CASES
from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.model.decoder import Decoder
from glmjax.model.spec import ParamSpec, specs_of
from glmjax.runner.runner import DeviceRunner
from glmjax.scheduler.limits import make_limits
from glmjax.sharding import make_mesh, named_sharding

TINY = replace(CASES["qk_norm"], num_hidden_layers=2)


def random_params(config, mesh, seed: int = 0):
    """Arrays for a decoder, of order one after each product."""
    rng = np.random.default_rng(seed)

    def leaf(spec: ParamSpec) -> jax.Array:
        scale = spec.shape[-1] ** -0.5 if len(spec.shape) > 1 else 1.0
        values = (rng.standard_normal(spec.shape) * scale).astype(spec.dtype)
        return jax.device_put(values, named_sharding(mesh, spec.axes))

    return jax.tree.map(leaf, specs_of(Decoder(config)))


@pytest.fixture(scope="session")
def make_runner():
    """A runner of TINY by mesh, dtype and sizes."""

    def make(
        mesh: str = "1",
        dtype: str = "float32",
        pages: int = 40,
        slots: int = 4,
        seed: int = 0,
    ):
        config, shape = replace(TINY, dtype=dtype), MeshConfig.parse(mesh)
        cache = CacheConfig(page_size=4, num_pages=pages)
        scheduler = SchedulerConfig(
            max_running_requests=slots, chunked_prefill_size=8, max_seq_len=64
        )
        devices = make_mesh(shape)
        limits = make_limits(config, shape, cache, scheduler)
        return DeviceRunner(config, random_params(config, devices, seed), devices, limits)

    return make


@pytest.fixture(scope="session")
def make_params():
    """The tree that `make_runner` makes for a seed, on one device."""

    def make(seed: int):
        return random_params(TINY, make_mesh(MeshConfig()), seed)

    return make
