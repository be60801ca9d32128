"""What lies in a device's memory, and how large a KV pool it leaves room for. Pure arithmetic.

`serve.py` sizes its pool with it, and the planner tells what that will be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from glmjax.config import KV_DTYPES, CacheConfig, MeshConfig, ModelConfig
from glmjax.errors import ConfigError
from glmjax.planner.deployment import Deployment
from glmjax.plans import Limits
from glmjax.runner.state import state_specs
from glmjax.runner.weights import check_blocks
from glmjax.scheduler.limits import make_limits, pool_bytes
from glmjax.sharding import shape_on_device

GIB = 2**30
UNBOUNDED_BYTES = 2**62
# Inputs and outputs of two steps in flight, masks that allow all tokens for each shape of a step
# (tens of MiB), and what an allocator cannot use between its pieces.
RESERVE_BYTES = 2**29
# One-byte arrays of 2 to 4 GiB are out of Pallas' reach: it takes 64-bit offsets from 4 GiB on, and
# signed 32-bit ones below. K and V are half a pool each.
UNREACHABLE_BYTES = (2**32, 2**33)


@dataclass(frozen=True)
class Memory:
    """What one device holds, in bytes.

    Attributes:
        usable_bytes: what it may hold in all.
        weights_bytes: its part of the parameters, the MTP block's with drafting.
        tables_bytes: state of the slots besides K and V: sampling, penalties, pages.
        temp_bytes: between the operations of the largest step. Steps in flight share it: the device
            runs one after another.
        pool_bytes: K and V.
        reserve_bytes: kept free.
    """

    usable_bytes: int
    weights_bytes: int
    tables_bytes: int
    temp_bytes: int
    pool_bytes: int = 0
    reserve_bytes: int = RESERVE_BYTES

    @property
    def left_bytes(self) -> int:
        """What is used by nothing; below 0: what is missing."""
        held = self.weights_bytes + self.tables_bytes + self.temp_bytes + self.pool_bytes
        return self.usable_bytes - self.reserve_bytes - held

    def __str__(self) -> str:
        parts = {
            "weights": self.weights_bytes,
            "KV": self.pool_bytes,
            "temporaries": self.temp_bytes,
            "tables": self.tables_bytes,
            "reserve": self.reserve_bytes,
        }
        words = ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return f"{words} of {self.usable_bytes / GIB:.2f} GiB a device"


class DoesNotFitError(ConfigError):
    """A device has too little memory for its part of a deployment.

    Attributes:
        memory: as far as it is used.
    """

    def __init__(self, message: str, memory: Memory):
        super().__init__(message)
        self.memory = memory


def bytes_on_device(specs: Any, mesh: MeshConfig) -> int:
    """Bytes that one device has of a tree of `ParamSpec`."""
    return sum(
        math.prod(shape_on_device(spec.shape, spec.axes, mesh)) * np.dtype(spec.dtype).itemsize
        for spec in jax.tree.leaves(specs)
    )


def roomy_limits(deployment: Deployment) -> Limits:
    """Limits where memory has no bounds: with the largest pool that all slots can use.

    Raises:
        ConfigError: as `make_limits`.
    """
    return _limits(deployment, replace(deployment.cache, memory_bytes=UNBOUNDED_BYTES))


def small_pool(deployment: Deployment) -> Limits:
    """Limits with hardly a pool: what a step needs in between does not depend on it."""
    return replace(roomy_limits(deployment), pages=2)


def fill(
    deployment: Deployment,
    temp_bytes: int,
    usable_bytes: int,
    reserve_bytes: int = RESERVE_BYTES,
) -> tuple[Limits, Memory]:
    """Give the KV pool what is asked for, or what everything else leaves.

    Where neither `num_pages` nor `memory_bytes` of the cache is given the pool gets all that is
    left, but not more than all slots can use.

    Args:
        temp_bytes: of the largest step.
        usable_bytes: of one device.
        reserve_bytes: of that, what is kept free.

    Returns:
        The deployment's limits, and the memory that they take.

    Raises:
        DoesNotFitError: says how much is missing.
        ConfigError: the pool that was asked for holds too little, or as `check`.
    """
    check(deployment)
    cache = deployment.cache
    tables = tables_bytes(deployment, roomy_limits(deployment))
    weights = bytes_on_device(deployment.specs, deployment.mesh)
    memory = Memory(usable_bytes, weights, tables, temp_bytes, reserve_bytes=reserve_bytes)
    if cache.num_pages is None and cache.memory_bytes is None:
        limits, filled = _fill_rest(deployment, memory)
    else:
        limits, filled = _filled(deployment, cache, memory)
    if out_of_reach(deployment.model, deployment.kv_dtype, filled.pool_bytes):
        raise ConfigError(
            f"kernels cannot address an FP8 KV pool of {filled.pool_bytes / GIB:.2f} GiB a device; "
            "choose at most 4 GiB, or more than 8"
        )
    _check_left(filled)
    return limits, filled


def check(deployment: Deployment) -> None:
    """What can be known to be wrong before anything is counted, compiled or loaded.

    Raises:
        ConfigError: sizes that the mesh does not divide, or sequences longer than the model's
            context; pages or heads that kernels, whose tiles are powers of two, cannot cut.
    """
    roomy_limits(deployment)
    model = deployment.model
    check_blocks(deployment.specs, deployment.mesh.tensor)
    sizes = {"page_size": deployment.cache.page_size, "head_dim": model.head_dim}
    odd = [f"{name} {size}" for name, size in sizes.items() if size & (size - 1)]
    if model.kernels.kernels and odd:
        raise ConfigError(
            f"kernels need powers of two, not {', '.join(odd)}: choose another page size, such as "
            "16 or 64, or serve with --kernels ref"
        )


def tables_bytes(deployment: Deployment, limits: Limits) -> int:
    """Bytes that one device has of the state besides K and V."""
    model = deployment.model.replicated(deployment.mesh.tensor)
    state = state_specs(model, limits, deployment.kv_dtype)
    return bytes_on_device(replace(state, kv=()), deployment.mesh)  # pyright: ignore


def out_of_reach(model: ModelConfig, kv_dtype: str, size_bytes: int) -> bool:
    """Whether the model's kernels cannot address a pool of that size."""
    least, most = UNREACHABLE_BYTES
    one_byte = kv_dtype == KV_DTYPES["fp8_e4m3"]
    return model.kernels.kernels and one_byte and least < size_bytes <= most


