"""A plan: does a model fit some GPUs, what do its steps do there, and what bounds their speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glmjax.aot.hardware import GPU, GPUS
from glmjax.aot.program import Report, compile_step
from glmjax.aot.target import described_mesh
from glmjax.config import (
    MEMORY_FRACTION,
    SIZES,
    CacheConfig,
    MeshConfig,
    SchedulerConfig,
)
from glmjax.errors import ConfigError
from glmjax.planner import source
from glmjax.planner.deployment import Deployment
from glmjax.planner.fitting import advice, smallest_mesh
from glmjax.planner.memory import DoesNotFitError, Memory, fill, small_pool
from glmjax.planner.roofline import (
    Bound,
    DecodeBound,
    DraftingBound,
    PrefillBound,
    bound,
    decode_bounds,
    drafting_bounds,
    prefill_bounds,
)
from glmjax.planner.work import Queries, Work, step_work
from glmjax.plans import Bucket, Limits
from pallas_kernels.backend import Backend

Compile = Callable[[Deployment, str], dict[str, Report]]

COMPILERS = 2  # each holds a whole program in memory: 1.5 GB


@dataclass(frozen=True)
class Workload:
    """What is asked of a deployment.

    Attributes:
        batches: requests that decode at once, over the whole mesh.
        context_tokens: what each of them has behind it.
        prompt_tokens: of a prompt whose prefill is looked at.
        lengths: of requests to count, prompt and output together.
        accepted_tokens: that a step with drafts gives each request, 1 to drafts + 1.
    """

    batches: tuple[int, ...] = (1, 8, 64, 256)
    context_tokens: int = 4096
    prompt_tokens: int = 4096
    lengths: tuple[int, ...] = (2048, 8192, 32768, 131072)
    accepted_tokens: float = 2.0


@dataclass(frozen=True)
class Step:
    """The largest step of a kind, on one device.

    Attributes:
        name: "decode", "verify" (drafts) or "mixed" (that, beside chunks of prompts).
        sequences, tokens: of one data group.
        report: of the compiled program.
        work: what the model needs.
        wire_bytes: that the device sends.
        bound: the least time it takes.
    """

    name: str
    sequences: int
    tokens: int
    report: Report
    work: Work
    wire_bytes: float
    bound: Bound


@dataclass(frozen=True)
class Plan:
    """What became known of a deployment on GPUs that need not be there.

    Attributes:
        name: the model's.
        device: what each is, "h100" or "h200".
        deployment: what is served; without the MTP block's drafts where it has none.
        workload: what was asked of it.
        memory: of a device; what is missing where it does not fit.
        limits: what can run at once; None: it does not fit.
        smallest: the fewest devices that hold the model; None: not 64.
        advice: what to change where it does not fit.
        steps: what was compiled; empty where it does not fit, as are the others.
        decode, prefill, drafting: bounds; no drafting without an MTP block.
    """

    name: str
    device: str
    deployment: Deployment
    workload: Workload
    memory: Memory
    limits: Limits | None
    smallest: MeshConfig | None
    advice: str
    steps: tuple[Step, ...] = ()
    decode: tuple[DecodeBound, ...] = ()
    prefill: tuple[PrefillBound, ...] = ()
    drafting: tuple[DraftingBound, ...] = ()

    @property
    def gpu(self) -> GPU:
        """What each device can do."""
        return GPUS[self.device]

    @property
    def fits(self) -> bool:
        """Whether it can be served."""
        return self.limits is not None

    @property
    def kv_tokens(self) -> int:
        """Positions that the KV pools of all data groups hold."""
        limits = self.limits
        return limits.groups * (limits.pages - 1) * limits.page_size if limits else 0

    def requests(self, tokens: int) -> int:
        """Requests of that many tokens that the KV pools hold at once; 0: longer than served."""
        limits = self.limits
        if limits is None or tokens > limits.max_seq_len:
            return 0
        return limits.groups * ((limits.pages - 1) // -(-tokens // limits.page_size))

    def running(self, tokens: int) -> int:
        """Those of them that can run at once, each in a slot."""
        slots = self.limits.groups * self.limits.slots if self.limits else 0
        return min(self.requests(tokens), slots)


def plan(
    model: str | Path,
    mesh: str | int | MeshConfig = 8,
    device: str = "h100",
    *,
    dtype: str | None = None,
    cache: CacheConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    kernels: str = "mosaic",
    memory_fraction: float = MEMORY_FRACTION,
    workload: Workload | None = None,
    compiled: Compile | None = None,
) -> Plan:
    """Compile a model's steps for GPUs that need not be there, and work out the rest.

    Args:
        model: an official release such as "zai-org/GLM-4.5-FP8", a converted folder, or one with
            the config.json of an HF checkpoint. No weights are needed.
        mesh: as for `MeshConfig.parse`; more than 8 devices are on hosts of 8.
        device: "h100" or "h200".
        dtype: to serve it in another than its own.
        cache, scheduler: pool and queue sizes; None: what `serve.py` takes on GPUs.
        kernels: "mosaic", "triton" or "ref".
        memory_fraction: of a GPU's memory, what XLA takes.
        workload: what to look at; None: the defaults.
        compiled: what gives the steps' reports; None: `compile_steps`.

    Raises:
        ConfigError: the model, the mesh or the sizes cannot be served, or JAX cannot compile for
            CUDA here.
    """
    if device not in GPUS:
        raise ConfigError(f"device is {device!r}, expected one of {', '.join(GPUS)}")
    workload = workload or Workload()
    found = source.find(model, dtype)
    shape = mesh if isinstance(mesh, MeshConfig) else MeshConfig.parse(mesh).on_hosts()
    rows, chunk, page_size = SIZES["gpu"]
    scheduler = scheduler or SchedulerConfig(rows, chunked_prefill_size=chunk)
    config = replace(
        found.config,
        kernels=Backend(kernels, device=device),
        expert_parallel=shape.expert_parallel,
        deterministic=scheduler.deterministic,
    )
    if not config.num_nextn_predict_layers:
        scheduler = replace(scheduler, speculative_num_steps=0)
    most = scheduler.speculative_num_steps + 1
    if most > 1 and not 1 <= workload.accepted_tokens <= most:
        raise ConfigError(
            f"{workload.accepted_tokens:g} accepted tokens a step: expected 1 to {most}, one more "
            "than the drafts"
        )
    cache = cache or CacheConfig(page_size)
    deployment = Deployment(config, shape, cache, scheduler, found.quantized)
    usable_bytes = int(memory_fraction * GPUS[device].memory_bytes)
    return _planned(
        found.name, device, deployment, workload, usable_bytes, compiled or compile_steps
    )


def _planned(
    name: str,
    device: str,
    deployment: Deployment,
    workload: Workload,
    usable_bytes: int,
    compiled: Compile,
) -> Plan:
    """Compiled only where weights and a KV pool fit at all."""
    temp_bytes = 0
    try:
        fill(deployment, 0, usable_bytes)
        reports = compiled(deployment, device)
        temp_bytes = max(report.temp_bytes for report in reports.values())
        limits, memory = fill(deployment, temp_bytes, usable_bytes)
    except DoesNotFitError as error:
        words = advice(deployment, temp_bytes, usable_bytes)
        smallest = smallest_mesh(deployment, temp_bytes, usable_bytes)
        return Plan(name, device, deployment, workload, error.memory, None, smallest, words)
    smallest = smallest_mesh(deployment, temp_bytes, usable_bytes)
    plan = Plan(name, device, deployment, workload, memory, limits, smallest, "")
    return replace(plan, steps=tuple(_steps(plan, reports)), **_bounds(plan))


def _steps(plan: Plan, reports: Mapping[str, Report]) -> Iterator[Step]:
    """Each compiled step with what it has to do when it is full."""
    assert plan.limits is not None
    deployment, context = plan.deployment, plan.workload.context_tokens
    for name, bucket in largest_buckets(plan.limits).items():
        queries = [Queries(bucket.rows, bucket.drafts + 1, context)]
        if bucket.chunk_rows:
            queries.append(Queries(1, bucket.chunk_tokens, 0))
        work = step_work(
            deployment.model,
            deployment.mesh,
            deployment.kv_dtype,
            queries,
            sampled=bucket.rows * (bucket.drafts + 1) + (bucket.chunk_rows > 0),
            drafts=bucket.drafts if deployment.drafting else None,
            quantized=deployment.quantized,
        )
        tokens = sum(q.places for q in queries)
        sent = work.wire_bytes(deployment.mesh.tensor)
        limit = bound(work, plan.gpu, deployment.mesh)
        yield Step(name, sum(q.seqs for q in queries), tokens, reports[name], work, sent, limit)


def _bounds(plan: Plan) -> dict[str, Any]:
    """The bounds of a plan's workload, by field."""
    deployment, workload = plan.deployment, plan.workload
    where = deployment.model, deployment.mesh, plan.gpu, deployment.kv_dtype
    scheduler = deployment.scheduler
    quantized: dict[str, Any] = {"quantized": deployment.quantized}
    drafts = scheduler.speculative_num_steps
    decode = decode_bounds(
        *where, workload.batches, workload.context_tokens, drafts=0 if drafts else None, **quantized
    )
    chunk = scheduler.chunked_prefill_size
    prefill = prefill_bounds(
        *where, workload.prompt_tokens, chunk, workload.batches, drafts=drafts or None, **quantized
    )
    drafting = drafts and drafting_bounds(
        *where,
        workload.batches,
        workload.context_tokens,
        num_drafts=drafts,
        accepted_tokens=workload.accepted_tokens,
        **quantized,
    )
    return {"decode": tuple(decode), "prefill": tuple(prefill), "drafting": tuple(drafting or ())}


def compile_steps(deployment: Deployment, device: str) -> dict[str, Report]:
    """What the largest steps of each kind do, compiled for a described mesh, by name."""
    mesh, limits = described_mesh(device, deployment.mesh), small_pool(deployment)

    def compiled(bucket: Bucket) -> Report:
        sizes = deployment.kv_dtype, deployment.quantized
        return compile_step(
            deployment.model, mesh, limits, bucket, kv_dtype=sizes[0], quantized=sizes[1]
        ).report

    buckets = largest_buckets(limits)
    with ThreadPoolExecutor(COMPILERS) as pool:
        running = {name: pool.submit(compiled, bucket) for name, bucket in buckets.items()}
        bar = tqdm(running.items(), "compiling", unit="step", disable=None)
        return {name: future.result() for name, future in bar}


def largest_buckets(limits: Limits) -> dict[str, Bucket]:
    """The largest shape of each kind of step."""
    decode = [b for b in limits.buckets if not b.chunk_rows]
    plain = max(b for b in decode if not b.drafts)
    kinds = {"decode": plain, "verify": max(decode), "mixed": limits.buckets[-1]}
    return {name: bucket for name, bucket in kinds.items() if name != "verify" or bucket.drafts}
