"""From a converted folder to an engine that runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from glmjax.checkpoint import open_converted
from glmjax.config import KV_DTYPES, CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.devices import kernel_backend, mesh_for
from glmjax.engine import Engine
from glmjax.errors import ConfigError
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import load, load_mtp
from glmjax.scheduler.limits import describe, make_limits, pool_bytes
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
) -> tuple[Engine, ServedModel]:
    """Check everything that can be checked, then restore weights and compile every step.

    Args:
        folder: what convert/hf_to_orbax.py wrote.
        mesh: how to split the model and the requests over devices.
        dtype: "bfloat16" or "float32" for weights, activations and, where `cache` does not say
            otherwise, KV; None: the checkpoint's.
        cache, scheduler: pool and queue sizes; None: defaults.
        name: what clients call the model; None: the folder's name.
        kernels: how operations are computed, one of `glmjax.devices.KERNELS`.

    Raises:
        ConfigError: the mesh, the sizes or the devices do not fit.
        CheckpointError: the folder is not a whole converted checkpoint.
    """
    scheduler, cache = scheduler or SchedulerConfig(), cache or CacheConfig()
    converted = open_converted(folder, dtype)
    config = replace(converted.config, deterministic=scheduler.deterministic)
    if scheduler.speculative_num_steps and not converted.manifest.has_mtp:
        log.info("%s has no MTP block: served without drafting", folder)
        scheduler = replace(scheduler, speculative_num_steps=0)
    limits, kv_dtype = make_limits(config, mesh, cache, scheduler), cache.stored_dtype(config)
    log.info("%s", describe(config, mesh, limits, kv_dtype))
    served = ServedModel.load(folder, name, limits.max_seq_len)
    devices = mesh_for(mesh)
    config = replace(config, kernels=kernel_backend(kernels, devices))
    size_bytes = pool_bytes(config, mesh, limits, kv_dtype)
    check_kernels(config, limits.page_size, kv_dtype, size_bytes)
    _, params = load(folder, devices, dtype)
    mtp = load_mtp(folder, devices, dtype) if limits.num_drafts else None
    runner = DeviceRunner(config, params, devices, limits, mtp, kv_dtype)
    return Engine(runner, scheduler, served.eos_token_ids), replace(served, config=config)


def check_kernels(config: ModelConfig, page_size: int, kv_dtype: str, pool_bytes: int) -> None:
    """What kernels cannot do, told before weights are loaded.

    Their tiles are powers of two. One-byte arrays of 2 to 4 GiB are out of their reach: Pallas
    takes 64-bit offsets from 4 GiB on, and signed 32-bit ones below; K and V are half a pool each.

    Raises:
        ConfigError: pages or heads of another size, or such a pool.
    """
    if not config.kernels.kernels:
        return
    sizes = {"page_size": page_size, "head_dim": config.head_dim}
    odd = [f"{name} {size}" for name, size in sizes.items() if size & (size - 1)]
    if odd:
        raise ConfigError(
            f"kernels need powers of two, not {', '.join(odd)}: choose another page size, such as "
            "16 or 64, or serve with --kernels ref"
        )
    if kv_dtype == KV_DTYPES["fp8_e4m3"] and 2**31 < pool_bytes // 2 <= 2**32:
        raise ConfigError(
            f"kernels cannot address an FP8 KV pool of {pool_bytes / 2**30:.2f} GiB a device; "
            "choose at most 4 GiB, or more than 8"
        )
