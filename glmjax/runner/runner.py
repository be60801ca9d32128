"""The device side of the engine's contract: parameters, state, compiled steps."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.errors import ConfigError
from glmjax.plans import Bucket, Limits, StepPlan, StepResult
from glmjax.runner.blob import mask_shape
from glmjax.runner.commands import EnterPages, Launch, Step, launch_of
from glmjax.runner.compiled import compile_all
from glmjax.runner.entries import Entries
from glmjax.runner.kv_heads import tensor_size
from glmjax.runner.outputs import unpack_result
from glmjax.runner.state import make_state, state_specs
from glmjax.runner.update import fit
from glmjax.sharding import named_sharding, place
from pallas_kernels.pool_bits import BITS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DeviceHandle:
    """A launched step, whose outputs are on their way to the host."""

    bucket: Bucket
    rows: jax.Array
    probs: jax.Array | None
    prompt: jax.Array | None

    def wait(self) -> None:
        """Block until the step is done. Raises what it failed with."""
        self.rows.block_until_ready()

    def result(self) -> StepResult:
        """Block until the outputs are here."""
        probs, prompt = (None if x is None else np.asarray(x) for x in (self.probs, self.prompt))
        return unpack_result(np.asarray(self.rows), self.bucket, probs, prompt)


class DeviceRunner:
    """Runs steps on a mesh.

    Args:
        model: sizes, KV heads as stored or repeated as `mesh` needs; its dtype is the parameters'.
        params: arrays on the mesh, as `glmjax.runner.weights.load` restores them.
        mesh: devices.
        limits: shapes; all are compiled here, ahead of serving.
        mtp: the MTP block's, as `load_mtp` restores them; needed where `limits` have drafts.
        kv_dtype: what K and V are stored as, numpy's name; None: the model's dtype.
    """

    def __init__(
        self,
        model: ModelConfig,
        params: Any,
        mesh: Mesh,
        limits: Limits,
        mtp: Any = None,
        kv_dtype: str | None = None,
    ):
        if limits.num_drafts and mtp is None:
            raise ValueError(f"{limits.num_drafts} drafts, but no MTP block to draft with")
        self.limits = limits
        self._mesh = mesh
        self._params = {"model": params} | ({"mtp": mtp} if limits.num_drafts else {})
        self._kv_heads = model.num_key_value_heads
        model = model.replicated(tensor_size(mesh))
        self._specs = state_specs(model, limits, pool_dtype(kv_dtype or model.dtype, mesh))
        self._state = make_state(self._specs, mesh)
        self._programs = compile_all(model, limits, mesh, self._params, self._state)
        self._entries = Entries(mesh, limits, self._state)
        self._blob_sharding = named_sharding(mesh, ("groups", None))
        self._mask_sharding = named_sharding(mesh, ("groups", None, None))
        self._all_allowed = {b: self._no_masks(b) for b in limits.buckets}

    def launch(self, plan: StepPlan) -> DeviceHandle:
        """Dispatch a step and return at once.

        Raises:
            KeyError: the plan's bucket was not compiled.
        """
        return self.execute(self.commands(plan))

    def commands(self, plan: StepPlan) -> Launch:
        """What `launch` has the devices do. Raises as it does."""
        if plan.bucket not in self._programs:
            raise KeyError(plan.bucket)
        return launch_of(plan, self.limits)

    def execute(self, launch: Launch) -> DeviceHandle:
        """Dispatch what a plan has the devices do, and return at once."""
        for entry in launch.entries:
            enter = self._entries.pages if isinstance(entry, EnterPages) else self._entries.tables
            self._state = enter(self._state, *entry)
        return self._step(launch.step)

    def reset(self) -> None:
        """Forget all sequences and pages, after a step that failed; parameters stay."""
        del self._state  # its memory is needed for the new one
        self._state = make_state(self._specs, self._mesh)

    def update_params(self, params: Any) -> None:
        """Launch the next steps with other weights; steps launched already keep the old ones.

        Args:
            params: {"model": tree, "mtp": tree} as a trainer holds them, or the model's tree alone,
                as `glmjax.runner.weights.load` returns it; then the MTP block stays. KV heads
                repeated or as stored; float arrays of any dtype, on any devices. They are copied:
                while this runs a device holds the old weights and the new.

        Raises:
            ConfigError: another tree than the running one; nothing has changed then.
        """
        given = params if params.keys() & {"model", "mtp"} else {"model": params}
        if unknown := given.keys() - {"model", "mtp"}:
            raise ConfigError(
                f"the new parameters have {', '.join(map(str, unknown))} beside the model's; "
                'expected {"model": tree, "mtp": tree} or the model\'s tree alone'
            )
        used = {name: tree for name, tree in given.items() if name in self._params}
        kept = {name: self._params[name] for name in used}
        self._params = self._params | fit(used, kept, self._kv_heads)

    def _step(self, step: Step) -> DeviceHandle:
        bucket, masks = step.bucket, step.masks
        program, blob = self._programs[bucket], place(step.blob, self._blob_sharding)
        allowed = self._all_allowed[bucket] if masks is None else place(masks, self._mask_sharding)
        self._state, (rows, probs, prompt) = program(self._params, self._state, blob, allowed)
        wanted = rows, probs if step.logprobs else None, prompt if step.prompt_logprobs else None
        for out in wanted:
            if out is not None:
                out.copy_to_host_async()
        return DeviceHandle(bucket, *wanted)

    def _no_masks(self, bucket: Bucket) -> jax.Array:
        ones = np.full(mask_shape(bucket, self.limits), 2**32 - 1, np.uint32)
        return place(ones, self._mask_sharding)


def pool_dtype(kv_dtype: str, mesh: Mesh) -> str:
    """The dtype of a pool of `kv_dtype`: the same, on a CPU an integer of its bits."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return BITS.get(kv_dtype, kv_dtype) if on_cpu else kv_dtype
