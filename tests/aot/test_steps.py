"""Whole steps of the official releases, compiled for the GPUs they are meant for: what they cost.

Models are cut to one dense layer and two MoE layers, except where depth matters. What a step may do
is in the tables below; numbers there are what was seen, a little rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import Mesh

from described import DECODE, DRAFTS, MIXED, VERIFY, limits_of, mesh_of, official, step_of
from glmjax.aot.abstract import abstract_params, abstract_state
from glmjax.aot.program import Report
from glmjax.config import ModelConfig
from glmjax.plans import Bucket
from glmjax.releases import release
from glmjax.runner.kv_heads import tensor_size
from glmjax.sharding import crosses_hosts
from pallas_kernels.backend import REF, Backend

pytestmark = [pytest.mark.aot, pytest.mark.timeout(600)]

MIB, GIB = 1 << 20, 1 << 30
GEMM_COLUMNS = 16  # cublasLt's FP8 products have whole multiples
ONE_SHOT_BYTES = 4 * MIB  # XLA has kernels of its own for sums up to that size


class Deployment(NamedTuple):
    """A release and the GPUs it is served on: `data` groups of `tensor` over `hosts` machines.

    With `expert_parallel` each GPU of a group has whole experts.
    """

    release: str
    device: str
    tensor: int
    data: int = 1
    hosts: int = 1
    expert_parallel: bool = False

    def mesh(self) -> Mesh:
        return mesh_of(self.device, self.data, self.tensor, self.hosts)

    def model(self, moe_layers: int = 2) -> ModelConfig:
        model = official(self.release, Backend("mosaic", device=self.device), moe_layers)
        return replace(model, expert_parallel=self.expert_parallel)


DEPLOYMENTS = {
    "Air BF16 on 4 H100": Deployment("GLM-4.5-Air", "h100", 4),
    "Air FP8 on 2 H100": Deployment("GLM-4.5-Air-FP8", "h100", 2),
    "355B FP8 on 8 H100": Deployment("GLM-4.5-FP8", "h100", 8),
    "355B FP8 on 4 H200": Deployment("GLM-4.5-FP8", "h200", 4),
    "355B BF16 on 8 H200": Deployment("GLM-4.5", "h200", 8),
    "355B BF16 on 2 x 8 H100": Deployment("GLM-4.5", "h100", 8, data=2, hosts=2),
    "Air FP8 on 8 H100, EP": Deployment("GLM-4.5-Air-FP8", "h100", 8, expert_parallel=True),
    "355B FP8 on 8 H100, EP": Deployment("GLM-4.5-FP8", "h100", 8, expert_parallel=True),
}


class Budget(NamedTuple):
    """What a step of one bucket may take at most.

    Attributes:
        launches: in all.
        logits: memory in between, in float32 logits of all places that are sampled.
        sorts: of logits, for log probabilities.
    """

    launches: int
    logits: float
    sorts: int


BUDGETS = {
    DECODE: Budget(launches=240, logits=6, sorts=1),
    VERIFY: Budget(launches=365, logits=6, sorts=1),
    MIXED: Budget(launches=460, logits=6, sorts=2),
}
NAMES = {DECODE: "decode", VERIFY: "verify", MIXED: "mixed"}
LAYER_LAUNCHES = 34  # of one more MoE layer in decode


@pytest.mark.parametrize("bucket", BUDGETS, ids=NAMES.get)
@pytest.mark.parametrize("deployment", DEPLOYMENTS)
def test_a_step_is_within_its_budget(deployment, bucket):
    chosen = DEPLOYMENTS[deployment]
    model, mesh = chosen.model(), chosen.mesh()
    found = list(faults(step_of(model, mesh, bucket).report, model, mesh, bucket))
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("deployment", ["355B FP8 on 8 H100", "355B BF16 on 8 H200"])
def test_another_layer_launches_little(deployment):
    chosen = DEPLOYMENTS[deployment]
    few, more = (step_of(chosen.model(n), chosen.mesh(), DECODE).report for n in (1, 2))
    assert len(more.launches) - len(few.launches) <= LAYER_LAUNCHES


def test_the_whole_model_fits():
    """All 92 layers and the draft layer, with room for a KV pool of a third of the memory."""
    mesh = mesh_of("h100", tensor=8)
    name = "zai-org/GLM-4.5-FP8"
    model = replace(release(name), kernels=Backend("mosaic"))
    report = step_of(model, mesh, DECODE).report
    assert report.argument_bytes - report.alias_bytes < 46 * GIB
    assert report.temp_bytes < 220 * MIB
    assert report.fp8_gemms == 4 * 92 + 1
    assert len(report.launches) < 3200
    assert list(crossings(report, model, mesh, DECODE)) == []
    assert list(moved_weights(report)) == []


def test_plain_jax_is_told_apart():
    """The same checks of a program without kernels: they must find its faults."""
    chosen = DEPLOYMENTS["Air FP8 on 2 H100"]
    model, mesh = official(chosen.release, REF), chosen.mesh()
    report = step_of(model, mesh, DECODE, SPILLS).report
    found = "\n".join(faults(report, model, mesh, DECODE))
    assert "launches" in found
    assert "made of weights" in found


SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": False}


def faults(report: Report, model: ModelConfig, mesh: Mesh, bucket: Bucket) -> Iterator[str]:
    """What a step does that it should not."""
    budget, limits = BUDGETS[bucket], limits_of(model, mesh)
    params = abstract_params(model, mesh, drafting=True)
    state = abstract_state(model, mesh, limits)
    if len(report.launches) > budget.launches:
        yield f"{len(report.launches)} launches, at most {budget.launches}"
    if len(report.sorts) > budget.sorts:
        yield f"sorts {report.sorts}, at most {budget.sorts}"
    logits = places(bucket) * model.vocab_size * 4
    if report.temp_bytes > budget.logits * logits:
        yield f"{report.temp_bytes / MIB:.0f} MiB between, at most {budget.logits} logits"
    if report.alias_bytes < local_bytes(state):
        yield f"{report.alias_bytes} bytes updated in place, of {local_bytes(state)}"
    expected = local_bytes(params) + local_bytes(state)
    if report.argument_bytes > 1.01 * expected + MIB:
        yield f"{report.argument_bytes} bytes of arguments, not {expected}"
    yield from moved_weights(report)
    yield from products(report, model, mesh, bucket)
    yield from crossings(report, model, mesh, bucket)


def moved_weights(report: Report) -> Iterator[str]:
    """Copies, slices and conversions of weights or the pool; embeddings are gathered."""
    for op in report.large_moves(MIB):
        if op.argument_bytes >= MIB and op.kind != "gather":
            yield f"{op.kind} {op.name} of {op.size_bytes} bytes: made of weights or of the pool"


def products(report: Report, model: ModelConfig, mesh: Mesh, bucket: Bucket) -> Iterator[str]:
    """Four FP8 products a layer: qkv, o, gate and up, down; of experts only the shared one's.

    Where cublasLt cannot multiply by the dense layers' down, the grouped Triton kernel does. It
    must not be what computes experts.
    """
    drafted = 4 * bucket.drafts or 1  # without drafts the draft layer only writes K and V
    expected = 4 * model.num_hidden_layers + drafted if model.quant else 0
    columns = model.intermediate_size // tensor_size(mesh)
    odd = model.first_k_dense_replace if model.quant and columns % GEMM_COLUMNS else 0
    if report.fp8_gemms != expected - odd:
        yield f"{report.fp8_gemms} FP8 products of cublasLt, not {expected - odd}"
    fallen = [launch for launch in report.launches if launch.name.startswith("grouped_triton")]
    if len(fallen) != odd:
        yield f"{len(fallen)} grouped products through Triton, not {odd}"


def crossings(report: Report, model: ModelConfig, mesh: Mesh, bucket: Bucket) -> Iterator[str]:
    """Two sums a layer and one an embedding; logits are joined. Nothing else crosses devices.

    But the outputs, where a host must see those of data groups that lie on another.
    """
    layers, drafts = model.num_hidden_layers, bucket.drafts
    elsewhere = limits_of(model, mesh).groups > 1 and crosses_hosts(mesh)
    expected = {
        "all-reduce": 1 + 2 * layers + (3 * drafts or 1),
        "all-gather": 1 + drafts + (bucket.chunk_tokens > 0) + elsewhere,
    }
    if report.counts() != expected:
        yield f"{dict(report.counts())} cross devices, not {expected}"
    for op in report.collectives:
        small = op.kind == "all-reduce" and op.size_bytes <= ONE_SHOT_BYTES
        if small and not op.detail.endswith("_SHOT"):
            yield f"{op.name} of {op.size_bytes} bytes is left to NCCL"


def places(bucket: Bucket) -> int:
    """Tokens that are sampled."""
    return bucket.rows * (bucket.drafts + 1) + bucket.chunk_rows


def local_bytes(tree: Any) -> int:
    """Bytes that one device has of a tree of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def test_the_buckets_are_those_that_are_served():
    chosen = DEPLOYMENTS["355B FP8 on 8 H100"]
    limits = limits_of(chosen.model(), chosen.mesh())
    assert set(BUDGETS) <= set(limits.buckets)
    assert limits.num_drafts == DRAFTS
