"""More devices than KV heads: each repeated, the model the same."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from hf_checkpoints import FP8, draw, quantise, quantization_config, write

from cases import CASES, prompt_ids
from convert.hf_to_orbax import convert
from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.engine import Engine
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.quant import QuantArray
from glmjax.model.spec import path_name, specs_of
from glmjax.plans import Bucket
from glmjax.runner.kv_heads import kv_axis, repeat_heads, stored_shape
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import load, load_mtp, read_config
from glmjax.scheduler.limits import make_limits
from glmjax.sharding import make_mesh, named_sharding
from glmjax.types import Request, SamplingParams
from harness import Forward

CONFIG = replace(
    CASES["qk_norm"], num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted model of 2 KV heads with 4 query heads each, and an MTP block."""
    root = tmp_path_factory.mktemp("kv_heads")
    convert(write(root / "hf", CONFIG, draw(CONFIG)), root / "out")
    return root / "out"


@pytest.fixture(scope="module")
def fp8(request, tmp_path_factory):
    """The same in FP8, one scale a row (None) or a block."""
    root, plain = tmp_path_factory.mktemp("kv_heads_fp8"), draw(CONFIG)
    settings = quantization_config(request.param, plain)
    stored = quantise(plain, request.param)
    convert(write(root / "hf", CONFIG, stored, quantization_config=settings), root / "out")
    return root / "out"


def outputs(folder, tensor: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the main model, and those that the MTP block drafts."""
    mesh = make_mesh(MeshConfig(tensor=tensor))
    config, params = load(folder, mesh)
    forward = Forward(config, mesh, params, load_mtp(folder, mesh))
    ids = prompt_ids(CONFIG)
    logits, hidden = forward.main(ids)
    return logits, forward.draft(np.roll(ids, -1), hidden)[0]


@pytest.fixture(scope="module")
def alone(folder):
    return outputs(folder, 1)


@pytest.mark.parametrize("tensor", [2, 4, 8])
def test_logits_do_not_depend_on_how_often_kv_heads_are_repeated(folder, alone, tensor):
    for got, expected in zip(outputs(folder, tensor), alone, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fp8", [(8, 8)], indirect=True)
def test_fp8_logits_neither(fp8):
    """With blocks. One scale a row goes with one a token of what a device sees, on any mesh."""
    for got, expected in zip(outputs(fp8, 4), outputs(fp8, 1), strict=True):
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        assert error < 0.05, "sums in another order round some activations to a neighbour"


def make_runner(folder, mesh: MeshConfig) -> DeviceRunner:
    """A runner for one short sequence a data group."""
    devices, config = make_mesh(mesh), read_config(folder)
    sizes = {"chunked_prefill_size": 16, "max_seq_len": 64, "speculative_num_steps": 0}
    scheduler = SchedulerConfig(mesh.data, **sizes)
    limits = make_limits(config, mesh, CacheConfig(4), scheduler)
    limits = replace(limits, buckets=(Bucket(1, 0, 0, 0), Bucket(1, 0, 1, 16)))
    return DeviceRunner(config, load(folder, devices)[1], devices, limits)


def greedy(runner: DeviceRunner) -> list[int]:
    """What an engine says after a prompt longer than a chunk."""
    engine = Engine(runner)
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    engine.add(Request("", tuple(prompt_ids(CONFIG).tolist()), sampling))
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens


def test_the_engine_says_the_same_and_takes_weights_as_stored(folder):
    expected = greedy(make_runner(folder, MeshConfig()))
    assert len(set(expected)) > 3
    runner = make_runner(folder, MeshConfig(2, 4))
    assert runner._state.kv.k.addressable_shards[0].data.shape[3] == 1, "a KV head a device"
    assert greedy(runner) == expected
    _, stored = load(folder, make_mesh(MeshConfig()))
    runner.update_params(stored | {"lm_head": -stored["lm_head"]})
    assert greedy(runner) != expected
    runner.update_params(stored)
    assert greedy(runner) == expected


def flat(params) -> dict[str, jax.Array]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def repeated(array: np.ndarray, axis: int, times: int) -> np.ndarray:
    """Head by head: the r-th copy of a KV head has the r-th share of its query heads."""
    heads = []
    for group in np.moveaxis(array, (axis, axis + 1), (0, 1)):
        shares = np.split(group[:-2], times)
        heads += [np.concatenate([share, group[-2:]]) for share in shares]
    return np.moveaxis(np.stack(heads), (0, 1), (axis, axis + 1))


@pytest.mark.parametrize("mesh", ["1x8", "2x4"])
def test_the_tree_is_that_of_the_config_it_comes_with(folder, mesh):
    devices, shape = make_mesh(MeshConfig.parse(mesh)), MeshConfig.parse(mesh)
    config, params = load(folder, devices)
    assert config == replace(read_config(folder), num_key_value_heads=shape.tensor)
    assert read_config(folder).num_key_value_heads == 2
    specs = flat(specs_of(Decoder(config)) | {"mtp": specs_of(MTP(config))})
    one = make_mesh(MeshConfig())
    stored = flat(load(folder, one)[1] | {"mtp": load_mtp(folder, one)})
    for path, array in flat(params | {"mtp": load_mtp(folder, devices)}).items():
        expected, axis = np.asarray(stored[path]), kv_axis(path)
        if axis is not None:
            expected = repeated(expected, axis, shape.tensor // 2)
            assert array.addressable_shards[0].data.shape[axis] == 1
        assert array.shape == specs[path].shape, path
        assert array.sharding == named_sharding(devices, specs[path].axes), path
        np.testing.assert_array_equal(np.asarray(array), expected, err_msg=path)


@pytest.mark.parametrize("fp8", [None, (8, 8)], indirect=True, ids=["rows", "blocks"])
def test_fp8_values_and_scales_are_repeated_alike(fp8):
    qkv = {}
    for tensor in (1, 4):
        _, params = load(fp8, make_mesh(MeshConfig(tensor=tensor)))
        qkv[tensor] = params["layers"][1]["self_attn"]["qkv_proj"]
        assert isinstance(qkv[tensor], QuantArray)
        assert qkv[tensor].values.dtype == FP8
    assert qkv[4].block == qkv[1].block
    for name in ("values", "scale"):
        stored, run = (np.asarray(getattr(qkv[n], name)) for n in (1, 4))
        np.testing.assert_array_equal(run, repeated(stored, 0, 2))


def test_every_leaf_that_is_laid_out_by_kv_head_is_known():
    specs = flat(specs_of(Decoder(CONFIG)) | {"mtp": specs_of(MTP(CONFIG))})
    for path, spec in specs.items():
        axis = spec.axes.index("kv_heads") if "kv_heads" in spec.axes else None
        assert kv_axis(path) == axis, path


def test_a_stored_shape_is_what_repeating_came_from():
    stored = np.arange(3 * 2 * 6 * 5).reshape(3, 2, 6, 5)
    run = repeat_heads(stored, 1, 4)
    assert run.shape == (3, 4, 4, 5)
    assert stored_shape("vectors/qkv_bias", run.shape, 2) == stored.shape
    assert stored_shape("norm", (7,), 2) == (7,)
