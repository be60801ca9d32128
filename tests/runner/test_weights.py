"""Restoring onto meshes: the same arrays, each device reading its part, errors before serving."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hf_checkpoints import BIAS, FP8, SMALL, TINY, draw, quantise, quantization_config, tree, write
from ports import free_ports

from convert import chunking
from convert.hf_to_orbax import convert
from glmjax.checkpoint import open_converted
from glmjax.config import MeshConfig
from glmjax.errors import CheckpointError, ConfigError
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.quant import QuantArray
from glmjax.model.spec import path_name, specs_of
from glmjax.runner.weights import decoder_specs, load, load_mtp, mtp_specs, read_config
from glmjax.sharding import make_mesh, named_sharding

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """HF tensors and the converted folder of a model whose matrices are cut into chunks."""
    folder = tmp_path_factory.mktemp("small")
    stored = draw(SMALL)
    convert(write(folder / "hf", SMALL, stored), folder / "out")
    return stored, folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    convert(write(folder / "hf", TINY, draw(TINY)), folder / "out")
    return folder / "out"


@pytest.fixture
def out(finished, tmp_path):
    """A copy to damage."""
    return shutil.copytree(finished, tmp_path / "out")


def leaves(params) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("mesh", ["1", "2", "4", "8", "2x4"])
def test_every_mesh_gets_the_same_arrays_in_its_shardings(small, mesh):
    stored, folder = small
    devices = make_mesh(MeshConfig.parse(mesh))
    config, params = load(folder, devices)
    whole = leaves(params | {"mtp": load_mtp(folder, devices)})
    specs = leaves(specs_of(Decoder(config)) | {"mtp": specs_of(MTP(config))})
    expected = tree(SMALL, stored)
    assert whole.keys() == expected.keys() == specs.keys()
    for path, array in whole.items():
        assert array.sharding == named_sharding(devices, specs[path].axes), path
        assert array.dtype == specs[path].dtype, path
        np.testing.assert_array_equal(np.asarray(array), expected[path], err_msg=path)


def test_the_tree_is_that_of_the_specs(finished):
    mesh = make_mesh(MeshConfig())
    config, params = load(finished, mesh)
    assert config == read_config(finished)
    assert jax.tree.structure(params) == jax.tree.structure(specs_of(Decoder(config)))
    assert list(params["layers"]) == [0, 1, 2]
    mtp = load_mtp(finished, mesh)
    assert jax.tree.structure(mtp) == jax.tree.structure(specs_of(MTP(config)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_casts_on_the_way(finished, dtype):
    mesh = make_mesh(MeshConfig(tensor=2))
    config, params = load(finished, mesh, dtype)
    mtp = load_mtp(finished, mesh, dtype)
    assert config.dtype == dtype
    stored = draw(TINY)
    cast = {n: a if n.endswith(BIAS) else a.astype(dtype) for n, a in stored.items()}
    for path, expected in tree(TINY, cast).items():
        array = leaves(params | {"mtp": mtp})[path]
        assert array.dtype == expected.dtype, path
        np.testing.assert_array_equal(np.asarray(array), expected, err_msg=path)


@pytest.fixture(scope="module", params=[None, (4, 4)], ids=["rows", "blocks"])
def fp8(request, tmp_path_factory):
    """A converted FP8 checkpoint."""
    folder = tmp_path_factory.mktemp("fp8")
    plain = draw(TINY)
    stored = quantise(plain, request.param)
    settings = quantization_config(request.param, plain)
    convert(write(folder / "hf", TINY, stored, quantization_config=settings), folder / "out")
    return folder / "out"


@pytest.mark.parametrize("tensor", [1, 4])
def test_fp8_on_a_mesh(fp8, tensor):
    mesh = make_mesh(MeshConfig(tensor=tensor))
    _, params = load(fp8, mesh)
    mtp = load_mtp(fp8, mesh)
    converted = open_converted(fp8)
    assert jax.tree.structure(params) == jax.tree.structure(decoder_specs(converted))
    assert jax.tree.structure(mtp) == jax.tree.structure(mtp_specs(converted))
    up = params["layers"][1]["mlp"]["experts_gate_up_proj"]
    assert isinstance(up, QuantArray)
    assert up.values.dtype == FP8
    for array in (up.values, up.scale):
        assert {shard.data.shape[2] for shard in array.addressable_shards} == {16 // tensor}
    assert isinstance(mtp["layer"]["mlp"]["experts_down_proj"], QuantArray)
    assert not isinstance(mtp["eh_proj"], QuantArray)


def test_fp8_stays_whatever_the_dtype_of_the_rest(fp8):
    _, params = load(fp8, make_mesh(MeshConfig()), "float32")
    mlp = params["layers"][1]["mlp"]
    down = mlp["experts_down_proj"]
    assert (down.values.dtype, down.scale.dtype) == (FP8, np.float32)
    assert down.block == open_converted(fp8).manifest.block
    assert mlp["gate"].dtype == np.float32


def test_a_mesh_that_does_not_divide_fp8_blocks(fp8):
    blocks = open_converted(fp8).manifest.block
    mesh = make_mesh(MeshConfig(tensor=8))
    if blocks:
        with pytest.raises(ConfigError, match=r"cuts its \d+ columns within FP8 blocks of"):
            load(fp8, mesh)
    else:
        load(fp8, mesh)


# Reading

READ = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 1)
address, process, results, *folders = sys.argv[1:]
jax.distributed.initialize(address, num_processes=2, process_id=int(process))
from glmjax.config import MeshConfig
from glmjax.runner.weights import load, load_mtp
from glmjax.sharding import make_mesh

def bytes_read():
    with open("/proc/self/io") as io:
        return int(next(line for line in io if line.startswith("rchar")).split()[1])

for folder in folders:
    mesh = make_mesh(MeshConfig(tensor=2))
    for expert_parallel in (False, True):
        before = bytes_read()
        load(folder, mesh, expert_parallel=expert_parallel)
        load_mtp(folder, mesh, expert_parallel=expert_parallel)
        with open(results + process, "a") as file:
            print(bytes_read() - before, file=file)
"""


