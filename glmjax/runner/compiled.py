"""Programs compiled ahead, by bucket: an unknown shape is an error, never a silent compilation."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from glmjax.config import ModelConfig
from glmjax.model.spec import ParamSpec, abstract
from glmjax.plans import Bucket, Limits
from glmjax.runner.blob import blob_size, mask_shape
from glmjax.runner.steps import make_step

log = logging.getLogger(__name__)

Programs = dict[Bucket, jax.stages.Compiled]

MAX_COMPILERS = 8  # each holds a whole program in memory

# XLA's CPU compiler would lift the conversion of a whole bf16 KV pool out of the attention loop.
CPU_OPTIONS: dict[str, str | bool] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}

# Triton's GEMMs win here and there, but only a measurement on the GPU knows their tiles: cublasLt's
# are what was checked without one. And the pool may take all that is left beside temporaries: XLA
# would compute things twice to save memory that nobody else wants.
GPU_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_disable_hlo_passes": "rematerialization",
}


def lower_step(
    model: ModelConfig, limits: Limits, bucket: Bucket, mesh: Mesh, params: Any, state: Any
) -> jax.stages.Lowered:
    """One bucket's program for arrays like these, real or abstract; the state is donated."""
    step = make_step(model, limits, bucket, mesh, params, state)
    blob = ParamSpec((limits.groups, blob_size(bucket, limits)), "int32", ("groups", None))
    masks = ParamSpec(mask_shape(bucket, limits), "uint32", ("groups", None, None))
    inputs = abstract((blob, masks), mesh)
    # A GPU's default for float32 may be TF32, with 10 bits of mantissa.
    with jax.default_matmul_precision("highest" if model.dtype == "float32" else None):
        traced = jax.jit(step, donate_argnums=1).trace(params, state, *inputs)
        return traced.lower(lowering_platforms=_platforms(mesh))


def compile_all(
    model: ModelConfig, limits: Limits, mesh: Mesh, params: Any, state: Any
) -> Programs:
    """Compile every bucket of `limits`, several at a time; a bar on a terminal, else lines."""
    began = time.monotonic()
    options = options_for(mesh)
    programs: Programs = {}
    with ThreadPoolExecutor(min(MAX_COMPILERS, os.cpu_count() or 1)) as pool:
        running = {}
        for bucket in limits.buckets:
            lowered = lower_step(model, limits, bucket, mesh, params, state)
            running[pool.submit(lowered.compile, compiler_options=options)] = bucket
        bar = tqdm(as_completed(running), "compiling", len(running), unit="shape", disable=None)
        for future in bar:
            programs[running[future]] = future.result()
            if bar.disable:
                log.info("compiled %d of %d step shapes", len(programs), len(limits.buckets))
    log.info("compiling took %.1f s", time.monotonic() - began)
    return programs


def options_for(mesh: Mesh) -> dict[str, str | bool]:
    """XLA's options for steps on these devices."""
    return CPU_OPTIONS if mesh.devices.flat[0].platform == "cpu" else GPU_OPTIONS


def _platforms(mesh: Mesh) -> tuple[str, ...] | None:
    """What to lower for, where JAX itself may run on another: GPUs that are only described."""
    return ("cuda",) if mesh.devices.flat[0].platform == "gpu" else None
