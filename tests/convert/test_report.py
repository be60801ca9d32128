"""All ways in which a checkpoint can be wrong: one report, before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hf_checkpoints import FP8, INDEX, TINY, draw, quantise, quantization_config, tree, write
from hypothesis import given
from hypothesis import strategies as st

from convert.check import is_listed, scale_shape
from convert.hf_reader import open_source
from convert.hf_to_orbax import convert
from convert.plan import make_plan
from convert.report import collapse
from glmjax.errors import CheckpointError, ConfigError

Q = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.2.mlp.experts.4.down_proj.weight"


def refusal(folder, stored=None, config=TINY, dtype=None, **extra) -> str:
    """The report about a checkpoint that cannot be converted; nothing is written."""
    source = write(folder / "hf", config, stored, **extra) if stored else folder / "hf"
    with pytest.raises(CheckpointError) as caught:
        convert(source, folder / "out", dtype)
    assert [path.name for path in folder.iterdir()] == ["hf"]
    return str(caught.value)


@pytest.fixture
def stored():
    return draw(TINY)


def test_everything_is_in_one_report(stored, tmp_path):
    del stored[EXPERT]
    stored["model.layers.0.self_attn.extra.weight"] = np.zeros(3, np.float32)
    stored["model.norm.weight"] = np.zeros(7, ml_dtypes.bfloat16)
    stored[Q] = stored[Q].astype(np.float32)
    stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.int8)
    message = refusal(tmp_path, stored)
    assert f"1 tensor missing:\n  {EXPERT}\n" in message
    assert "1 tensor unused (no place in this model):\n  model.layers.0.self_attn.extra" in message
    assert "model.norm.weight: [7], config.json asks for [24]" in message
    assert f"{Q}: float32, expected bfloat16; --dtype bfloat16 casts" in message
    assert "lm_head.weight: I8, expected bfloat16" in message


def test_dtype_lets_floats_pass_and_nothing_else(stored, tmp_path):
    stored[Q] = stored[Q].astype(np.float32)
    stored["lm_head.weight"] = stored["lm_head.weight"].astype(np.int8)
    message = refusal(tmp_path, stored, dtype="bfloat16")
    assert "lm_head.weight" in message
    assert Q not in message


def test_a_config_with_a_wrong_size(stored, tmp_path):
    config = replace(TINY, moe_intermediate_size=20)
    message = refusal(tmp_path, stored, config)
    assert (
        "model.layers.{1..3}.mlp.experts.{0..5}.down_proj.weight: [24, 16], config.json asks for "
        "[24, 20]" in message
    )
    assert "missing" not in message


def test_a_config_with_another_number_of_layers(stored, tmp_path):
    """The MTP block is then taken for a layer of the main model, and its own is missing."""
    message = refusal(tmp_path, stored, replace(TINY, num_hidden_layers=4))
    assert "model.layers.3.eh_proj.weight" in message


def test_a_partial_mtp_block(stored, tmp_path):
    del stored["model.layers.3.eh_proj.weight"]
    assert "1 tensor missing:\n  model.layers.3.eh_proj.weight" in refusal(tmp_path, stored)


def test_no_mtp_block_is_a_warning(stored, tmp_path, caplog):
    main = {n: a for n, a in stored.items() if not n.startswith("model.layers.3.")}
    write(tmp_path / "hf", TINY, main)
    (tmp_path / "hf" / "mtp.safetensors").write_bytes(b"unnamed")
    manifest = convert(tmp_path / "hf", tmp_path / "out")
    assert not manifest.has_mtp
    assert not any(path.startswith("mtp/") for path in manifest.arrays)
    assert "no tensor is named model.layers.3.*; mtp.safetensors lies there" in caplog.text


def test_a_tensor_that_the_index_does_not_list(stored, tmp_path):
    write(tmp_path / "hf", TINY, stored)
    index = tmp_path / "hf" / INDEX
    listed = json.loads(index.read_text())
    del listed["weight_map"][Q]
    index.write_text(json.dumps(listed))
    message = refusal(tmp_path)
    assert f"missing:\n  {Q}" in message
    assert f"{Q}: its file holds it, the index does not list it" in message


def test_a_tensor_that_only_the_index_lists(stored, tmp_path):
    write(tmp_path / "hf", TINY, stored)
    index = tmp_path / "hf" / INDEX
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.surprise"] = listed["weight_map"][Q]
    listed["weight_map"][Q] = listed["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(listed))
    assert Q in refusal(tmp_path)


# Files


def test_truncated_and_absent_files_are_named_together(stored, tmp_path):
    source = write(tmp_path / "hf", TINY, stored)
    shard = source / "model-0.safetensors"
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(size - 1)
    (source / "model-1.safetensors").unlink()
    (source / "model-2.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    message = refusal(tmp_path)
    assert f"{shard} is truncated: {size - 1} bytes, its header promises {size}" in message
    assert "model-1.safetensors: No such file or directory" in message
    assert "model-2.safetensors is not a whole safetensors file" in message
    assert "Git LFS" in message


@given(st.binary(max_size=64))
def test_no_garbage_passes_for_a_header(tmp_path_factory, garbage):
    folder = tmp_path_factory.mktemp("garbage")
    write(folder, TINY, {"model.norm.weight": np.zeros(3, np.float32)}, shards=0)
    (folder / "model.safetensors").write_bytes(garbage)
    with pytest.raises(CheckpointError):
        make_plan(open_source(folder))


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(stored, index, tmp_path):
    write(tmp_path / "hf", TINY, stored)
    (tmp_path / "hf" / INDEX).write_text(index)
    assert INDEX in refusal(tmp_path)


def test_what_is_no_hf_checkpoint(stored, tmp_path):
    with pytest.raises(CheckpointError, match="is not a folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither model"):
        convert(tmp_path / "empty", tmp_path / "out")
    source = write(tmp_path / "hf", TINY, stored)
    convert(source, tmp_path / "done")
    with pytest.raises(CheckpointError, match="is converted already"):
        convert(tmp_path / "done", tmp_path / "out")
    (source / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        convert(source, tmp_path / "out")


# FP8


@pytest.fixture
def fp8(stored):
    """Tensors of a compressed-tensors release, and its quantization_config."""
    return quantise(stored, None), quantization_config(None, stored)


def test_parts_of_one_leaf_must_agree(stored, fp8, tmp_path):
    quantised, settings = fp8
    quantised[Q] = stored[Q]
    settings["ignore"].append(Q.removesuffix(".weight"))
    del quantised[Q + "_scale"]
    message = refusal(tmp_path, quantised, quantization_config=settings)
    assert f"{Q}: not FP8, but what it is fused with is FP8" in message


def test_parts_may_differ_when_they_are_dequantised(stored, fp8, tmp_path):
    quantised, settings = fp8
    quantised[Q] = stored[Q]
    settings["ignore"].append(Q.removesuffix(".weight"))
    del quantised[Q + "_scale"]
    source = write(tmp_path / "hf", TINY, quantised, quantization_config=settings)
    assert convert(source, tmp_path / "out", "bfloat16").quantized == ()


def test_stored_and_listed_contradict_each_other(stored, fp8, tmp_path):
    quantised, settings = fp8
    down = "model.layers.1.mlp.shared_experts.down_proj"
    quantised[f"{down}.weight"] = stored[f"{down}.weight"]
    del quantised[f"{down}.weight_scale"]
    settings["ignore"].append("model.layers.2.self_attn.o_proj")
    message = refusal(tmp_path, quantised, quantization_config=settings)
    assert f"{down}.weight: bfloat16, but quantization_config does not list it" in message
    assert "layers.2.self_attn.o_proj.weight: FP8, but quantization_config ignores it" in message


def test_fp8_without_a_quantization_config(fp8, tmp_path):
    experts = "model.layers.{1..3}.mlp.experts.{0..5}.down_proj.weight"
    assert f"{experts}: FP8, but config.json has no" in refusal(tmp_path, fp8[0])


def test_missing_misshaped_and_odd_scales(fp8, tmp_path):
    quantised, settings = fp8
    del quantised[EXPERT + "_scale"]
    quantised[Q + "_scale"] = quantised[Q + "_scale"][0]
    k = Q.replace("q_proj", "k_proj") + "_scale"
    quantised[k] = quantised[k].astype(np.float16)
    message = refusal(tmp_path, quantised, quantization_config=settings)
    assert f"missing:\n  {EXPERT}_scale" in message
    assert f"{Q}_scale: [1], expected [128, 1]" in message
    assert f"{k}: float16, expected float32 or bfloat16" in message


def test_fp8_where_no_matmul_is(fp8, tmp_path):
    quantised, settings = fp8
    name = "model.layers.1.mlp.gate.weight"
    quantised[name] = quantised[name].astype(FP8)
    quantised[f"{name}_scale"] = np.ones((6, 1), np.float32)
    settings["ignore"] = ["lm_head", "model.layers.2.mlp.gate", "model.layers.3.mlp.gate"]
    message = refusal(tmp_path, quantised, quantization_config=settings)
    assert f"{name}: FP8, which is served for linear layers only" in message


def test_orphan_scales_are_noted(stored, tmp_path):
    orphan = np.ones((24, 1), np.float32)
    source = write(tmp_path / "hf", TINY, stored | {f"{EXPERT}_scale": orphan})
    plan = make_plan(open_source(source))
    assert plan.notes == (f"{EXPERT}_scale is left out: its weight is not FP8",)
    assert plan.manifest.arrays.keys() == tree(TINY, stored).keys()


@pytest.mark.parametrize(
    ("entry", "listed"),
    [
        ("lm_head", False),
        ("model.layers.1.mlp.gate", True),
        ("model.layers.1", True),
        ("mlp.gate", True),
        ("gate", True),
        ("ate", False),
        ("model.layers.1.mlp.gat", False),
        ("re:.*mlp.gate$", True),
        ("re:.*up_proj", False),
    ],
)
def test_ignore_lists_name_modules(entry, listed):
    assert is_listed([entry], "model.layers.1.mlp.gate.weight") is listed


def test_scale_shapes():
    assert scale_shape((10, 300), None) == (10, 1)
    assert scale_shape((10, 300), (128, 128)) == (1, 3)


# Lines


def test_names_are_joined_only_where_all_are_there():
    grid = [f"layers.{i}.experts.{e}.up" for i in range(3) for e in (0, 2)]
    assert list(collapse(grid)) == ["layers.{0..2}.experts.{0,2}.up"]
    assert list(collapse(grid[1:])) == grid[1:]
    assert list(collapse(["norm", "layers.7.up"])) == ["norm", "layers.7.up"]


@given(st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_collapsed_lines_stand_for_the_same_names(pairs):
    names = [f"a.{i}.b.{j}.c" for i, j in pairs]
    lines = list(collapse(names))
    assert sorted(name for line in lines for name in expand(line)) == sorted(names)


def expand(line: str) -> list[str]:
    before, brace, rest = line.partition("{")
    if not brace:
        return [line]
    inside, _, after = rest.partition("}")
    first, dots, last = inside.partition("..")
    numbers = range(int(first), int(last) + 1) if dots else inside.split(",")
    return [name for number in numbers for name in expand(f"{before}{number}{after}")]
