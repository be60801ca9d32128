"""The device side of the engine's contract: parameters, state, compiled steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.errors import ConfigError
from glmjax.runner.blob import pack
from glmjax.runner.compiled import blob_sharding, compile_all
from glmjax.runner.state import make_state, state_specs
from glmjax.scheduler.buckets import decode_buckets, prefill_buckets
from glmjax.scheduler.pages import pages_for
from glmjax.types import Limits, StepPlan, StepResult

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceHandle:
    """A launched step, whose output is on its way to the host."""

    out: jax.Array

    def result(self) -> StepResult:
        """Block until the output is here."""
        tokens, accept_lens = np.moveaxis(np.asarray(self.out), 1, 0)
        return StepResult(tokens[..., None], accept_lens)


class DeviceRunner:
    """Runs steps on a mesh.

    Args:
        model: sizes; its dtype is the parameters'.
        params: arrays on the mesh, as `glmjax.runner.weights` restores them.
        mesh: devices.
        limits: shapes; all are compiled here, ahead of serving.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        mesh: Mesh,
        limits: Limits,
    ):
        self.limits = limits
        self._params = params
        state = state_specs(model, limits, model.dtype)
        self._programs = compile_all(model, limits, mesh, params, state)
        self._blob_sharding = blob_sharding(limits, mesh)
        self._state = make_state(state, mesh)

    def launch(self, plan: StepPlan) -> DeviceHandle:
        """Dispatch a step and return at once.

        Raises:
            KeyError: the plan's bucket was not compiled.
        """
        blob = jax.device_put(pack(plan, self.limits), self._blob_sharding)
        self._state, out = self._programs[plan.bucket](self._params, self._state, blob)
        out.copy_to_host_async()
        return DeviceHandle(out)


def make_limits(
    model: ModelConfig, mesh: MeshConfig, cache: CacheConfig, scheduler: SchedulerConfig
) -> Limits:
    """Shapes for a deployment.

    Raises:
        ConfigError: the mesh does not fit the model, or too little memory for one sequence.
    """
    mesh.check(model)
    slots = -(-scheduler.max_running_requests // mesh.data)
    context = model.max_position_embeddings
    seq_len = min(scheduler.max_seq_len or context, context)
    wanted = slots * pages_for(seq_len, cache.page_size) + 1
    pages = cache.num_pages or min(wanted, _pages_in(model, mesh, cache))
    seq_len = min(seq_len, (pages - 1) * cache.page_size)
    return Limits(
        groups=mesh.data,
        slots=slots,
        pages=pages,
        page_size=cache.page_size,
        max_seq_len=seq_len,
        decode_buckets=decode_buckets(slots),
        prefill_buckets=prefill_buckets(slots, min(scheduler.chunked_prefill_size, seq_len)),
    )


def _pages_in(model: ModelConfig, mesh: MeshConfig, cache: CacheConfig) -> int:
    """Pages that fit the memory of one device, which holds 1 / tensor of every page."""
    page_bytes = model.kv_bytes_per_token() * cache.page_size // mesh.tensor
    pages = cache.memory_bytes // page_bytes
    if pages < 2:
        raise ConfigError(
            f"a KV page takes {page_bytes} bytes a device, but the pool has {cache.memory_bytes}; "
            "give it more memory or use a larger mesh"
        )
    return pages