def _fill_rest(deployment: Deployment, memory: Memory) -> tuple[Limits, Memory]:
    """With all that is left for the pool, or the most of it that kernels can address."""
    _check_left(memory)
    cache = replace(deployment.cache, memory_bytes=max(memory.left_bytes, 1))
    try:
        limits, filled = _filled(deployment, cache, memory)
    except ConfigError as error:
        raise DoesNotFitError(f"{error} ({memory})", memory) from None
    if out_of_reach(deployment.model, deployment.kv_dtype, filled.pool_bytes):
        return _filled_in_reach(deployment, memory)
    return limits, filled


def _filled_in_reach(deployment: Deployment, memory: Memory) -> tuple[Limits, Memory]:
    """With the most of FP8 that kernels can address below what they cannot."""
    cache = replace(deployment.cache, memory_bytes=UNREACHABLE_BYTES[0])
    try:
        return _filled(deployment, cache, memory)
    except ConfigError as error:
        raise ConfigError(
            f"kernels address FP8 KV pools up to 4 GiB a device or above 8; there is memory for "
            f"{memory.left_bytes / GIB:.2f}; with 4 GiB {error}"
        ) from None


def _filled(deployment: Deployment, cache: CacheConfig, memory: Memory) -> tuple[Limits, Memory]:
    limits = _limits(deployment, cache)
    size = pool_bytes(deployment.model, deployment.mesh, limits, deployment.kv_dtype)
    return limits, replace(memory, pool_bytes=size)


def _limits(deployment: Deployment, cache: CacheConfig) -> Limits:
    return make_limits(deployment.model, deployment.mesh, cache, deployment.scheduler)


def _check_left(memory: Memory) -> None:
    if memory.left_bytes < 0:
        missing = f"{-memory.left_bytes / GIB:.2f} GiB are missing"
        raise DoesNotFitError(f"{missing}: {memory}", memory)
