"""Which devices serve: the GPUs there are, or virtual CPU devices made for the purpose."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from glmjax.config import MEMORY_FRACTION, MeshConfig
from glmjax.errors import ConfigError
from glmjax.sharding import make_mesh
from pallas_kernels.backend import DEVICES, NAMES, Backend

log = logging.getLogger(__name__)

MIN_CACHED_COMPILE_S = 0.3
# Of a GPU's memory, what XLA may take: its name, and the one before it.
FRACTION_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")

KERNELS = ("auto", *NAMES)
HOPPER = "9.0"  # compute capability


def cache_folder() -> Path:
    """Where glmjax keeps what it can make again: GLMJAX_CACHE, else ~/.cache/glmjax."""
    return Path(os.environ.get("GLMJAX_CACHE") or Path.home() / ".cache" / "glmjax")


def prepare(
    devices: int,
    compile_cache: Path | None = None,
    memory_fraction: float = MEMORY_FRACTION,
) -> None:
    """Set JAX up, before it is first used: enough virtual CPU devices, and where programs are kept.

    What the process has chosen itself stays: a compile cache of its own, devices once JAX has run,
    a share of the GPUs' memory.

    Args:
        devices: how many are wanted.
        compile_cache: folder for compiled programs; None: one in `cache_folder()`.
        memory_fraction: of each GPU's memory, what XLA may take.
    """
    said = [name for name in FRACTION_VARIABLES if name in os.environ]
    if not said:
        os.environ[FRACTION_VARIABLES[0]] = str(memory_fraction)
    elif float(os.environ[said[0]]) != memory_fraction:
        log.info("%s is %s: that is what XLA may take", said[0], os.environ[said[0]])
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        folder = compile_cache or cache_folder() / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_CACHED_COMPILE_S)
    if jax.config.jax_num_cpu_devices < devices:  # pyright: ignore[reportAttributeAccessIssue]
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:
            log.debug("JAX runs already; its CPU devices stay as they are")


def mesh_for(config: MeshConfig) -> Mesh:
    """A mesh over GPUs, or with none over as many virtual CPU devices as it needs.

    Raises:
        ConfigError: fewer devices than asked for.
    """
    prepare(config.devices_per_host)
    devices = jax.devices()
    on_cpu = devices[0].platform == "cpu"
    if on_cpu and config.hosts == 1 and len(devices) < config.size:
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


def platform() -> str:
    """Where JAX runs, which starts it: "gpu", or "cpu" for everything else."""
    return "gpu" if jax.default_backend() == "gpu" else "cpu"


def is_cpu(mesh: Mesh) -> bool:
    """Whether the devices are virtual ones on a CPU."""
    return mesh.devices.flat[0].platform == "cpu"


def usable_bytes(mesh: Mesh) -> int:
    """What each device of `mesh` may hold: XLA's share of a GPU, or of the machine's memory.

    All hosts learn the least that any has, so that they agree on what follows from it.
    """
    local = mesh.local_devices
    if is_cpu(mesh):
        least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(local)
    else:
        least = min(device.memory_stats()["bytes_limit"] for device in local)
    return agreed(least, mesh, np.min)


def agreed(value_bytes: int, mesh: Mesh, choose: Callable[[np.ndarray], np.integer]) -> int:
    """The least or the most that hosts of `mesh` have of something, the same on all of them.

    Over several hosts in whole MiB, for JAX has no int64: the least rounded down, the most up, so
    that none is short.

    Args:
        value_bytes: of this host.
        choose: np.min or np.max.
    """
    if not mesh.is_multi_process:
        return value_bytes
    mib = value_bytes >> 20 if choose is np.min else -(-value_bytes >> 20)
    return int(choose(multihost_utils.process_allgather(np.asarray(mib, np.int32)))) << 20


def kernel_backend(choice: str, mesh: Mesh) -> Backend:
    """How operations run on the devices of `mesh`.

    Args:
        choice: one of KERNELS; "auto": kernels on Hopper GPUs, plain jax.numpy elsewhere. On a CPU
            kernels are interpreted, which is for testing them.

    Raises:
        ConfigError: no such choice, or not on these GPUs.
    """
    if choice not in KERNELS:
        raise ConfigError(f"kernels is {choice!r}, expected one of {', '.join(KERNELS)}")
    device = mesh.devices.flat[0]
    on_cpu = device.platform == "cpu"
    hopper = getattr(device, "compute_capability", None) == HOPPER
    name = ("mosaic" if hopper else "ref") if choice == "auto" else choice
    if not (hopper or on_cpu):
        log.info("%s is no H100 or H200, which kernels are made for", device.device_kind)
        if name == "mosaic":
            raise ConfigError(f"mosaic kernels do not run on {device.device_kind}: --kernels ref")
    if on_cpu and name != "ref":
        log.warning("%s kernels are interpreted on a CPU: right, and very slow", name)
    known = [tuned for tuned in DEVICES if tuned in device.device_kind.lower()]
    return Backend(name, interpret=on_cpu, device=[*known, DEVICES[0]][0])
