"""GPUs that are described rather than present: what XLA needs to know to compile for them.

A program compiled so is for checking. One that serves is compiled on its own GPUs, where XLA
measures which algorithm of a library is fastest; without one it takes the library's first.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from jax.experimental import topologies
from jax.sharding import Mesh

from glmjax.aot.hardware import GPUS
from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.runner.compiled import GPU_OPTIONS
from glmjax.sharding import make_mesh

# What serves compiles with the same, except that there a spill is slow and not an error. The level
# is XLA's default, which XLA_FLAGS may have lowered to test on a CPU.
COMPILE_OPTIONS: dict[str, str | bool] = {
    **GPU_OPTIONS,
    "xla_backend_optimization_level": "3",
    "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
}

_INSTALL = "pip install 'glmjax[{}]'"
_DESCRIPTIONS = Path(__file__).parent


def described_mesh(device: str, mesh: MeshConfig) -> Mesh:
    """A mesh of GPUs that need not exist: programs compile for it, and cannot run.

    Args:
        device: "h100" (SXM5, 80 GB) or "h200".

    Raises:
        ConfigError: no such device, or JAX cannot compile for CUDA here.
    """
    if device not in GPUS:
        raise ConfigError(f"device is {device!r}, expected one of {', '.join(GPUS)}")
    assembler_first()
    config = (_DESCRIPTIONS / f"{device}.textproto").read_text("utf-8")
    shape = f"1x{mesh.hosts}x{mesh.devices_per_host}"  # slices, hosts, GPUs
    try:
        found = topologies.get_topology_desc(device, "cuda", target_config=config, topology=shape)
    except NotImplementedError:
        raise ConfigError(
            f"JAX has no CUDA plugin to compile for {device} with: install it "
            f"({_INSTALL.format('plan')}), and on a machine without a GPU set JAX_PLATFORMS=cpu"
        ) from None
    return make_mesh(mesh, found.devices)


def assembler_first() -> None:
    """Put the installed packages' ptxas first on PATH: kernels take the first one there is.

    Raises:
        ConfigError: it is not installed.
    """
    folder = str(tool("nvidia.cuda_nvcc", "bin/ptxas", extra="plan").parent)
    paths = os.environ.get("PATH", "").split(os.pathsep)
    if paths[0] != folder:
        os.environ["PATH"] = os.pathsep.join([folder, *paths])


def tool(package: str, path: str, extra: str = "aot") -> Path:
    """A program of NVIDIA's that a package brings, which the project's `extra` installs.

    Raises:
        ConfigError: it is not installed.
    """
    found = [Path(folder) / path for folder in _folders(package)]
    existing = [file for file in found if file.exists()]
    if not existing:
        raise ConfigError(f"{Path(path).name} is not installed: {_INSTALL.format(extra)}")
    return existing[0]


def _folders(package: str) -> list[str]:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # of the package that it is in
        return []
    return list(spec.submodule_search_locations or []) if spec else []
