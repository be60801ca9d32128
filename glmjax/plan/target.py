"""GPUs that are described rather than present: what XLA needs to know to compile for them.

A program compiled so is for checking. One that serves is compiled on its own GPUs, where XLA
measures which algorithm of a library is fastest; without one it takes the library's first.
"""

from __future__ import annotations

from pathlib import Path

from jax.experimental import topologies
from jax.sharding import Mesh

from glmjax.config import MeshConfig
from glmjax.devices import INSTALL_AOT, assembler_first
from glmjax.errors import ConfigError
from glmjax.runner.compiled import GPU_OPTIONS
from glmjax.sharding import make_mesh

DEVICES = ("h100", "h200")

# What serves compiles with the same, except that there a spill is slow and not an error. The level
# is XLA's default, which XLA_FLAGS may have lowered to test on a CPU.
COMPILE_OPTIONS: dict[str, str | bool] = {
    **GPU_OPTIONS,
    "xla_backend_optimization_level": "3",
    "xla_gpu_fail_ptx_compilation_on_register_spilling": True,
}

_DESCRIPTIONS = Path(__file__).parent


def described_mesh(device: str, mesh: MeshConfig, hosts: int = 1) -> Mesh:
    """A mesh of GPUs that need not exist: programs compile for it, and cannot run.

    Args:
        device: "h100" (SXM5, 80 GB) or "h200".
        hosts: machines the GPUs are in, an equal number in each.

    Raises:
        ConfigError: no such device, an uneven number a host, or JAX cannot compile for CUDA here.
    """
    if device not in DEVICES:
        raise ConfigError(f"device is {device!r}, expected one of {', '.join(DEVICES)}")
    if hosts < 1 or mesh.size % hosts:
        raise ConfigError(f"{mesh.size} GPUs do not divide over {hosts} hosts")
    assembler_first()
    config = (_DESCRIPTIONS / f"{device}.textproto").read_text("utf-8")
    shape = f"1x{hosts}x{mesh.size // hosts}"  # slices, hosts, GPUs
    try:
        found = topologies.get_topology_desc(device, "cuda", target_config=config, topology=shape)
    except NotImplementedError:
        raise ConfigError(
            f"JAX has no CUDA plugin to compile for {device} with: install it ({INSTALL_AOT}), and "
            "on a machine without a GPU set JAX_PLATFORMS=cpu"
        ) from None
    return make_mesh(mesh, found.devices)
