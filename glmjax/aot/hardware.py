"""What a GPU can do at most. No kernel reaches these figures: they are for bounds."""

from __future__ import annotations

from dataclasses import dataclass

from glmjax.errors import ConfigError


@dataclass(frozen=True)
class GPU:
    """One GPU and its links.

    Attributes:
        name: as people call it.
        memory_bytes: of the device, as XLA is told.
        memory_bytes_per_s: between the memory and the chip.
        bf16_flops_per_s, fp8_flops_per_s: of the tensor cores, dense, a product and a sum being
            two.
        nvlink_bytes_per_s: to the GPUs of its host, in each direction.
        network_bytes_per_s: to other hosts, in each direction.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float

    def flops_per_s(self, dtype: str) -> float:
        """The peak for products of `dtype`, by numpy's name.

        Raises:
            ConfigError: of another dtype than the releases'.
        """
        peaks = {"bfloat16": self.bf16_flops_per_s, "float8_e4m3fn": self.fp8_flops_per_s}
        if dtype not in peaks:
            raise ConfigError(
                f"products are in {dtype}, but bounds are known for {', '.join(peaks)} only: plan "
                "for a model in one of them"
            )
        return peaks[dtype]


# Sources: memory, the descriptions h100.textproto and h200.textproto, which NVIDIA's data sheets
# round to 80 GB at 3.35 TB/s and 141 GB at 4.8 TB/s; tensor cores, its paper on the architecture of
# the H100, SXM5, without sparsity (the H200 has the same chip); NVLink, the data sheets' 900 GB/s,
# which is both directions together; network, a 400 Gb/s port a GPU, the DGX H100's data sheet.
_HOPPER = {
    "bf16_flops_per_s": 989.4e12,
    "fp8_flops_per_s": 1978.9e12,
    "nvlink_bytes_per_s": 450e9,
    "network_bytes_per_s": 50e9,
}
GPUS = {
    "h100": GPU("H100 SXM5", 84_942_979_072, 3_352_320_000_000, **_HOPPER),
    "h200": GPU("H200 SXM5", 150_754_820_096, 4_800_000_000_000, **_HOPPER),
}
