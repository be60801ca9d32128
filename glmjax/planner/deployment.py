"""What is to be served on what: all that decides what a device holds and does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from glmjax.aot.abstract import param_specs
from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig


@dataclass(frozen=True)
class Deployment:
    """A model and how it is served.

    Attributes:
        model: as released, KV heads not repeated; with the kernels and the expert parallelism that
            it runs with.
        mesh: devices.
        cache, scheduler: the KV pool and what shares it.
        quantized: leaves that are stored in FP8, by path; None: as in an official release.
    """

    model: ModelConfig
    mesh: MeshConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    quantized: frozenset[str] | None = None

    @property
    def kv_dtype(self) -> str:
        """What K and V are stored as, by numpy's name."""
        return self.cache.stored_dtype(self.model)

    @property
    def drafting(self) -> bool:
        """Whether the MTP block is held and run."""
        return self.scheduler.speculative_num_steps > 0

    @property
    def specs(self) -> dict[str, Any]:
        """The parameters of a step, as trees of `ParamSpec`."""
        model = self.model.replicated(self.mesh.tensor)
        return _specs(model, self.drafting, self.quantized)


@lru_cache(maxsize=16)  # half a second of the largest model, and meshes are tried one after another
def _specs(model: ModelConfig, drafting: bool, quantized: frozenset[str] | None) -> dict[str, Any]:
    return param_specs(model, drafting, quantized)
