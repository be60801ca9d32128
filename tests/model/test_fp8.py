"""FP8 checkpoints run as FP8, near to what their weights mean."""

from __future__ import annotations

from dataclasses import replace

import hf_checkpoints as hf
import jax.numpy as jnp
import numpy as np
import pytest

from cases import CASES, prompt_ids
from convert.hf_to_orbax import convert
from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.model.quant import QuantArray
from glmjax.runner.weights import load
from glmjax.sharding import make_mesh
from harness import Forward

CONFIG = replace(CASES["qk_norm"], num_hidden_layers=2)


@pytest.mark.parametrize(
    ("block", "scales", "tensor"),
    [
        (None, "float32", 1),
        (None, "bfloat16", 4),
        ((8, 8), "float32", 4),
        ((8, 8), "float8_e8m0fnu", 2),
    ],
)
def test_fp8_weights_run_near_their_dequantised_form(block, scales, tensor, tmp_path):
    stored = hf.quantise(hf.draw(CONFIG), block, scales)
    hf.write(
        tmp_path / "hf", CONFIG, stored, quantization_config=hf.quantization_config(block, stored)
    )
    convert(tmp_path / "hf", tmp_path / "fp8")
    convert(tmp_path / "hf", tmp_path / "f32", dtype="float32")
    mesh, ids = make_mesh(MeshConfig(tensor=tensor)), prompt_ids(CONFIG)

    config, params = load(tmp_path / "fp8", mesh)
    weight = params["layers"][1]["mlp"]["experts_down_proj"]
    assert isinstance(weight, QuantArray)
    assert weight.values.dtype == jnp.float8_e4m3fn
    logits, _ = Forward(config, mesh, params).main(ids)

    config, params = load(tmp_path / "f32", mesh)
    exact, _ = Forward(config, mesh, params).main(ids)
    error = np.linalg.norm(logits - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.2, "activations are rounded to FP8, and to nothing worse"


def test_a_checkpoint_that_is_quantised_here_runs_near_the_original(tmp_path):
    """Weights and activations are rounded to FP8; nothing is lost, doubled or out of place."""
    source = hf.write(tmp_path / "hf", CONFIG, hf.draw(CONFIG))
    mesh, ids, logits = make_mesh(MeshConfig()), prompt_ids(CONFIG), []
    for quantize in (None, "fp8"):
        convert(source, tmp_path / f"{quantize}", quantize=quantize)
        config, params = load(tmp_path / f"{quantize}", mesh)
        logits.append(Forward(config, mesh, params).main(ids)[0])
    exact, found = logits
    assert 0 < np.linalg.norm(found - exact) < 0.2 * np.linalg.norm(exact)


def test_a_mesh_that_cuts_within_a_block_is_refused(tmp_path):
    """Two blocks divide over two devices, but 12 of 24 columns are no whole block of 16."""
    config = replace(CONFIG, moe_intermediate_size=24)
    stored = hf.quantise(hf.draw(config), (16, 16))
    blocks = hf.quantization_config((16, 16), stored)
    hf.write(tmp_path / "hf", config, stored, quantization_config=blocks)
    convert(tmp_path / "hf", tmp_path / "fp8")
    with pytest.raises(ConfigError, match="cuts its 24 columns within FP8 blocks of 16"):
        load(tmp_path / "fp8", make_mesh(MeshConfig(tensor=2)))
    load(tmp_path / "fp8", make_mesh(MeshConfig(tensor=1)))


def test_experts_of_two_forms_are_refused(tmp_path):
    """Both products of an expert's MLP take rows of one form."""
    convert(hf.write(tmp_path / "hf", CONFIG, hf.draw(CONFIG)), tmp_path / "out", quantize="fp8")
    mesh = make_mesh(MeshConfig())
    config, params = load(tmp_path / "out", mesh)
    mlp = params["layers"][1]["mlp"]
    mlp["experts_down_proj"] = mlp["experts_down_proj"].values.astype(config.dtype)
    with pytest.raises(ConfigError, match="expected the same"):
        Forward(config, mesh, params).main(prompt_ids(CONFIG))
