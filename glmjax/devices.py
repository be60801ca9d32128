"""Which devices serve: the GPUs there are, or virtual CPU devices made for the purpose."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import jax
from jax.sharding import Mesh

from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.sharding import make_mesh

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where glmjax keeps what it can make again: GLMJAX_CACHE, else ~/.cache/glmjax."""
    return Path(os.environ.get("GLMJAX_CACHE") or Path.home() / ".cache" / "glmjax")


def mesh_for(config: MeshConfig, compile_cache: Path | None = None) -> Mesh:
    """A mesh over GPUs, or with none over as many virtual CPU devices as it needs.

    Virtual devices can be made only before JAX is first used in a process.

    Args:
        compile_cache: folder where compiled programs are kept for the next start; None: nowhere.

    Raises:
        ConfigError: fewer devices than asked for.
    """
    if compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    _allow_virtual_devices(config.size)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    if on_cpu and len(devices) < config.size:
        raise ConfigError(
            f"mesh {config.data}x{config.tensor} needs {config.size} devices, but JAX already runs "
            f"with {len(devices)} CPU device(s) in this process; set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.size} before starting it"
        )
    mesh = make_mesh(config, devices)
    if on_cpu:
        log.info("no GPU found: running on %d virtual CPU device(s)", config.size)
    else:
        log.info("running on %d of %d x %s", config.size, len(devices), devices[0].device_kind)
    return mesh


def _allow_virtual_devices(count: int) -> None:
    """Ask for CPU devices; too late, and without effect, once JAX has been used."""
    try:
        if jax.config.jax_num_cpu_devices < count:  # pyright: ignore[reportAttributeAccessIssue]
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        log.debug("JAX runs already; its CPU devices stay as they are")
