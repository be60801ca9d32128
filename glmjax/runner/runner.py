"""The device side of the engine's contract: parameters, state, compiled steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.runner.blob import pack
from glmjax.runner.compiled import compile_all
from glmjax.runner.kv_heads import tensor_size
from glmjax.runner.state import make_state, state_specs
from glmjax.runner.update import fit
from glmjax.sharding import named_sharding
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
        model: sizes, KV heads as stored or repeated as `mesh` needs; its dtype is the parameters'.
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
        self._kv_heads = model.num_key_value_heads
        model = model.replicated(tensor_size(mesh))
        self._state = make_state(state_specs(model, limits, kv_dtype(model, mesh)), mesh)
        self._programs = compile_all(model, limits, mesh, params, self._state)
        self._blob_sharding = named_sharding(mesh, ("groups", None))

    def launch(self, plan: StepPlan) -> DeviceHandle:
        """Dispatch a step and return at once.

        Raises:
            KeyError: the plan's bucket was not compiled.
        """
        blob = jax.device_put(pack(plan, self.limits), self._blob_sharding)
        self._state, out = self._programs[plan.bucket](self._params, self._state, blob)
        out.copy_to_host_async()
        return DeviceHandle(out)

    def update_params(self, params: Any) -> None:
        """Launch the next steps with other weights; steps launched already keep the old ones.

        Args:
            params: a tree of all parameters, as `glmjax.runner.weights.load` returns it or with KV
                heads as stored; float arrays of any dtype, on any devices. They are copied: while
                this runs a device holds the old weights and the new.

        Raises:
            ConfigError: another tree than the running one; nothing has changed then.
        """
        self._params = fit(params, self._params, self._kv_heads)


def kv_dtype(model: ModelConfig, mesh: Mesh) -> str:
    """What the KV pool is stored as: the model's dtype, on a CPU the bits of bfloat16 as uint16."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return "uint16" if on_cpu and model.dtype == "bfloat16" else model.dtype
