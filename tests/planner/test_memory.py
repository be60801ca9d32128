"""What the planner says that memory holds is what a runner really puts there."""

from __future__ import annotations

from dataclasses import replace

import jax
import pytest
from hf_checkpoints import draw, quantise, quantization_config, write

from cases import CASES
from convert.hf_to_orbax import convert
from glmjax.checkpoint import open_converted
from glmjax.config import CacheConfig, MeshConfig, QuantConfig, SchedulerConfig
from glmjax.errors import ConfigError
from glmjax.planner.deployment import Deployment
from glmjax.planner.fitting import fit, smallest_mesh
from glmjax.planner.memory import GIB, RESERVE_BYTES, DoesNotFitError, fill, small_pool
from glmjax.plans import Bucket
from glmjax.releases import release
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import load, load_mtp
from glmjax.sharding import make_mesh
from pallas_kernels.backend import Backend

MODEL = replace(CASES["qk_norm"], num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2)
SCHEDULER = SchedulerConfig(4, chunked_prefill_size=16, max_seq_len=64, speculative_num_steps=2)
H100_BYTES, H200_BYTES = 84942979072, 150754820096


@pytest.fixture(scope="module", params=[None, (8, 8)], ids=["float32", "blocks of FP8"])
def folder(request, tmp_path_factory):
    """A converted model of 2 KV heads, with an MTP block."""
    root, tensors = tmp_path_factory.mktemp("planned"), draw(MODEL)
    more = {}
    if request.param:
        more = {"quantization_config": quantization_config(request.param, tensors)}
        tensors = quantise(tensors, request.param)
    convert(write(root / "hf", MODEL, tensors, **more), root / "out")
    return root / "out"


def deployment_of(folder, mesh: MeshConfig, cache: CacheConfig) -> Deployment:
    converted = open_converted(folder)
    model = replace(converted.config, expert_parallel=mesh.expert_parallel)
    return Deployment(model, mesh, cache, SCHEDULER, frozenset(converted.manifest.quantized))


def held_bytes(arrays, device) -> int:
    """Bytes of the parts of `arrays` that lie on one device."""
    shards = (s for leaf in jax.tree.leaves(arrays) for s in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), MeshConfig(1, 2), MeshConfig(2, 4), MeshConfig(1, 4, True)], ids=str
)
def test_the_plan_is_what_a_runner_holds_to_the_byte(folder, mesh):
    deployment = deployment_of(folder, mesh, CacheConfig(4, num_pages=40))
    limits, memory = fill(deployment, 0, GIB)
    limits = replace(limits, buckets=(Bucket(1, 0, 0, 0),))
    devices, model = make_mesh(mesh), deployment.model
    experts = {"expert_parallel": mesh.expert_parallel}
    params = load(folder, devices, **experts)[1]
    mtp = load_mtp(folder, devices, **experts)
    runner = DeviceRunner(model, params, devices, limits, mtp, deployment.kv_dtype)
    for device in devices.devices.flat:
        assert held_bytes((params, mtp), device) == memory.weights_bytes
        assert held_bytes(runner._state.kv, device) == memory.pool_bytes
        assert held_bytes(replace(runner._state, kv=()), device) == memory.tables_bytes


def official(name: str, tensor: int, **cache) -> Deployment:
    model = replace(release(f"zai-org/{name}"), kernels=Backend("mosaic"))
    scheduler = SchedulerConfig(64, chunked_prefill_size=2048)
    return Deployment(model, MeshConfig(1, tensor), CacheConfig(64, **cache), scheduler)


# The fewest GPUs that the makers of the models name: H100, H200.
SMALLEST = {"GLM-4.5": (16, 8), "GLM-4.5-FP8": (8, 4), "GLM-4.5-Air": (4, 2)}
SMALLEST |= {"GLM-4.5-Air-FP8": (2, 1)}


@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_mesh_is_the_makers(name):
    for gpu_bytes, tensor in zip((H100_BYTES, H200_BYTES), SMALLEST[name], strict=True):
        found = smallest_mesh(official(name, 1), 2 * GIB, int(0.92 * gpu_bytes))
        assert found == MeshConfig(1, tensor, hosts=2 if tensor == 16 else 1)


def test_the_pool_takes_what_is_left():
    _, memory = fill(official("GLM-4.5-FP8", 8), 2 * GIB, 73 * GIB)
    assert 0 <= memory.left_bytes < 4 * 2**20, "less than a page"
    assert memory.pool_bytes > 25 * GIB


def test_the_pool_takes_no_more_than_all_slots_can_use():
    deployment = official("GLM-4.5-Air-FP8", 8)
    deployment = replace(deployment, scheduler=replace(deployment.scheduler, max_seq_len=640))
    limits, memory = fill(deployment, 2 * GIB, 73 * GIB)
    assert limits.pages == 64 * 10 + 1
    assert memory.left_bytes > 50 * GIB


