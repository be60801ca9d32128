"""What the trainer exports is what it was given, under the names that HF's format has for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.hf_to_orbax import convert, verify
from glmjax.bench.synthetic import default_config, make_tokenizer, write_checkpoint
from glmjax.config import MeshConfig, ModelConfig
from glmjax.errors import CheckpointError, ConfigError
from glmjax.releases import release
from glmjax.runner.weights import load, load_mtp
from glmjax.sharding import make_mesh
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.export import export_hf, hf_tensors

FULL = replace(
    default_config(),
    hidden_size=32,
    intermediate_size=48,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=256,
)
CONFIGS = {
    "full": FULL,
    "plain": replace(FULL, use_qk_norm=False, attention_bias=False, n_shared_experts=2),
    "all MoE": replace(FULL, first_k_dense_replace=0, num_key_value_heads=1),
}
BIAS = "e_score_correction_bias"
TOKENIZER = make_tokenizer(FULL.vocab_size)


def trees(folder: Path):
    """The parameter trees of a converted folder, float32."""
    mesh = make_mesh(MeshConfig())
    return load(folder, mesh, "float32")[1], load_mtp(folder, mesh, "float32")


def tensors_in(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor, from the file where the index says it is."""
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {name: load_file(folder / name) for name in set(weight_map.values())}
    assert sum(map(len, files.values())) == len(weight_map)
    return {name: files[file][name] for name, file in weight_map.items()}


def assert_same(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Same names, shapes, dtypes and bits."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        found = actual[name]
        assert (found.shape, found.dtype) == (array.shape, array.dtype), name
        assert found.tobytes() == array.tobytes(), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    write_checkpoint(folder / "hf", FULL, seed=3)
    convert(folder / "hf", folder / "converted")
    return folder / "hf"


@pytest.fixture(scope="module")
def trained(hf):
    """A model's and an MTP block's tree."""
    return trees(hf.with_name("converted"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_round_trip(config, tmp_path):
    write_checkpoint(tmp_path / "hf", config, seed=3)
    convert(tmp_path / "hf", tmp_path / "converted")
    export_hf(tmp_path / "out", config, *trees(tmp_path / "converted"), TOKENIZER, "float32")
    assert_same(tensors_in(tmp_path / "out"), tensors_in(tmp_path / "hf"))
    assert ModelConfig.from_hf(tmp_path / "out") == config
    verify(tmp_path / "out", tmp_path / "converted")


def test_all_files_but_the_weights_are_those_of_any_checkpoint(hf, trained, tmp_path):
    export_hf(tmp_path / "out", FULL, *trained, TOKENIZER, "float32")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {name for name in names if "safetensors" in name} == {
        "model.safetensors",
        "mtp.safetensors",
        "model.safetensors.index.json",
    }
    expected = {file.name for file in hf.iterdir() if "safetensors" not in file.name}
    assert {name for name in names if "safetensors" not in name} == expected
    for name in expected - {"generation_config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes(), name
    generation, random = (
        json.loads((folder / "generation_config.json").read_text())
        for folder in (tmp_path / "out", hf)
    )
    assert generation == random | {"do_sample": False}
    mtp = load_file(tmp_path / "out" / "mtp.safetensors")
    assert all(name.startswith("model.layers.3.") for name in mtp)


def test_bfloat16_keeps_the_correction_bias_and_converts(hf, trained, tmp_path):
    export_hf(tmp_path / "out", replace(FULL, num_nextn_predict_layers=0), *trained, TOKENIZER)
    cast = {
        name: array if name.endswith(BIAS) else array.astype("bfloat16")
        for name, array in tensors_in(hf).items()
    }
    assert_same(tensors_in(tmp_path / "out"), cast)
    manifest = convert(tmp_path / "out", tmp_path / "converted")
    assert (manifest.dtype, manifest.has_mtp) == ("bfloat16", True)


def test_end_tokens_are_the_tokenizers(trained, tmp_path):
    config = replace(FULL, eos_token_ids=(1, 2))
    export_hf(tmp_path / "out", config, *trained, TOKENIZER)
    tokenizer = Tokenizer.from_folder(tmp_path / "out")
    ends = [
        tokenizer.encode(token)[0] for token in ("<|endoftext|>", "<|user|>", "<|observation|>")
    ]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == ends


def test_an_older_checkpoint_is_replaced_only_on_request(trained, tmp_path):
    out = tmp_path / "out"
    export_hf(out, FULL, *trained, TOKENIZER)
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="overwrite=True"):
        export_hf(out, FULL, *trained, TOKENIZER, "float32")
    assert (out / "model.safetensors").read_bytes() == before
    export_hf(out, FULL, *trained, TOKENIZER, "float32", overwrite=True)
    assert ModelConfig.from_hf(out).dtype == "float32"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_no_checkpoint_is_never_replaced(trained, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        export_hf(tmp_path, FULL, *trained, TOKENIZER, overwrite=True)


def test_tied_embeddings_are_stored_once_and_must_be_equal(trained):
    model, mtp = trained
    tied = replace(FULL, tie_word_embeddings=True)
    stored = hf_tensors(tied, model | {"lm_head": model["embed_tokens"]}, mtp, "float32")
    assert "lm_head.weight" not in stored
    np.testing.assert_array_equal(stored["model.embed_tokens.weight"], model["embed_tokens"])
    with pytest.raises(ConfigError, match="embed_tokens and lm_head differ"):
        hf_tensors(tied, model, mtp, "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"config": release("zai-org/GLM-4.5-FP8")}, "quantised"),
        ({"config": replace(FULL, vocab_size=500)}, r"ids up to 511, but .* vocab_size is 500"),
        (
            {"config": replace(FULL, moe_intermediate_size=8)},
            r"layers/1/mlp/experts_down_proj: the config asks for \[4, 32, 8\], given is \[4, 32, ",
        ),
        ({"mtp": {}}, r"mtp/enorm: the config asks for \[32\], given is nothing"),
        ({"mtp": {"extra": np.zeros(3)}}, r"mtp/eh_proj.*\n.*and \d+ more"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    trained, tmp_path, changes, message
):
    model, mtp = trained
    given = {"config": FULL, "model": model, "mtp": mtp, "tokenizer": TOKENIZER} | changes
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        export_hf(tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_end_tokens(trained, tmp_path):
    from tokenizers import models

    bare = type(TOKENIZER)(models.BPE({"a": 0}, []))
    with pytest.raises(ConfigError, match=r"the tokenizer has no <\|endoftext\|>, <\|user\|>"):
        export_hf(tmp_path / "out", FULL, *trained, bare)


@pytest.mark.parity
def test_transformers_loads_it(trained, tmp_path):
    import torch
    from transformers import Glm4MoeForCausalLM

    export_hf(tmp_path / "out", FULL, *trained, TOKENIZER)
    _, report = Glm4MoeForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path / "out", output_loading_info=True, dtype=torch.bfloat16
    )
    assert not any(report[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"))
