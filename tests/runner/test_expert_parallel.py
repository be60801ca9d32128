"""Whole experts on each device: the model the same, and no token dropped."""

from __future__ import annotations

import runpy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import ask
from flax import nnx
from hf_checkpoints import draw, quantise, quantization_config, write
from jax.sharding import Mesh

from cases import CASES, prompt_ids
from convert import chunking
from convert.hf_to_orbax import convert
from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.engine import Engine
from glmjax.errors import ConfigError
from glmjax.llm import LLM
from glmjax.model.decoder import Decoder
from glmjax.model.moe import MoE
from glmjax.model.mtp import MTP
from glmjax.model.quant import Activation, QuantArray
from glmjax.model.spec import path_name, specs_of
from glmjax.plans import Bucket
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import Params, load, load_mtp, read_config
from glmjax.scheduler.limits import make_limits
from glmjax.sharding import make_mesh, named_sharding, placement, psum_tensor, shard_map
from glmjax.types import Request, SamplingParams
from harness import Forward
from pallas_kernels.backend import REF, Backend

ROOT = Path(__file__).parents[2]
CONFIG = replace(CASES["qk_norm"], num_hidden_layers=2)
EXPERTS, TOP_K, DRAFTS = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok, 2
FORMS = {"plain": None, "rows": None, "blocks": (8, 8)}
LEAVES = "experts_gate_up_proj", "experts_down_proj"
TRITON = Backend("triton", interpret=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted model by the form of its linear layers: float32, or FP8 with scales."""
    root, plain = tmp_path_factory.mktemp("experts"), draw(CONFIG)
    for form, block in FORMS.items():
        stored = plain if form == "plain" else quantise(plain, block)
        settings = None if form == "plain" else quantization_config(block, plain)
        source = write(root / f"{form}-hf", CONFIG, stored, quantization_config=settings)
        convert(source, root / form)
    return {form: root / form for form in FORMS}


class Restored(NamedTuple):
    """A model and its MTP block on a mesh."""

    config: ModelConfig
    mesh: Mesh
    params: Params
    mtp: Params


def restored(folder, mesh: str, expert_parallel: bool) -> Restored:
    devices = make_mesh(MeshConfig.parse(mesh))
    config, params = load(folder, devices, expert_parallel=expert_parallel)
    mtp = load_mtp(folder, devices, expert_parallel=expert_parallel)
    return Restored(config, devices, params, mtp)


# Restoring


def flat(params) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_arrays_with_whole_experts_on_each_device(folders, form):
    config, devices, params, mtp = restored(folders[form], "2x4", True)
    assert config == replace(read_config(folders[form]), expert_parallel=True)
    _, _, *alone = restored(folders[form], "1", False)
    expected = flat(alone[0] | {"mtp": alone[1]})
    found = flat(params | {"mtp": mtp})
    assert found.keys() == expected.keys()
    whole = 0
    for path, array in found.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[path]), err_msg=path)
        if any(name in path for name in LEAVES):
            whole += 1
            shapes = {shard.data.shape for shard in array.addressable_shards}
            assert shapes == {(EXPERTS // 4, *array.shape[1:])}, path
    assert whole == 2 * 2 * (1 + (form != "plain")), "two leaves of a layer and the MTP block"
    if form == "plain":
        specs = flat(specs_of(Decoder(config)) | {"mtp": specs_of(MTP(config))})
        for path, array in found.items():
            assert array.sharding == named_sharding(devices, specs[path].axes), path


def test_a_folder_whose_experts_are_cut_by_width_only_loads(folders, tmp_path, monkeypatch):
    """As they were written before devices could have whole experts."""
    monkeypatch.setattr(chunking, "MIN_CHUNK_BYTES", 1 << 8)
    monkeypatch.setattr(chunking, "_EXPERT_PARTS", 1)
    convert(write(tmp_path / "hf", CONFIG, draw(CONFIG)), tmp_path / "old")
    _, _, *found = restored(tmp_path / "old", "4", True)
    _, _, *expected = restored(folders["plain"], "4", True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A converted model of 6 experts."""
    root, config = tmp_path_factory.mktemp("six"), replace(CONFIG, n_routed_experts=6)
    convert(write(root / "hf", config, draw(config)), root / "out")
    return root / "out"


def test_experts_that_do_not_divide_are_refused(six):
    restored(six, "4", False)
    with pytest.raises(ConfigError, match="does not divide"):
        restored(six, "4", True)


def test_the_command_line_asks_for_whole_experts(six):
    serve = runpy.run_path(str(ROOT / "serve.py"))
    ports = "--port", "0", "--grpc-port", "0"
    options = serve["parser"]().parse_args(
        ["--model", str(six), "--mesh", "4", "--expert-parallel", *ports]
    )
    with pytest.raises(ConfigError, match="does not divide n_routed_experts 6"):
        serve["run"](options)


# The forward pass


def outputs(folder, mesh: str, expert_parallel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the main model, and those that the MTP block drafts."""
    forward = Forward(*restored(folder, mesh, expert_parallel))
    ids = prompt_ids(CONFIG)
    logits, hidden = forward.main(ids)
    return logits, forward.draft(np.roll(ids, -1), hidden)[0]


@pytest.fixture(scope="module")
def alone(folders):
    return outputs(folders["plain"], "1", False)


@pytest.mark.parametrize("mesh", ["2", pytest.param("4", marks=pytest.mark.slow), "8"])
def test_logits_do_not_depend_on_where_experts_are(folders, alone, mesh):
    for got, expected in zip(outputs(folders["plain"], mesh, True), alone, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_fp8_logits_neither(folders):
    """With blocks. Of rows, attention and the shared expert round what a device sees, on any mesh;
    what their experts make is compared below.
    """
    many, one = (outputs(folders["blocks"], mesh, mesh == "4") for mesh in ("4", "1"))
    for got, expected in zip(many, one, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_deterministic_logits_do_not_depend_on_how_a_prompt_is_cut(folders):
    model, ids = restored(folders["plain"], "4", True), prompt_ids(CONFIG)
    model = model._replace(config=replace(model.config, deterministic=True))
    whole, cut = (Forward(*model) for _ in range(2))
    parts = [cut.main(part)[0] for part in np.split(ids, 2)]
    np.testing.assert_array_equal(np.concatenate(parts), whole.main(ids)[0])


# One layer: exactly, under any load


class Layer:
    """The experts of a MoE layer on a mesh; what the shared expert adds is nothing."""

    def __init__(self, folder, mesh: str, expert_parallel: bool, backend: Backend, **options):
        config, devices, params, _ = restored(folder, mesh, expert_parallel)
        self.mlp = params["layers"][1]["mlp"]
        self.mlp["shared_down_proj"] = jax.tree.map(jnp.zeros_like, self.mlp["shared_down_proj"])
        graph = nnx.graphdef(MoE(replace(config, kernels=backend, **options)))

        def step(mlp, x, bias, valid):
            module = nnx.merge(graph, nnx.State(mlp))
            out, routing = module(Activation(x), {"e_score_correction_bias": bias}, valid)
            return psum_tensor(out), routing.ids

        rows = (None, None)
        in_axes = placement(self.mlp), rows, (None,), (None,)
        self.step = jax.jit(shard_map(step, devices, in_axes, (rows, rows)))

    def __call__(self, x: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows [T, D], of which the last is padding -> [T, D] and the choices [T, k]."""
        out, ids = self.step(self.mlp, x, bias, np.arange(len(x)) < len(x) - 1)
        return np.asarray(out), np.asarray(ids)


def draw_rows(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).standard_normal((tokens, CONFIG.hidden_size), np.float32)


def favouring(first: int) -> np.ndarray:
    """A router's bias by which every token chooses the experts from `first` on."""
    bias = np.zeros(EXPERTS, np.float32)
    bias[first : first + TOP_K] = 100
    return bias


LOADS = {"even": np.zeros(EXPERTS, np.float32), "hot": favouring(4), "last": favouring(12)}


@pytest.fixture(scope="module")
def one(folders):
    """A layer on one device, by form and backend."""
    return cache(lambda form, backend: Layer(folders[form], "1", False, backend))


@pytest.mark.parametrize(
    ("form", "mesh", "backend", "options"),
    [
        ("plain", "2", REF, {}),
        ("rows", "8", REF, {}),
        ("blocks", "4", REF, {}),
        ("plain", "4", REF, {"deterministic": True}),
        ("plain", "4", TRITON, {}),
        pytest.param("rows", "4", TRITON, {}, marks=pytest.mark.slow),
        pytest.param("blocks", "4", TRITON, {}, marks=pytest.mark.slow),
    ],
)
def test_experts_make_the_same_of_every_token_under_any_load(
    folders, one, form, mesh, backend, options
):
    many, x = Layer(folders[form], mesh, True, backend, **options), draw_rows(21)
    for load_name, bias in LOADS.items():
        (got, ids), (expected, known) = many(x, bias), one(form, backend)(x, bias)
        np.testing.assert_array_equal(ids, known)
        assert (ids[-1] == EXPERTS).all()
        if load_name != "even":
            assert set(ids[:-1].ravel()) == set(np.flatnonzero(bias)), "all on one device"
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        assert np.abs(got[:-1]).max(axis=1).min() > 0.1, "no token is dropped"


def test_buffers_are_for_a_devices_share_of_the_choices(folders):
    """Of 512 tokens, each with 4 of 16 experts: 128 an expert, and a quarter more."""
    layer, tokens = Layer(folders["plain"], "2", True, REF), 512
    arguments = layer.mlp, draw_rows(tokens), LOADS["even"], np.ones(tokens, bool)
    assert f"f32[{EXPERTS // 2},160,{CONFIG.hidden_size}]" in str(
        layer.step.trace(*arguments).jaxpr
    )


# The engine


def make_runner(
    folder, mesh: str, expert_parallel: bool, drafts: int = DRAFTS, **options
) -> DeviceRunner:
    """A runner for one short sequence a data group."""
    shape = MeshConfig.parse(mesh, expert_parallel=expert_parallel)
    config, devices, params, mtp = restored(folder, mesh, expert_parallel)
    scheduler = SchedulerConfig(
        shape.data, chunked_prefill_size=16, max_seq_len=64, speculative_num_steps=drafts
    )
    limits = make_limits(config, shape, CacheConfig(4), scheduler)
    shapes = {(1, 0, 0, 0), (1, drafts, 0, 0), (1, drafts, 1, 16)}
    limits = replace(limits, buckets=tuple(Bucket(*shape) for shape in sorted(shapes)))
    return DeviceRunner(replace(config, **options), params, devices, limits, mtp)


def greedy(runner: DeviceRunner) -> list[int]:
    """What an engine says after a prompt longer than a chunk."""
    sampling = SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True)
    request = Request("", tuple(prompt_ids(CONFIG).tolist()), sampling)
    answer = ask(Engine(runner), [request])[""]
    assert answer.error is None
    assert (answer.drafted > 0) == (runner.limits.num_drafts > 0)
    return answer.tokens


@pytest.fixture(scope="module")
def said(folders):
    """By one device, without drafts."""
    return greedy(make_runner(folders["plain"], "1", False, drafts=0))


def test_the_engine_says_the_same_and_takes_weights_as_stored(folders, said, always_drafting):
    assert len(set(said)) > 3
    runner = make_runner(folders["plain"], "2x4", True)
    assert greedy(runner) == said
    _, _, stored, mtp = restored(folders["plain"], "1", False)
    runner.update_params({"model": stored | {"lm_head": -stored["lm_head"]}, "mtp": mtp})
    assert greedy(runner) != said
    runner.update_params({"model": stored, "mtp": mtp})
    assert greedy(runner) == said
    down = runner._params["mtp"]["layer"]["mlp"]["experts_down_proj"]
    assert down.addressable_shards[0].data.shape[0] == EXPERTS // 4


@pytest.mark.slow
def test_the_bundled_model_says_the_same_from_python():
    prompt = [{"role": "user", "content": "What is 12 + 30?"}]
    scheduler = SchedulerConfig(1, max_seq_len=64, chunked_prefill_size=32, speculative_num_steps=0)
    said = []
    for mesh in (1, 2):
        options = {"dtype": "float32", "scheduler": scheduler, "expert_parallel": mesh > 1}
        with LLM(mesh=mesh, **options) as llm:
            assert llm.served.config.expert_parallel == (mesh > 1)
            said.append(llm.generate(prompt, max_new_tokens=12, temperature=0))
    assert said[0].token_ids == said[1].token_ids


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "options"), [("4", {"deterministic": True}), ("2", {"kernels": TRITON})]
)
def test_the_engine_does_so_in_every_way(folders, said, always_drafting, mesh, options):
    assert greedy(make_runner(folders["plain"], mesh, True, **options)) == said


def test_fp8_stays_as_stored(folders):
    for form in ("rows", "blocks"):
        _, _, params, mtp = restored(folders[form], "4", True)
        for mlp in (params["layers"][1]["mlp"], mtp["layer"]["mlp"]):
            assert all(isinstance(mlp[name], QuantArray) for name in LEAVES)
