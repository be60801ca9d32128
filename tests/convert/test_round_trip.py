"""Checkpoints that are converted, verified and restored are the tensors they were made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import ml_dtypes
import numpy as np
import pytest
from hf_checkpoints import (
    BIAS,
    TINY,
    dequantised,
    draw,
    fp8_tree,
    is_linear,
    quantise,
    quantization_config,
    tree,
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from restored import assert_same, restored

from convert.hf_to_orbax import convert, verify
from glmjax.config import MeshConfig
from glmjax.runner.weights import load
from glmjax.sharding import make_mesh

BF16 = ml_dtypes.bfloat16


CASES = {
    "all": TINY,
    "no qk-norm": replace(TINY, use_qk_norm=False),
    "no bias": replace(TINY, attention_bias=False),
    "tied": replace(TINY, tie_word_embeddings=True),
    "float32": replace(TINY, dtype="float32"),
    "no MTP": replace(TINY, num_nextn_predict_layers=0),
    "all dense": replace(TINY, first_k_dense_replace=3, num_nextn_predict_layers=0),
    "all MoE": replace(TINY, first_k_dense_replace=0, n_shared_experts=1),
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_round_trip(config, tmp_path):
    stored = draw(config)
    source = write(tmp_path / "hf", config, stored)
    convert(source, tmp_path / "out")
    mtp = config.num_nextn_predict_layers > 0
    assert_same(restored(tmp_path / "out", mtp), tree(config, stored))
    assert verify(source, tmp_path / "out").tensors == len(stored)


def test_one_file_without_an_index(tmp_path):
    stored = draw(TINY)
    convert(write(tmp_path / "hf", TINY, stored, shards=0), tmp_path / "out")
    assert_same(restored(tmp_path / "out"), tree(TINY, stored))


def test_what_is_known_to_be_a_copy_is_left_out(tmp_path):
    config = replace(TINY, tie_word_embeddings=True)
    stored = draw(config)
    embed = stored["model.embed_tokens.weight"]
    copies = {
        "lm_head.weight": embed,
        "model.layers.3.embed_tokens.weight": embed,
        "model.layers.3.shared_head.head.weight": embed,
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    convert(write(tmp_path / "hf", config, stored | copies), tmp_path / "out")
    assert_same(restored(tmp_path / "out"), tree(config, stored))


sizes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(1, 40),
        "hidden_size": st.integers(1, 20),
        "intermediate_size": st.integers(1, 20),
        "moe_intermediate_size": st.integers(1, 20),
        "num_hidden_layers": st.integers(1, 3),
        "n_routed_experts": st.integers(2, 5),
        "n_shared_experts": st.integers(1, 2),
        "first_k_dense_replace": st.integers(0, 1),
        "use_qk_norm": st.booleans(),
        "attention_bias": st.booleans(),
        "tie_word_embeddings": st.booleans(),
        "num_nextn_predict_layers": st.integers(0, 1),
        "dtype": st.sampled_from(["bfloat16", "float32"]),
    }
)
heads = st.builds(
    lambda kv, group, half: {
        "num_key_value_heads": kv,
        "num_attention_heads": kv * group,
        "head_dim": 4 * half,
    },
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
)


@given(sizes, heads, st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=12)
def test_any_shape_round_trips(sizes, heads, shards, seed):
    config = replace(TINY, **sizes, **heads)
    stored = draw(config, seed)
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "hf", Path(folder) / "out"
        convert(write(source, config, stored, shards), target)
        mtp = config.num_nextn_predict_layers > 0
        assert_same(restored(target, mtp), tree(config, stored))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored_dtype", ["bfloat16", "float32"])
def test_dtype_casts_all_but_the_correction_bias(dtype, stored_dtype, tmp_path):
    config = replace(TINY, dtype=stored_dtype)
    stored = draw(config)
    source = write(tmp_path / "hf", config, stored)
    convert(source, tmp_path / "out", dtype)
    cast = {n: a if n.endswith(BIAS) else a.astype(dtype) for n, a in stored.items()}
    assert cast[f"model.layers.1.mlp.gate.{BIAS}"].dtype == np.float32
    assert_same(restored(tmp_path / "out"), tree(config, cast))
    verify(source, tmp_path / "out")


def test_a_narrower_tensor_widens_exactly(tmp_path):
    stored = draw(TINY)
    name = f"model.layers.1.mlp.gate.{BIAS}"
    stored[name] = stored[name].astype(BF16)
    convert(write(tmp_path / "hf", TINY, stored), tmp_path / "out")
    found = restored(tmp_path / "out")[f"vectors/{BIAS}"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], stored[name].astype(np.float32))


FORMS = {
    "one scale a row": (None, np.float32),
    "bf16 scales": (None, BF16),
    "blocks": ((16, 8), np.float32),
    "uneven blocks": ((5, 7), np.float32),
    "bf16 scales of blocks": ((16, 8), BF16),
    "powers of two": ((16, 8), ml_dtypes.float8_e8m0fnu),
}


@pytest.fixture(params=FORMS.values(), ids=FORMS)
def fp8(request, tmp_path):
    """Source folder, its tensors, and the block, of an FP8 checkpoint."""
    block, scale_dtype = request.param
    plain = draw(TINY)
    stored = quantise(plain, block, scale_dtype)
    settings = quantization_config(block, plain)
    return write(tmp_path / "hf", TINY, stored, quantization_config=settings), stored, block


def test_fp8_stays_fp8(fp8, tmp_path):
    source, stored, block = fp8
    manifest = convert(source, tmp_path / "out")
    assert manifest.block == (block[1] if block else None)
    assert "layers/1/mlp/experts_down_proj" in manifest.quantized
    assert not {"lm_head", "layers/1/mlp/gate", "mtp/eh_proj"} & set(manifest.quantized)
    assert_same(restored(tmp_path / "out"), fp8_tree(TINY, stored, block))
    assert verify(source, tmp_path / "out").tensors == sum(
        not name.endswith(("_scale", "_scale_inv")) for name in stored
    )


def test_fp8_is_dequantised_on_request(fp8, tmp_path):
    source, stored, block = fp8
    manifest = convert(source, tmp_path / "out", "bfloat16")
    assert manifest.quantized == ()
    plain = {
        name: array if name.endswith(BIAS) else array.astype(BF16)
        for name, array in dequantised(stored, block).items()
    }
    assert_same(restored(tmp_path / "out"), tree(TINY, plain))
    config, _ = load(tmp_path / "out", make_mesh(MeshConfig()))
    assert config.quant is None
    verify(source, tmp_path / "out")


def test_each_leaf_is_quantised_as_it_is_stored(tmp_path):
    """Attention in BF16 beside FP8 experts, as its config says."""
    plain = draw(TINY)
    stored = quantise(plain, None)
    attention = [n for n in plain if is_linear(n) and "self_attn" in n]
    for name in attention:
        del stored[name + "_scale"]
    stored |= {name: plain[name] for name in attention}
    settings = quantization_config(None, plain)
    settings["ignore"].append("re:.*self_attn.*")
    source = write(tmp_path / "hf", TINY, stored, quantization_config=settings)
    manifest = convert(source, tmp_path / "out")
    assert not any("self_attn" in path for path in manifest.quantized)
    assert_same(restored(tmp_path / "out"), fp8_tree(TINY, stored, None))
