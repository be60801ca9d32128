"""Other weights while an engine serves: as if it had been made with them, and no program anew."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answers import Answer, ask
from oracle import Oracle
from tiny import TINY, TINY_SEED

from glmjax.config import MeshConfig
from glmjax.engine import Engine
from glmjax.errors import ConfigError
from glmjax.model.quant import QuantArray
from glmjax.runner.kv_heads import KV_AXES, repeat_heads
from glmjax.runner.update import fit
from glmjax.sharding import make_mesh, named_sharding
from glmjax.types import Request, SamplingParams

PROMPT = tuple(np.random.default_rng(5).integers(0, TINY.vocab_size, 19).tolist())
SAMPLING = SamplingParams(
    max_new_tokens=16, temperature=0.8, top_k=20, seed=3, ignore_eos=True, logprobs=1
)
REQUEST = Request("", PROMPT, SAMPLING)
OTHER_SEED = 8


@pytest.fixture
def runner(drafting, make_params):
    """The shared one, which has its own weights again afterwards."""
    yield drafting
    drafting.update_params(make_params(TINY_SEED))


@pytest.fixture(scope="module")
def oracles(oracle, make_params):
    """By the seed of the weights."""
    return {TINY_SEED: oracle, OTHER_SEED: Oracle(make_params(OTHER_SEED))}


def say(runner, params=None, request: Request = REQUEST) -> Answer:
    """What a fresh engine says, after an update if there are `params`."""
    engine = Engine(runner)
    if params is not None:
        engine.update_params(params)
    return ask(engine, [request])[""]


def test_there_and_back_without_a_new_program(runner, make_params, oracles, always_drafting):
    programs, answers = dict(runner._programs), []
    greedy = replace(REQUEST, sampling=replace(SAMPLING, temperature=0.0))
    for seed in (OTHER_SEED, TINY_SEED):
        answers.append(say(runner, make_params(seed), greedy))
        oracles[seed].check(greedy, answers[-1])
        assert answers[-1].accepted > 0
    assert answers[0].tokens != answers[1].tokens
    assert runner._programs == programs


def test_the_model_alone_keeps_the_mtp_block(runner, make_params, oracles):
    """Which drafts for a model that is not its own then; what comes out is right all the same."""
    block = jax.tree.leaves(runner._params["mtp"])
    oracles[OTHER_SEED].check(REQUEST, say(runner, make_params(OTHER_SEED)["model"]))
    assert all(a is b for a, b in zip(block, jax.tree.leaves(runner._params["mtp"]), strict=True))
    other = make_params(OTHER_SEED)["mtp"]
    runner.update_params({"mtp": other})
    np.testing.assert_array_equal(runner._params["mtp"]["eh_proj"], other["eh_proj"])


def test_a_runner_that_does_not_draft_takes_both_trees(plain, make_params, oracles):
    try:
        oracles[OTHER_SEED].check(REQUEST, say(plain, make_params(OTHER_SEED)))
        assert plain._params.keys() == {"model"}
    finally:
        plain.update_params(make_params(TINY_SEED))


def test_other_dtypes_numpy_and_other_devices(runner, make_params, oracles):
    host = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), make_params(OTHER_SEED))
    oracles[OTHER_SEED].check(REQUEST, say(runner, host))
    away = jax.device_put(make_params(TINY_SEED), jax.devices()[5])
    oracles[TINY_SEED].check(REQUEST, say(runner, away))
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params(TINY_SEED))
    say(runner, half)
    for leaf, given in zip(jax.tree.leaves(runner._params), jax.tree.leaves(half), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, given.astype(jnp.float32))


def test_the_given_arrays_may_be_changed_or_donated_afterwards(runner, make_params, oracles):
    params = make_params(OTHER_SEED)
    host = jax.tree.map(np.array, params)
    for given, spoil in ((params, lambda leaf: leaf.delete()), (host, lambda leaf: leaf.fill(0))):
        runner.update_params(given)
        jax.tree.map(spoil, given)
        oracles[OTHER_SEED].check(REQUEST, say(runner))


def test_a_step_in_flight_keeps_the_old_weights_and_says_so(runner, make_params, oracles):
    engine, answer = Engine(runner), Answer()
    engine.add(REQUEST)
    for _ in range(3):  # chunks of 8, 8 and 3 tokens: the last one samples
        assert engine.step() == []
    engine.update_params(make_params(OTHER_SEED), "new")
    assert engine.weight_version == "new"
    while engine.has_work():
        for output in engine.step():
            answer.add(output)
    assert answer.versions == ["default"] + ["new"] * (SAMPLING.max_new_tokens - 1)
    old = oracles[TINY_SEED]
    first = replace(REQUEST, sampling=replace(SAMPLING, max_new_tokens=1))
    old.check(first, replace(answer, tokens=answer.tokens[:1], logprobs=answer.logprobs[:1]))
    with pytest.raises(AssertionError):
        old.check(REQUEST, answer)


def test_versions_are_counted_and_the_cache_is_flushed(runner, make_params, oracles):
    engine = Engine(runner)
    for seed, version in ((None, "default"), (OTHER_SEED, "1"), (TINY_SEED, "2")):
        if seed is not None:
            engine.update_params(make_params(seed))
        for cached in (False, True):
            answer = ask(engine, [REQUEST])[""]
            assert (answer.cached > 0) == cached
            assert set(answer.versions) == {version}
            oracles[seed or TINY_SEED].check(REQUEST, answer)


def test_kv_heads_as_stored_or_repeated():
    """Running: 4 KV heads of 2 query heads over 4 devices; stored: 2 of 4."""
    mesh = make_mesh(MeshConfig(tensor=4))
    axes = {"qkv_proj": ("kv_heads", None, None, None), "qkv_bias": (None, "kv_heads", None, None)}
    rng = np.random.default_rng(0)
    stored = {"qkv_proj": rng.random((2, 6, 3, 5)), "qkv_bias": rng.random((2, 2, 6, 3))}
    repeated = {name: repeat_heads(stored[name], KV_AXES[name], 4) for name in stored}
    running = {
        name: jax.device_put(jnp.zeros(repeated[name].shape), named_sharding(mesh, axes[name]))
        for name in stored
    }
    for params in (stored, repeated):
        for name, leaf in fit(params, running, 2).items():
            assert leaf.sharding == running[name].sharding
            np.testing.assert_allclose(leaf, repeated[name])
    message = r"qkv_bias is .*expected \[2, 2, 6, 3\] or \[2, 4, 4, 3\]"
    with pytest.raises(ConfigError, match=message):
        fit(stored | {"qkv_bias": stored["qkv_bias"][:1]}, running, 2)


def change(params, *path, by):
    """The tree with one leaf changed, or with None dropped."""
    first, *rest = path
    if rest:
        return params | {first: change(params[first], *rest, by=by)}
    new = by(params.get(first))
    return {k: v for k, v in params.items() if k != first} | ({} if new is None else {first: new})


@pytest.mark.parametrize(
    ("path", "by", "message"),
    [
        (("model", "norm"), lambda a: a[1:], r"model/norm is \[63\], expected \[64\]"),
        (
            ("model", "layers", 1, "self_attn", "qkv_proj"),
            lambda a: jnp.zeros((4, 6, 16, 64)),
            r"model/layers/1/self_attn/qkv_proj is \[4, 6, 16, 64\], expected \[8, 4, 16, 64\]",
        ),
        (("model", "vectors", "q_norm"), lambda a: None, "model/vectors/q_norm is missing"),
        (("model", "extra"), lambda a: jnp.zeros(3), "model/extra is no parameter of it"),
        (("model", "norm"), lambda a: a.astype(int), "model/norm is int32, expected a float array"),
        (("model", "norm"), lambda a: 1.0, "model/norm is float, expected a float array"),
        (("mtp", "enorm"), lambda a: None, "mtp/enorm is missing"),
        (("mtp", "hnorm"), lambda a: a[1:], r"mtp/hnorm is \[63\], expected \[64\]"),
    ],
)
def test_another_tree_is_refused_and_the_old_weights_stay(
    runner, make_params, oracles, path, by, message
):
    engine = Engine(runner)
    with pytest.raises(ConfigError, match=f"not those of the running model: {message}"):
        engine.update_params(change(make_params(OTHER_SEED), *path, by=by))
    assert engine.weight_version == "default"
    oracles[TINY_SEED].check(REQUEST, ask(engine, [REQUEST])[""])


def test_a_tree_beside_the_model_and_its_draft_layer_is_refused(runner, make_params):
    with pytest.raises(ConfigError, match="have mpt beside"):
        runner.update_params({"model": make_params(3), "mpt": {}})


def test_fp8_weights_take_fp8_weights():
    running = {"w": QuantArray(jnp.zeros((4, 8), jnp.float8_e4m3fn), jnp.ones((4, 1)))}
    new = {"w": QuantArray(jnp.ones((4, 8), jnp.float8_e4m3fn), jnp.full((4, 1), 2.0))}
    fitted = fit(new, running, 1)["w"]
    assert fitted.values.dtype == jnp.float8_e4m3fn
    assert np.asarray(fitted.scale).max() == 2.0
    with pytest.raises(ConfigError, match="w/values is missing"):
        fit({"w": jnp.ones((4, 8))}, running, 1)