def test_a_device_reads_only_its_part(small, tmp_path, monkeypatch):
    """Two processes with a device each: what each of them really reads, of widths and of experts.

    The second layout needs chunks that the smallest size would not allow in a model so small.
    """
    stored, _ = small
    source = write(tmp_path / "hf", SMALL, stored)
    monkeypatch.setattr(chunking, "MIN_CHUNK_BYTES", 1 << 15)
    convert(source, tmp_path / "cut")
    monkeypatch.setattr(chunking, "MIN_CHUNK_BYTES", 1 << 40)
    convert(source, tmp_path / "whole")  # the same model, a chunk an array: the control
    manifest = open_converted(tmp_path / "cut").manifest
    total = sum(array.size_bytes for array in manifest.arrays.values())
    for found in read_by_each(tmp_path / "bytes", tmp_path / "cut", tmp_path / "whole"):
        assert len(found) == 4
        assert max(found[:2]) < 0.55 * total
        assert min(found[2:]) > 0.95 * total


def read_by_each(results: Path, *folders: Path) -> list[list[int]]:
    """Bytes that each of two processes reads to load each of `folders` onto a mesh of both.

    Each is loaded twice: with a part of every expert on each device, and with whole experts.
    """
    address = f"localhost:{free_ports(1)[0]}"

    def run(process: int) -> list[int]:
        arguments = [address, str(process), str(results), *map(str, folders)]
        command = [sys.executable, "-c", READ, *arguments]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
        return list(map(int, Path(f"{results}{process}").read_text().split()))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, range(2)))


# Errors before serving


def refusal(folder, kind=CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        load(folder, make_mesh(MeshConfig()))
    return str(caught.value)


def test_an_hf_checkpoint(tmp_path):
    source = write(tmp_path / "hf", TINY, draw(TINY))
    assert f"python convert/hf_to_orbax.py {source}" in refusal(source)


def test_a_truncated_file(out):
    file = out / "params" / "layer_00001" / "self_attn.qkv_proj" / "0.0.0.0"
    file.write_bytes(file.read_bytes()[:-2])
    assert str(file) in refusal(out)


def test_a_missing_group(out):
    shutil.rmtree(out / "params" / "layer_00002")
    assert f"{out / 'params' / 'layer_00002'}" in refusal(out)


@pytest.mark.parametrize("name", ["_METADATA", "mlp.gate/.zarray"])
@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_metadata(out, name, text):
    group = out / "params" / "layer_00001"
    (group / name).write_text(text)
    assert str(group) in refusal(out)


def test_a_config_that_is_not_that_of_the_arrays(out):
    file = out / "config.json"
    raw = json.loads(file.read_text())
    file.write_text(json.dumps(raw | {"moe_intermediate_size": 32}))
    message = refusal(out)
    assert str(file) in message
    assert (
        "layers/1/mlp/experts_down_proj: config.json asks for [6, 24, 32], stored is [6, 24, 16]"
        in message
    )
    file.write_text(json.dumps(raw | {"num_hidden_layers": 5}))
    assert "stored is nothing" in refusal(out)


def test_mtp_is_read_only_on_request(out):
    shutil.rmtree(out / "params" / "mtp")
    mesh = make_mesh(MeshConfig())
    load(out, mesh)
    with pytest.raises(CheckpointError, match="mtp"):
        load_mtp(out, mesh)


def test_no_mtp_block(tmp_path):
    config = replace(TINY, num_nextn_predict_layers=0)
    convert(write(tmp_path / "hf", config, draw(config)), tmp_path / "out")
    assert read_config(tmp_path / "out").num_nextn_predict_layers == 0
    with pytest.raises(CheckpointError, match="has no MTP block"):
        load_mtp(tmp_path / "out", make_mesh(MeshConfig()))


def test_an_unknown_dtype(finished):
    with pytest.raises(ConfigError, match="float16"):
        read_config(finished, "float16")
