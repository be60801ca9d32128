"""What the sections of the first day share: the machine, its peaks, and how rows are kept."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from glmjax.config import MeshConfig
from glmjax.devices import mesh_for
from pallas_kernels.backend import DEVICES, Backend

Row = dict[str, Any]

SPEEDS = ("_us", "_s", "_share")  # ends of the names of what was timed
PACKAGES = ("glmjax", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt", "flax")
REHEARSAL_DEVICES = 2


@dataclass(frozen=True)
class Peak:
    """What a GPU can do at most: bytes and dense operations a second."""

    bytes_s: float
    fp8_s: float = 1979e12
    bf16_s: float = 989e12


PEAKS = {"h100": Peak(3.35e12), "h200": Peak(4.8e12)}


@dataclass(frozen=True)
class Day:
    """How this day is run.

    Attributes:
        rehearse: tiny shapes on a CPU, kernels interpreted; no speed is kept.
        every: all official shapes, rather than those of one deployment of each model.
        models: folders or official names; empty: glm-nano and a few layers of Air.
        tiles: a regular expression of shapes to tune; None: none.
    """

    rehearse: bool = False
    every: bool = False
    models: tuple[str, ...] = ()
    tiles: str | None = None

    @property
    def device(self) -> str:
        """Which tiles and peaks are this GPU's; the H100's where it is unknown."""
        kind = jax.devices()[0].device_kind.lower()
        return next((name for name in DEVICES if name in kind), DEVICES[0])

    @property
    def peak(self) -> Peak:
        """Of one GPU."""
        return PEAKS[self.device]

    def backend(self, name: str) -> Backend:
        """One of the kernels' backends, on this machine."""
        return Backend(name, interpret=self.rehearse, device=self.device)

    @property
    def timing(self) -> dict[str, Any]:
        """How long to time a call: arguments of `measure.seconds`."""
        return {"rounds": 1, "least_s": 0.0} if self.rehearse else {}

    def mesh(self) -> jax.sharding.Mesh:
        """Tensor parallel over the devices present, as many as are a power of two."""
        count = len(jax.devices())
        return mesh_for(MeshConfig(tensor=1 << (count.bit_length() - 1)))

    def kept(self, row: Row) -> Row:
        """A row as it is reported: a rehearsal has no speeds."""
        if not self.rehearse:
            return row
        return {k: None if k.endswith(SPEEDS) else v for k, v in row.items()} | {"REHEARSAL": True}


def machine(day: Day) -> Iterator[Row]:
    """The devices, their driver and the versions in use. RuntimeError where there is no GPU."""
    first = jax.devices()[0]
    if first.platform != "gpu" and not day.rehearse:
        raise RuntimeError(
            f"no GPU: JAX found {first.platform} ({first.device_kind}). Run this on a machine where"
            " nvidia-smi lists one, with JAX's CUDA libraries (pip install -e '.[cuda12]') and"
            " without JAX_PLATFORMS; or --rehearse"
        )
    yield {"name": "devices", "value": f"{len(jax.devices())} x {first.device_kind}"}
    yield {"name": "driver", "value": _driver()}
    yield {"name": "platform", "value": first.client.platform_version.replace("\n", ", ")}
    for name in PACKAGES:
        yield {"name": name, "value": _version(name)}


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown: no nvidia-smi"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
