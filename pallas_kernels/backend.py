"""Which implementation of each operation runs: chosen by configuration, never by probing."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("ref", "triton", "mosaic")
DEVICES = ("h100", "h200")  # keys of tiles.json
PROCESSORS = 132  # streaming multiprocessors of either


@dataclass(frozen=True)
class Backend:
    """How operations are computed.

    Attributes:
        name: "ref" is plain jax.numpy, which runs anywhere; "triton" Pallas kernels for NVIDIA GPUs
            through Triton; "mosaic" the same, with Mosaic GPU kernels (TMA, wgmma) where there are
            some.
        interpret: run kernels in Pallas' interpreters, on a CPU.
        device: whose tile sizes are used, a key of tiles.json.
    """

    name: str = "ref"
    interpret: bool = False
    device: str = "h100"

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"backend is {self.name!r}, expected one of {', '.join(NAMES)}")

    @property
    def kernels(self) -> bool:
        """Whether operations run as kernels rather than as plain jax.numpy."""
        return self.name != "ref"


REF = Backend()
