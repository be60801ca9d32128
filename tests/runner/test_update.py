"""Other weights while an engine serves: as if it had been made with them, and no program anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glmjax.config import MeshConfig
from glmjax.engine import Engine
from glmjax.errors import ConfigError
from glmjax.model.quant import QuantArray
from glmjax.runner.kv_heads import KV_AXES, repeat_heads
from glmjax.runner.update import fit
from glmjax.sharding import make_mesh, named_sharding
from glmjax.types import Request, SamplingParams

PROMPT = tuple(np.random.default_rng(5).integers(0, 192, 19).tolist())
# Sampled: greedy, these models say one token over and over.
SAMPLING = SamplingParams(max_new_tokens=10, temperature=1.0, top_k=20, seed=3, ignore_eos=True)


def drain(engine: Engine) -> list[int]:
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for output in engine.step() for token in output.token_ids]
    return tokens


def say(runner, params=None) -> list[int]:
    """What an engine says, after an update if there are `params`."""
    engine = Engine(runner)
    if params is not None:
        engine.update_params(params)
    engine.add(Request("", PROMPT, SAMPLING))
    return drain(engine)


@pytest.fixture(scope="module")
def runner(make_runner):
    return make_runner(slots=1)


@pytest.fixture(scope="module")
def expected(runner, make_runner):
    """What engines made with the weights of seeds 0 and 1 say; the former before any update."""
    return [say(runner), say(make_runner(slots=1, seed=1))]


def test_there_and_back_without_a_new_program(runner, make_params, expected):
    programs = dict(runner._programs)
    assert len(set(expected[0])) > 3
    assert expected[0] != expected[1]
    for seed in (1, 0):
        assert say(runner, make_params(seed)) == expected[seed]
    assert runner._programs == programs


def test_other_dtypes_numpy_and_other_devices(runner, make_params, expected):
    host = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), make_params(1))
    assert say(runner, host) == expected[1]
    away = jax.device_put(make_params(0), jax.devices()[5])
    assert say(runner, away) == expected[0]
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), make_params(0))
    say(runner, half)
    for leaf, given in zip(jax.tree.leaves(runner._params), jax.tree.leaves(half), strict=True):
        assert leaf.dtype == jnp.float32
        np.testing.assert_array_equal(leaf, given.astype(jnp.float32))


def test_the_given_arrays_may_be_changed_or_donated_afterwards(runner, make_params, expected):
    params = make_params(1)
    host = jax.tree.map(np.array, params)
    for given, spoil in ((params, lambda leaf: leaf.delete()), (host, lambda leaf: leaf.fill(0))):
        runner.update_params(given)
        jax.tree.map(spoil, given)
        assert say(runner) == expected[1]


def test_a_step_in_flight_keeps_the_old_weights(runner, make_params, expected):
    runner.update_params(make_params(0))
    engine = Engine(runner)
    engine.add(Request("", PROMPT, SAMPLING))
    for _ in range(3):  # chunks of 8, 8 and 3 tokens: the last one samples
        assert engine.step() == []
    engine.update_params(make_params(1))
    tokens = drain(engine)
    assert len(tokens) == SAMPLING.max_new_tokens
    assert tokens[0] == expected[0][0]
    assert tokens != expected[0]


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
        (("norm",), lambda a: a[1:], r"norm is \[63\], expected \[64\]"),
        (
            ("layers", 1, "self_attn", "qkv_proj"),
            lambda a: jnp.zeros((4, 6, 16, 64)),
            r"layers/1/self_attn/qkv_proj is \[4, 6, 16, 64\], expected \[8, 4, 16, 64\]",
        ),
        (("vectors", "q_norm"), lambda a: None, "vectors/q_norm is missing"),
        (("extra",), lambda a: jnp.zeros(3), "extra is no parameter of it"),
        (("norm",), lambda a: a.astype(int), "norm is int32, expected a float array"),
        (("norm",), lambda a: 1.0, "norm is float, expected a float array"),
    ],
)
def test_another_tree_is_refused_and_the_old_weights_stay(
    runner, make_params, expected, path, by, message
):
    runner.update_params(make_params(0))
    engine = Engine(runner)
    with pytest.raises(ConfigError, match=f"not those of the running model: {message}"):
        engine.update_params(change(make_params(1), *path, by=by))
    engine.add(Request("", PROMPT, SAMPLING))
    assert drain(engine) == expected[0]


def test_fp8_weights_take_fp8_weights():
    running = {"w": QuantArray(jnp.zeros((4, 8), jnp.float8_e4m3fn), jnp.ones((4, 1)))}
    new = {"w": QuantArray(jnp.ones((4, 8), jnp.float8_e4m3fn), jnp.full((4, 1), 2.0))}
    fitted = fit(new, running, 1)["w"]
    assert fitted.values.dtype == jnp.float8_e4m3fn
    assert np.asarray(fitted.scale).max() == 2.0
    with pytest.raises(ConfigError, match="w/values is missing"):
        fit({"w": jnp.ones((4, 8))}, running, 1)
