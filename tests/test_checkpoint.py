"""The layout of a converted folder, and what its errors say."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from hf_checkpoints import TINY, draw, quantise, quantization_config, write
from hypothesis import given
from hypothesis import strategies as st

from convert.hf_to_orbax import convert
from glmjax.checkpoint import (
    StoredArray,
    check_files,
    locate,
    open_converted,
    read_manifest,
    write_manifest,
)
from glmjax.errors import CheckpointError, ConfigError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    convert(write(folder / "hf", TINY, draw(TINY)), folder / "out")
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "out")


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("embed_tokens", ("embed", "embed_tokens")),
        ("norm", ("head", "norm")),
        ("lm_head", ("head", "lm_head")),
        ("vectors/q_norm", ("vectors", "q_norm")),
        ("layers/3/mlp/gate", ("layer_00003", "mlp.gate")),
        (
            "layers/91/mlp/experts_down_proj/scale",
            ("layer_00091", "mlp.experts_down_proj.scale"),
        ),
        ("mtp/enorm", ("mtp", "enorm")),
        ("mtp/layer/mlp/gate", ("mtp", "layer.mlp.gate")),
    ],
)
def test_where_leaves_lie(path, place):
    assert locate(path) == place


counts = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=3)


@given(counts)
def test_chunks_tile_the_array(counts):
    shape = tuple(count * chunk for count, chunk in counts)
    array = StoredArray(shape, "float32", tuple(chunk for _, chunk in counts))
    taken = np.zeros(shape, np.int32)
    for start in array.chunk_starts():
        taken[tuple(slice(s, s + c) for s, c in zip(start, array.chunks, strict=True))] += 1
    assert (taken == 1).all()
    names = list(array.chunk_names())
    assert len(set(names)) == len(list(array.chunk_starts()))
    assert len(names) * array.chunk_bytes == array.size_bytes


def test_manifest_round_trips(finished, tmp_path):
    manifest = read_manifest(finished)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest


def test_config_is_that_of_what_is_stored(tmp_path):
    plain = draw(TINY)
    main = {n: a for n, a in plain.items() if not n.startswith("model.layers.3.")}
    source = write(
        tmp_path / "hf",
        TINY,
        quantise(main, None),
        quantization_config=quantization_config(None, plain),
    )
    convert(source, tmp_path / "fp8")
    convert(source, tmp_path / "float32", "float32")
    fp8, wide = (open_converted(tmp_path / name).config for name in ("fp8", "float32"))
    assert (fp8.dtype, wide.dtype) == ("bfloat16", "float32")
    assert fp8.quant is not None
    assert wide.quant is None
    assert fp8.num_nextn_predict_layers == wide.num_nextn_predict_layers == 0
    assert open_converted(tmp_path / "fp8", "float32").config.dtype == "float32"


def test_files_are_all_there(finished):
    converted = open_converted(finished)
    check_files(converted, converted.manifest.groups())


def test_missing_and_truncated_files_are_named(out):
    gate = out / "params" / "layer_00002" / "mlp.gate" / "0.0"
    norm = out / "params" / "head" / "norm" / "0"
    size = norm.stat().st_size
    gate.unlink()
    norm.write_bytes(norm.read_bytes()[:-1])
    converted = open_converted(out)
    with pytest.raises(CheckpointError) as caught:
        check_files(converted, converted.manifest.groups())
    assert f"{gate} is missing" in str(caught.value)
    assert f"{norm} has {size - 1} bytes, expected {size}" in str(caught.value)
    check_files(converted, ["embed", "vectors"])


def test_a_missing_group(out):
    shutil.rmtree(out / "params" / "layer_00001")
    converted = open_converted(out)
    with pytest.raises(CheckpointError, match=r"layer_00001.* is missing\n[^$]*and \d+ more"):
        check_files(converted, converted.manifest.groups())


def test_a_group_that_was_never_stored(finished):
    converted = open_converted(finished)
    with pytest.raises(CheckpointError, match="holds no layer_00077"):
        check_files(converted, ["embed", "layer_00077"])


# What is not a converted folder


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_converted(folder)
    return str(caught.value)


def test_an_hf_checkpoint_comes_with_its_command(tmp_path):
    source = write(tmp_path / "glm", TINY, draw(TINY))
    command = f"python convert/hf_to_orbax.py {source} glm-orbax"
    assert command in refusal(source)


def test_unfinished_conversions(out):
    partial = out.rename(out.with_name("out.partial"))
    assert "is not finished" in refusal(out)
    (partial / "glmjax.json").unlink()
    assert "is not finished" in refusal(out)
    assert "unfinished conversion" in refusal(partial)


def test_nothing_there(tmp_path):
    assert "is not a folder" in refusal(tmp_path / "nowhere")
    assert "is not a converted checkpoint" in refusal(tmp_path)
    (tmp_path / "glmjax.json").mkdir()
    assert "is not a converted checkpoint" in refusal(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"arrays"', '"others"'),
        lambda text: text.replace('"shape"', '"form"'),
    ],
)
def test_a_damaged_manifest(out, change):
    file = out / "glmjax.json"
    file.write_text(change(file.read_text()))
    assert f"{file} is damaged" in refusal(out)


def test_another_layout_version(out):
    file = out / "glmjax.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    assert "layout version 99, this glmjax reads 1" in refusal(out)


def test_a_config_of_another_model(out):
    (out / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        open_converted(out)
