"""Programs compiled ahead, by bucket: an unknown shape is an error, never a silent compilation."""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from glmjax.config import ModelConfig
from glmjax.model.spec import ParamSpec, abstract
from glmjax.runner.blob import blob_size
from glmjax.runner.state import DeviceState
from glmjax.runner.steps import make_step
from glmjax.types import Bucket, Limits

log = logging.getLogger(__name__)

Programs = dict[Bucket, jax.stages.Compiled]

# XLA's CPU compiler would lift the conversion of a whole bf16 KV pool out of the attention loop.
CPU_OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}


def compile_step(
    model: ModelConfig, limits: Limits, bucket: Bucket, mesh: Mesh, params: Any, state: DeviceState
) -> jax.stages.Compiled:
    """Compile one bucket's step from trees of ParamSpec; the state is donated."""
    step = make_step(model, limits, bucket, mesh, params, state)
    blob = ParamSpec((limits.groups, blob_size(bucket, limits)), "int32", ("groups", None))
    arguments = abstract((params, state, blob), mesh)
    lowered = jax.jit(step, donate_argnums=1).lower(*arguments)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return lowered.compile(compiler_options=CPU_OPTIONS if on_cpu else None)


def compile_all(
    model: ModelConfig, limits: Limits, mesh: Mesh, params: Any, state: DeviceState
) -> Programs:
    """Compile every bucket of `limits`, with a progress bar on a terminal."""
    began = time.monotonic()
    buckets = (*limits.decode_buckets, *limits.prefill_buckets)
    programs = {
        bucket: compile_step(model, limits, bucket, mesh, params, state)
        for bucket in tqdm(buckets, desc="compiling", unit="shape", disable=None)
    }
    log.info("compiled %d step shapes in %.1f s", len(programs), time.monotonic() - began)
    return programs


def blob_sharding(limits: Limits, mesh: Mesh) -> Any:
    """Where a step's blob goes: each data group's row to that group's devices."""
    return abstract(ParamSpec((limits.groups, 1), "int32", ("groups", None)), mesh).sharding
