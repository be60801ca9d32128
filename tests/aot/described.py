"""Programs for GPUs that are only described."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from jax.sharding import Mesh

from glmjax.aot.launches import lower_for
from glmjax.aot.program import Program, compile_program, compile_step
from glmjax.aot.target import described_mesh
from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.plans import Bucket, Limits
from glmjax.releases import release
from glmjax.scheduler.limits import make_limits
from pallas_kernels.backend import Backend

ROWS, DRAFTS, CHUNK = 64, 3, 2048
PAGES = 512
DECODE = Bucket(ROWS, 0, 0, 0)
VERIFY = Bucket(ROWS, DRAFTS, 0, 0)
MIXED = Bucket(ROWS, DRAFTS, ROWS, CHUNK)


@cache
def mesh_of(device: str, data: int = 1, tensor: int = 1, hosts: int = 1) -> Mesh:
    return described_mesh(device, MeshConfig(data, tensor, hosts=hosts))


def lower_kernel(
    fn: Callable[..., Any], *shapes: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """`fn` of arrays, real or abstract, for one described H100."""
    return lower_for(mesh_of("h100"), fn, shapes, donate)


def compile_kernel(
    fn: Callable[..., Any], *shapes: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """`fn` compiled as by `lower_kernel`; a register that spills is an error."""
    return compile_program(lower_kernel(fn, *shapes, donate=donate)).compiled


def official(name: str, backend: Backend, moe_layers: int = 2) -> ModelConfig:
    """An official release cut to one dense layer and some MoE layers."""
    config = release(f"zai-org/{name}")
    layers = {"num_hidden_layers": 1 + moe_layers, "first_k_dense_replace": 1}
    return replace(config, kernels=backend, **layers)


def limits_of(model: ModelConfig, mesh: Mesh) -> Limits:
    """Of a deployment with ROWS sequences a data group, drafting."""
    config = MeshConfig(*mesh.devices.shape)
    scheduler = SchedulerConfig(
        max_running_requests=ROWS * config.data,
        chunked_prefill_size=CHUNK,
        speculative_num_steps=DRAFTS,
    )
    return make_limits(model, config, CacheConfig(page_size=64, num_pages=PAGES), scheduler)


def step_of(
    model: ModelConfig,
    mesh: Mesh,
    bucket: Bucket,
    options: dict[str, str | bool] | None = None,
) -> Program:
    return compile_step(model, mesh, limits_of(model, mesh), bucket, options)
