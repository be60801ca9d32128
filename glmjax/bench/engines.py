"""The engines that are measured: one for each configuration, built once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from glmjax.build import build
from glmjax.bundled import ASSET, converted
from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.devices import prepare
from glmjax.engine import Engine
from glmjax.server.served import ServedModel

POOL_BYTES = 256 << 20  # of each engine: several are alive at once

Make = Callable[[SchedulerConfig], tuple[Engine, ServedModel]]


class Engines:
    """Engines by how they are configured.

    Args:
        make: builds one.
    """

    def __init__(self, make: Make):
        self._make = functools.cache(make)

    @property
    def served(self) -> ServedModel:
        """The model without its weights."""
        return self._make(SchedulerConfig())[1]

    def engine(self, **changes: Any) -> Engine:
        """One with the default configuration but for these fields of SchedulerConfig."""
        return self._make(SchedulerConfig(**changes))[0]


def of_model(folder: Path | None, dtype: str | None) -> Make:
    """Build engines of a converted model on one device; None: of glm-nano, in its own dtype."""

    def make(config: SchedulerConfig) -> tuple[Engine, ServedModel]:
        cache = CacheConfig(memory_bytes=POOL_BYTES)
        return build(folder or converted(), MeshConfig(), dtype, cache, config)

    return make


def describe(folder: Path | None, dtype: str | None) -> dict[str, str]:
    """The model and what JAX computes on, by name. Raises ConfigError: there is no such model."""
    prepare(1)
    config = ModelConfig.from_hf(folder or ASSET)
    return {
        "model": f"{(folder or ASSET).resolve().name}, {dtype or config.dtype}",
        "devices": f"1 x {jax.devices()[0].device_kind}",
    }
