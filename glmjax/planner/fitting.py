"""Whether a deployment fits its devices, and what to change where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from jax.sharding import Mesh

from glmjax.aot.abstract import abstract_params, abstract_state
from glmjax.config import KV_DTYPES, MeshConfig, tensor_sizes
from glmjax.errors import ConfigError
from glmjax.planner.deployment import Deployment
from glmjax.planner.memory import RESERVE_BYTES, DoesNotFitError, Memory, fill, small_pool
from glmjax.plans import Limits
from glmjax.runner.compiled import lower_step, options_for

MOST_DEVICES = 64


def fit(
    deployment: Deployment,
    temp_bytes: int,
    usable_bytes: int,
    reserve_bytes: int = RESERVE_BYTES,
) -> tuple[Limits, Memory]:
    """`memory.fill`, and advice where a device has too little memory.

    Raises:
        DoesNotFitError: says how much is missing, and what would fit.
        ConfigError: as `memory.fill`.
    """
    try:
        return fill(deployment, temp_bytes, usable_bytes, reserve_bytes)
    except DoesNotFitError as error:
        words = advice(deployment, temp_bytes, usable_bytes)
        message = f"the model does not fit mesh {deployment.mesh}: {error}; {words}"
        raise DoesNotFitError(message, error.memory) from None


def smallest_mesh(deployment: Deployment, temp_bytes: int, usable_bytes: int) -> MeshConfig | None:
    """The fewest devices that hold one data group of the model; None: not MOST_DEVICES of them.

    `temp_bytes` is that of the deployment's own mesh: logits, which every device has whole, are
    most of it.
    """
    for mesh in _candidates(deployment):
        try:
            fill(replace(deployment, mesh=mesh), temp_bytes, usable_bytes)
        except ConfigError:  # too little memory, or FP8 blocks that are cut
            continue
        return mesh
    return None


def advice(deployment: Deployment, temp_bytes: int, usable_bytes: int) -> str:
    """What to do about a deployment that does not fit."""
    cache, ways = deployment.cache, []
    asked = cache.num_pages is not None or cache.memory_bytes is not None
    if asked:
        ways.append("a smaller KV pool (--kv-cache-gib) takes less")
    smallest = smallest_mesh(deployment, temp_bytes, usable_bytes)
    if smallest is not None and smallest.tensor > deployment.mesh.tensor:
        ways.append(f"it fits {options(smallest)}")
    if deployment.model.quant is None:
        ways.append("FP8 weights take half (an FP8 release, or convert with --quantize fp8)")
    if deployment.kv_dtype != KV_DTYPES["fp8_e4m3"]:
        ways.append("--kv-cache-dtype fp8_e4m3 makes KV smaller")
    if not asked:
        ways.append("fewer --max-running-requests and a shorter --max-seq-len take less")
    return "; ".join(ways)


def options(mesh: MeshConfig) -> str:
    """`mesh` as serve.py is told it."""
    size = str(mesh.tensor) if mesh.data == 1 else str(mesh)
    hosts = f" --hosts {mesh.hosts}" if mesh.hosts > 1 else ""
    return f"--mesh {size}{hosts}" + " --expert-parallel" * mesh.expert_parallel


def largest_temp_bytes(deployment: Deployment, devices: Mesh) -> int:
    """Memory between the operations of the largest step, as it will be compiled to serve."""
    limits = small_pool(deployment)
    model = deployment.model.replicated(deployment.mesh.tensor)
    params = abstract_params(model, devices, deployment.drafting, deployment.quantized)
    state = abstract_state(model, devices, limits, deployment.kv_dtype)
    lowered = lower_step(model, limits, limits.buckets[-1], devices, params, state)
    memory = lowered.compile(compiler_options=options_for(devices)).memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def _candidates(deployment: Deployment) -> Iterator[MeshConfig]:
    """One data group on 1, 2, 4, ... devices."""
    mesh = deployment.mesh
    for tensor in tensor_sizes(deployment.model, mesh.expert_parallel):
        if tensor <= MOST_DEVICES and tensor & (tensor - 1) == 0:
            yield replace(mesh, data=1, tensor=tensor, hosts=1).on_hosts()