def test_a_pool_that_kernels_cannot_address_is_made_smaller():
    deployment = official("GLM-4.5-FP8", 8, dtype="fp8_e4m3")
    _, memory = fill(deployment, 2 * GIB, 50 * GIB)
    assert memory.pool_bytes <= 4 * GIB < memory.left_bytes + memory.pool_bytes
    _, memory = fill(deployment, 2 * GIB, 60 * GIB)
    assert memory.pool_bytes > 8 * GIB


def test_what_does_not_fit_is_told_with_what_would():
    with pytest.raises(DoesNotFitError) as caught:
        fit(official("GLM-4.5", 8), 2 * GIB, 73 * GIB)
    words = str(caught.value)
    assert "GiB are missing" in words
    assert "--mesh 16 --hosts 2" in words
    assert "FP8 weights take half" in words
    with pytest.raises(DoesNotFitError, match="it fits --mesh 8;"):
        fit(official("GLM-4.5-FP8", 4), 2 * GIB, 73 * GIB)


def test_a_pool_that_is_asked_for_must_fit_beside_the_weights():
    with pytest.raises(DoesNotFitError, match=r"GiB are missing: weights 42\.\d+, KV"):
        fit(official("GLM-4.5-FP8", 8, memory_bytes=60 * GIB), 2 * GIB, 73 * GIB)


def test_sizes_that_fit_no_memory_are_not_called_a_lack_of_it():
    deployment = official("GLM-4.5-FP8", 8)
    scheduler = replace(deployment.scheduler, max_seq_len=10**6)
    with pytest.raises(ConfigError, match="context is 131072") as caught:
        fit(replace(deployment, scheduler=scheduler), 0, 73 * GIB)
    assert not isinstance(caught.value, DoesNotFitError)


@pytest.mark.parametrize(
    ("gib", "kernels", "served"),
    [
        (4, "triton", True),
        (5, "triton", False),
        (5, "ref", True),
        (8, "mosaic", False),
        (9, "mosaic", True),
    ],
)
def test_an_fp8_pool_that_kernels_cannot_address_is_refused(gib, kernels, served):
    deployment = official("GLM-4.5-FP8", 8, dtype="fp8_e4m3", memory_bytes=gib * GIB)
    model = replace(deployment.model, kernels=Backend(kernels))
    deployment = replace(deployment, model=model)
    if served:
        assert fill(deployment, 0, 73 * GIB)[1].pool_bytes > (gib - 1) * GIB
    else:
        with pytest.raises(ConfigError, match=rf"cannot address an FP8 KV pool of {gib}\.00 GiB"):
            fill(deployment, 0, 73 * GIB)


def test_a_pool_that_is_made_smaller_says_why_it_holds_too_little():
    deployment = official("GLM-4.6-FP8", 8, dtype="fp8_e4m3")
    scheduler = replace(deployment.scheduler, max_seq_len=202752)
    with pytest.raises(ConfigError, match="up to 4 GiB a device or above 8"):
        fill(replace(deployment, scheduler=scheduler), 2 * GIB, 50 * GIB)


def test_fp8_blocks_are_not_cut():
    """Air's experts are 11 blocks of 128 wide: two devices would share one, and two KV heads."""
    model = replace(release("GLM-4.5-Air"), quant=QuantConfig("fp8", (128, 128)))
    deployment = replace(official("GLM-4.5-Air", 2), model=model)
    with pytest.raises(ConfigError, match="within FP8 blocks of 128"):
        fill(deployment, 0, 73 * GIB)
    assert smallest_mesh(deployment, 0, 140 * GIB) == MeshConfig()


def test_who_asks_for_too_large_a_pool_is_told_so():
    with pytest.raises(DoesNotFitError, match="a smaller KV pool") as caught:
        fit(official("GLM-4.5-FP8", 8, memory_bytes=40 * GIB), 2 * GIB, 73 * GIB)
    assert "--max-running-requests" not in str(caught.value)


def test_on_a_cpu_nothing_is_kept_free():
    deployment = official("GLM-4.5-Air-FP8", 8, memory_bytes=GIB)
    _, memory = fill(deployment, 0, 15 * GIB, reserve_bytes=0)
    assert memory.left_bytes < RESERVE_BYTES + GIB
    with pytest.raises(DoesNotFitError):
        fill(deployment, 0, memory.usable_bytes - memory.left_bytes)


def test_steps_are_compiled_with_hardly_a_pool():
    """One of FP8 for a whole sequence may be what kernels cannot address."""
    limits = small_pool(official("GLM-4.6-FP8", 8, dtype="fp8_e4m3"))
    assert limits.pages == 2
    assert limits.max_seq_len == 202752
