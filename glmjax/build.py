"""From a converted folder to an engine that runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from glmjax.checkpoint import open_converted
from glmjax.config import (
    DEFAULT_POOL_BYTES,
    SIZES,
    CacheConfig,
    MeshConfig,
    SchedulerConfig,
)
from glmjax.devices import (
    agreed,
    is_cpu,
    kernel_backend,
    mesh_for,
    platform,
    prepare,
    usable_bytes,
)
from glmjax.engine import Engine
from glmjax.planner.deployment import Deployment
from glmjax.planner.fitting import fit, largest_temp_bytes
from glmjax.planner.memory import Memory
from glmjax.plans import Limits, Runner
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import load, load_mtp
from glmjax.scheduler.limits import describe
from glmjax.server.served import ServedModel

log = logging.getLogger(__name__)


def build(
    folder: str | Path,
    mesh: MeshConfig,
    dtype: str | None = None,
    cache: CacheConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    name: str | None = None,
    kernels: str = "auto",
    over: Callable[[DeviceRunner], Runner] | None = None,
) -> tuple[Engine, ServedModel]:
    """Check everything that can be checked, then restore weights and compile every step.

    Args:
        folder: what convert/hf_to_orbax.py wrote.
        mesh: how to split the model and the requests over devices.
        dtype: "bfloat16" or "float32" for weights, activations and, where `cache` does not say
            otherwise, KV; None: the checkpoint's.
        cache, scheduler: pool and queue sizes; None: `SIZES` of the devices.
        name: what clients call the model; None: the folder's name.
        kernels: how operations are computed, one of `glmjax.devices.KERNELS`.
        over: makes of the runner what the engine drives, where there are several hosts.

    Raises:
        ConfigError: the mesh, the sizes or the devices do not fit.
        CheckpointError: the folder is not a whole converted checkpoint.
    """
    prepare(mesh.devices_per_host)
    sizes = SIZES[platform()]
    scheduler = scheduler or SchedulerConfig(
        sizes.max_running_requests, chunked_prefill_size=sizes.chunked_prefill_size
    )
    cache = cache or CacheConfig(sizes.page_size)
    converted = open_converted(folder, dtype)
    experts = {"expert_parallel": mesh.expert_parallel}
    config = replace(converted.config, deterministic=scheduler.deterministic, **experts)
    if scheduler.speculative_num_steps and not converted.manifest.has_mtp:
        log.info("%s has no MTP block: served without drafting", folder)
        scheduler = replace(scheduler, speculative_num_steps=0)
    mesh.check(config)
    devices = mesh_for(mesh)
    config = replace(config, kernels=kernel_backend(kernels, devices))
    deployment = Deployment(config, mesh, cache, scheduler, frozenset(converted.manifest.quantized))
    limits, memory = sized(deployment, devices)
    kv_dtype = deployment.kv_dtype
    log.info("%s", describe(config, mesh, limits, kv_dtype))
    log.info("%s", memory)
    served = ServedModel.load(folder, name, limits.max_seq_len)
    _, params = load(folder, devices, dtype, **experts)
    mtp = load_mtp(folder, devices, dtype, **experts) if limits.num_drafts else None
    runner = DeviceRunner(config, params, devices, limits, mtp, kv_dtype)
    driven = over(runner) if over else runner
    return Engine(driven, scheduler, served.eos_token_ids), replace(served, config=config)


def sized(deployment: Deployment, devices: Mesh) -> tuple[Limits, Memory]:
    """The limits that the memory of `devices` allows, and how it is used.

    On a CPU memory is taken as it is needed: nothing is kept free, and what lies between operations
    is not counted.

    Raises:
        ConfigError: it does not fit; says how much is missing, and what would fit.
    """
    size_bytes, cache = usable_bytes(devices), deployment.cache
    if not is_cpu(devices):
        fit(deployment, 0, size_bytes)  # before a minute of compiling
        # Each host compiles for itself, and may come out a little otherwise.
        temp_bytes = agreed(largest_temp_bytes(deployment, devices), devices, np.max)
        return fit(deployment, temp_bytes, size_bytes)
    if cache.num_pages is None and cache.memory_bytes is None:
        cache = replace(cache, memory_bytes=DEFAULT_POOL_BYTES)
    return fit(replace(deployment, cache=cache), 0, size_bytes, reserve_bytes=0)
