"""What a model to plan for can be called."""

from __future__ import annotations

import json

import pytest
from hf_checkpoints import draw, quantise, quantization_config, write

from cases import CASES
from convert.hf_to_orbax import convert
from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.planner.fitting import options
from glmjax.planner.source import find
from glmjax.releases import KNOWN_MODELS

MODEL = CASES["qk_norm"]


@pytest.mark.parametrize("name", ["zai-org/GLM-4.5-Air-FP8", "GLM-4.5-Air-FP8"])
def test_a_release(name):
    found = find(name)
    assert found.config == KNOWN_MODELS["zai-org/GLM-4.5-Air-FP8"]
    assert found.quantized is None


def test_a_release_in_another_dtype():
    assert find("GLM-4.5-Air", "float32").config.dtype == "float32"


def test_a_folder_of_hf_and_a_converted_one(tmp_path):
    tensors = draw(MODEL)
    settings = quantization_config(None, tensors)
    hf = write(tmp_path / "hf", MODEL, quantise(tensors, None), quantization_config=settings)
    convert(hf, tmp_path / "out")
    released, converted = find(hf), find(tmp_path / "out")
    assert released.quantized is None
    assert converted.quantized is not None
    assert "layers/1/mlp/experts_down_proj" in converted.quantized
    assert released.config.num_hidden_layers == converted.config.num_hidden_layers
    assert find(tmp_path / "out", "bfloat16").config.dtype == "bfloat16"


def test_a_config_alone_is_enough(tmp_path):
    raw = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 7}), "utf-8")
    assert find(tmp_path).config.num_hidden_layers == 7


def test_anything_else_is_told_with_the_releases():
    with pytest.raises(ConfigError, match="no folder, and unknown model 'GLM-9'; known: zai-org/"):
        find("GLM-9")


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        (MeshConfig(1, 8), "--mesh 8"),
        (MeshConfig(2, 4), "--mesh 2x4"),
        (MeshConfig(1, 16, hosts=2), "--mesh 16 --hosts 2"),
        (MeshConfig(1, 8, True), "--mesh 8 --expert-parallel"),
    ],
)
def test_a_mesh_is_told_as_it_is_typed(mesh, words):
    assert options(mesh) == words


@pytest.mark.parametrize(
    ("text", "hosts"), [("1", 1), ("8", 1), ("16", 2), ("3x8", 3), ("9", 3), ("11", 11), ("5x2", 2)]
)
def test_as_few_hosts_as_share_them_evenly(text, hosts):
    assert MeshConfig.parse(text).on_hosts().hosts == hosts
