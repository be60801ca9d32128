"""Abstract parameters are those that a converted official release would have."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from described import DRAFTS, limits_of, mesh_of, official
from glmjax.aot.abstract import abstract_params, abstract_state
from glmjax.config import QuantConfig
from glmjax.model.quant import QuantArray
from glmjax.model.spec import path_name
from pallas_kernels.backend import REF

pytestmark = pytest.mark.aot

FP8 = jnp.float8_e4m3fn
DENSE = {"self_attn/qkv_proj", "self_attn/o_proj", "mlp/gate_up_proj", "mlp/down_proj"}
MOE = {
    "self_attn/qkv_proj",
    "self_attn/o_proj",
    "mlp/experts_gate_up_proj",
    "mlp/experts_down_proj",
    "mlp/shared_gate_up_proj",
    "mlp/shared_down_proj",
}


def leaves_of(tree) -> dict:
    """Leaf by path, a QuantArray being one."""
    found = jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QuantArray))
    return {path_name(path): leaf for path, leaf in found}


def quantized(tree) -> set[str]:
    return {path for path, leaf in leaves_of(tree).items() if isinstance(leaf, QuantArray)}


@pytest.mark.parametrize("name", ["GLM-4.5-Air-FP8", "GLM-4.5-FP8"])
def test_an_fp8_release_has_its_linear_layers_in_fp8(name):
    mesh = mesh_of("h100", tensor=8)
    params = abstract_params(official(name, REF, moe_layers=1), mesh, drafting=True)
    expected = {f"layers/0/{leaf}" for leaf in DENSE} | {f"layers/1/{leaf}" for leaf in MOE}
    assert quantized(params["model"]) == expected
    assert quantized(params["mtp"]) == {f"layer/{leaf}" for leaf in MOE}


def test_a_scale_belongs_to_each_output_channel():
    params = abstract_params(official("GLM-4.5-FP8", REF), mesh_of("h100", tensor=8), False)
    assert params.keys() == {"model"}
    weight = leaves_of(params)["model/layers/1/mlp/experts_gate_up_proj"]
    assert weight.values.shape == (160, 2, 1536, 5120)
    assert (weight.values.dtype, weight.scale.dtype) == (FP8, jnp.float32)
    assert weight.scale.shape == (160, 2, 1536, 1)
    assert weight.values.sharding.shard_shape(weight.values.shape) == (160, 2, 192, 5120)


def test_what_a_release_ignores_stays_as_it_is():
    config = official("GLM-4.5-Air-FP8", REF, moe_layers=1)
    quant = QuantConfig("fp8", (128, 128), ("model.layers.1.self_attn.o_proj",))
    params = abstract_params(replace(config, quant=quant), mesh_of("h100"), drafting=False)
    leaves = leaves_of(params["model"])
    assert leaves["layers/1/self_attn/o_proj"].dtype == jnp.bfloat16
    down = leaves["layers/1/mlp/experts_down_proj"]
    assert (down.block, down.scale.shape[-1]) == (128, 1408 // 128)


def test_a_bf16_release_has_none():
    params = abstract_params(official("GLM-4.5-Air", REF), mesh_of("h100"), drafting=True)
    assert quantized(params) == set()


def test_kv_heads_are_repeated_over_more_devices_than_there_are():
    mesh = mesh_of("h100", tensor=16, hosts=2)
    model = replace(official("GLM-4.5", REF), num_attention_heads=32, num_key_value_heads=8)
    leaves = leaves_of(abstract_params(model, mesh, drafting=False)["model"])
    assert leaves["layers/0/self_attn/qkv_proj"].shape == (16, 2 + 2, 128, 5120)
    kv = abstract_state(model, mesh, limits_of(model, mesh)).kv.k
    assert kv.shape[-2:] == (16, 128)
    assert kv.sharding.shard_shape(kv.shape)[-2:] == (1, 128)


def test_the_pool_has_the_draft_layer_and_the_dtype_asked_for():
    mesh, model = mesh_of("h100", tensor=8), official("GLM-4.5", REF, moe_layers=2)
    limits = limits_of(model, mesh)
    assert limits.num_drafts == DRAFTS
    state = abstract_state(model, mesh, limits, "float8_e4m3fn")
    assert (state.kv.k.shape[0], state.kv.k.dtype) == (4, FP8)
    assert abstract_state(model, mesh, limits).kv.v.dtype == jnp.bfloat16
