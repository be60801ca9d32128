"""Conversions of the official releases, planned from headers alone."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest

from convert.chunking import MAX_CHUNK_BYTES
from convert.hf_reader import Source, Tensor
from convert.plan import Plan, make_plan
from glmjax.bench.synthetic import mtp_tensors, tensors
from glmjax.releases import KNOWN_MODELS

# Parameters of the main model and of the MTP block, in billions.
BILLIONS = {
    "zai-org/GLM-4.5-Air": (106.9, 2.4),
    "zai-org/GLM-4.5": (352.8, 4.0),
}


def headers(name: str) -> Source:
    """The tensors that a release holds, without their bytes."""
    config = KNOWN_MODELS[name]
    held: dict[str, Tensor] = {}

    def add(tensor: str, shape: tuple[int, ...], dtype: str) -> None:
        held[tensor] = Tensor(tensor, Path("none"), 0, 0, shape, dtype)

    for tensor, noise in (tensors(config) | mtp_tensors(config)).items():
        linear = tensor.endswith("_proj.weight") and not tensor.endswith("eh_proj.weight")
        if config.quant and linear:
            add(tensor, noise.shape, "float8_e4m3fn")
            add(tensor + "_scale", (noise.shape[0], 1), "bfloat16")
        else:
            add(tensor, noise.shape, "float32" if noise.keep_float32 else "bfloat16")
    return Source(Path(name), config, held, (), ())


@functools.cache
def plan_of(name: str) -> Plan:
    return make_plan(headers(name))


@pytest.fixture(scope="module", params=[f"{n}{s}" for n in BILLIONS for s in ("", "-FP8")])
def release(request):
    return request.param, plan_of(request.param)


def test_every_parameter_has_a_place(release):
    name, plan = release
    counts = {"main": 0, "mtp": 0}
    for path, array in plan.manifest.arrays.items():
        if not path.endswith("/scale"):
            counts["mtp" if path.startswith("mtp/") else "main"] += math.prod(array.shape)
    main, mtp = BILLIONS[name.removesuffix("-FP8")]
    assert round(counts["main"] / 1e9, 1) == main
    assert round(counts["mtp"] / 1e9, 1) == mtp


def test_layers_are_of_a_size(release):
    """So that the memory of two of them bounds every group."""
    _, plan = release
    sizes = {
        g: sum(a.stored.size_bytes for a in arrays.values()) for g, arrays in plan.groups.items()
    }
    layer_bytes = sizes["layer_00010"]
    assert max(sizes.values()) < 1.1 * layer_bytes
    assert all(a.chunk_bytes <= MAX_CHUNK_BYTES for a in plan.manifest.arrays.values())


def test_fp8_releases_stay_fp8(release):
    name, plan = release
    manifest = plan.manifest
    assert bool(manifest.quantized) is name.endswith("FP8")
    if manifest.quantized:
        assert "layers/0/mlp/gate_up_proj" in manifest.quantized  # the dense layers too
        assert "mtp/layer/mlp/shared_down_proj" in manifest.quantized
        assert "mtp/eh_proj" not in manifest.quantized


def test_quantising_a_release_gives_its_fp8_release():
    name = "zai-org/GLM-4.5-Air"
    ours = make_plan(headers(name), quantize="fp8").manifest
    assert ours == plan_of(f"{name}-FP8").manifest
