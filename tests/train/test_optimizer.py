"""Which leaves Muon and AdamW train, what an update looks like, and how routers are balanced."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glmjax.config import MeshConfig
from glmjax.model.spec import path_name
from glmjax.sharding import make_mesh, named_sharding
from glmjax.train.loss import TrainBatch
from glmjax.train.optimizer import balance, learning_rates, make_optimizer
from glmjax.train.recipe import OptimizerRecipe, Recipe, Restart, Stage
from glmjax.train.step import TrainState, make_train_step

RATE, DECAY, RMS = 0.01, 0.1, 0.2

ATTENTION = ("self_attn/qkv_proj", "self_attn/o_proj")
DENSE = (*ATTENTION, "mlp/gate_up_proj", "mlp/down_proj")
SPARSE = (
    *ATTENTION,
    "mlp/gate",
    "mlp/experts_gate_up_proj",
    "mlp/experts_down_proj",
    "mlp/shared_gate_up_proj",
    "mlp/shared_down_proj",
)
MUON = {
    *(f"model/layers/0/{name}" for name in DENSE),
    *(f"model/layers/1/{name}" for name in SPARSE),
    "model/lm_head",
    "mtp/eh_proj",
    *(f"mtp/layer/{name}" for name in SPARSE),
}
VECTORS = (
    "input_layernorm",
    "post_attention_layernorm",
    "qkv_bias",
    "q_norm",
    "k_norm",
    "e_score_correction_bias",
)
ADAMW = {
    "model/embed_tokens",
    "model/norm",
    *(f"model/vectors/{name}" for name in VECTORS),
    "mtp/enorm",
    "mtp/hnorm",
    "mtp/shared_head_norm",
    *(f"mtp/vectors/{name}" for name in VECTORS),
}


def by_name(tree) -> dict[str, np.ndarray]:
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def gradient(rng, shape) -> np.ndarray:
    """Each matrix, of the last two axes, well-conditioned, and of a size all its own."""
    noise = rng.standard_normal(shape)
    if len(shape) < 2:
        return np.float32(noise)
    left, values, right = np.linalg.svd(noise, full_matrices=False)
    values = rng.uniform(0.3, 1, values.shape) * 10 ** rng.uniform(-2, 0, (*shape[:-2], 1))
    return np.float32(left * values[..., None, :] @ right)


@pytest.fixture(scope="module")
def params(tiny, random_params):
    return jax.tree.map(np.asarray, random_params(tiny, make_mesh(MeshConfig())))


@pytest.fixture(scope="module")
def gradients(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: gradient(rng, leaf.shape), params)


@pytest.fixture(scope="module")
def first_update():
    """(gradients, params) -> what the first step adds to each leaf, by name."""
    recipe = OptimizerRecipe(learning_rate=RATE, warmup_steps=0, weight_decay=DECAY, update_rms=RMS)
    optimizer = make_optimizer(recipe, steps=10)
    update = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))
    return lambda grads, params: by_name(update(grads, params)[0])


@pytest.fixture(scope="module")
def updates(first_update, params, gradients):
    """Without decay."""
    return first_update(gradients, jax.tree.map(np.zeros_like, params))


def matrices(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[-2:])


def test_adamw_trains_what_is_no_matrix_and_muon_all_else(updates):
    """At first AdamW moves all numbers equally far, but for those whose gradient is tiny."""
    lengths = {name: np.abs(update) for name, update in updates.items()}
    equal = {name for name, x in lengths.items() if np.quantile(x, 0.1) > 0.98 * x.max() > 0}
    assert equal == ADAMW
    assert updates.keys() - equal == MUON


def test_every_expert_gate_and_head_is_orthogonalised_alone(updates, gradients):
    """Singular values all become about 1, times a scale that depends on the shape only."""
    grads = by_name(gradients)
    for name in MUON:
        scale = RATE * RMS * math.sqrt(max(updates[name].shape[-2:]))
        left, _, right = np.linalg.svd(matrices(grads[name]), full_matrices=False)
        off = -matrices(updates[name]) / scale - left @ right
        assert np.linalg.norm(off, ord=2, axis=(-2, -1)).max() < 0.5, name


def test_every_matrix_moves_by_the_same_rms(updates):
    for name in MUON:
        rms = np.sqrt(np.mean(matrices(updates[name]) ** 2, axis=(-2, -1)))
        np.testing.assert_allclose(rms, RATE * RMS, rtol=0.3, err_msg=name)


def test_permuted_experts_and_heads_get_permuted_updates(first_update, updates, params, gradients):
    rng = np.random.default_rng(2)

    def permuted(array, order):
        return matrices(array)[order].reshape(array.shape)

    counts = {name: math.prod(array.shape[:-2]) for name, array in updates.items() if name in MUON}
    orders = {name: rng.permutation(count) for name, count in counts.items()}
    grads = jax.tree.map_with_path(
        lambda path, g: permuted(g, orders[path_name(path)]) if path_name(path) in orders else g,
        gradients,
    )
    after = first_update(grads, jax.tree.map(np.zeros_like, params))
    for name, order in orders.items():
        expected = permuted(updates[name], order)
        np.testing.assert_allclose(after[name], expected, rtol=1e-3, atol=1e-6, err_msg=name)


def test_decay_pulls_matrices_only(first_update, params):
    pulled = first_update(jax.tree.map(np.zeros_like, params), params)
    for name, values in by_name(params).items():
        expected = -RATE * DECAY * values if name in MUON else np.zeros_like(values)
        np.testing.assert_allclose(pulled[name], expected, rtol=1e-5, atol=0, err_msg=name)


def run_updates(recipe: OptimizerRecipe, steps: int, grads: np.ndarray) -> np.ndarray:
    """Updates of one matrix, which stays 0, by a run of `steps` for gradients [n, ...]."""
    optimizer = make_optimizer(recipe, steps)
    params = {"gate": jnp.zeros(grads.shape[1:])}

    def step(state, grad):
        updates, state = optimizer.update({"gate": grad}, state, params)
        return state, updates["gate"]

    return np.asarray(jax.lax.scan(step, optimizer.init(params), jnp.asarray(grads))[1])


def test_the_rate_warms_up_to_the_peak_and_falls_as_a_cosine_to_the_final_fraction():
    warmup, steps, final = 4, 20, 0.1
    recipe = OptimizerRecipe(learning_rate=RATE, warmup_steps=warmup, final_fraction=final)
    grad = gradient(np.random.default_rng(3), (4, 6))
    moved = run_updates(recipe, steps, np.repeat(grad[None], steps + 1, axis=0))
    rates = RATE * np.linalg.norm(moved, axis=(1, 2)) / np.linalg.norm(moved[warmup])
    np.testing.assert_allclose(rates[: warmup + 1], RATE * np.arange(5) / 4, rtol=1e-3)
    assert rates[(warmup + steps) // 2] == pytest.approx(RATE * (1 + final) / 2, rel=1e-3)
    assert rates[steps] == pytest.approx(RATE * final, rel=1e-3)
    assert (np.diff(rates[warmup:]) < 0).all()
    assert np.sqrt(np.mean(moved[warmup] ** 2)) == pytest.approx(RATE * RMS, rel=0.3)


def test_a_restart_begins_a_cycle_of_its_own_and_changes_none_before_it():
    once = OptimizerRecipe(learning_rate=RATE, warmup_steps=2, final_fraction=0.1)
    again = replace(once, restarts=(Restart(10, 3 * RATE),))
    first, both = learning_rates(once, 10), learning_rates(again, 30)
    assert [float(both(step)) for step in range(10)] == [float(first(step)) for step in range(10)]
    rates = np.array([both(step) for step in range(10, 31)])
    np.testing.assert_allclose(rates[[0, 1, 2, 20]], RATE * np.array([0, 1.5, 3, 0.3]), rtol=1e-5)
    assert (np.diff(rates[2:]) < 0).all()


def test_a_burst_counts_as_a_gradient_of_the_greatest_length():
    rng = np.random.default_rng(4)
    grads = np.stack([gradient(rng, (4, 6)) for _ in range(2)])
    grads /= np.linalg.norm(grads, axis=(1, 2), keepdims=True)
    recipe = OptimizerRecipe(warmup_steps=0, max_grad_norm=0.5)

    def last(*lengths):
        return run_updates(recipe, 9, np.float32(grads * np.reshape(lengths, (2, 1, 1))))[-1]

    np.testing.assert_allclose(last(1000, 0.3), last(0.5, 0.3), rtol=1e-3, atol=1e-7)
    assert np.abs(last(0.05, 0.3) - last(0.5, 0.3)).max() > 1e-3 * OptimizerRecipe.learning_rate


@settings(max_examples=30)
@example(load=[0, 0, 3, 3, 5, 5, 5], rate=1e-3, seed=0)  # a mean of 3 that rounds
@given(
    load=st.integers(2, 12).flatmap(
        lambda experts: st.lists(st.integers(0, 5), min_size=experts, max_size=experts)
    ),
    rate=st.sampled_from([0.0, 1e-3, 0.25]),
    seed=st.integers(0, 2**16),
)
def test_balance_raises_the_unused_and_lowers_the_overused_by_the_rate(load, rate, seed):
    bias = np.random.default_rng(seed).standard_normal((2, len(load))).astype(np.float32)
    loads = np.array([load, 2 * np.array(load[::-1])], np.float32)
    moved = np.asarray(jax.jit(balance, static_argnums=2)(bias, loads, rate))
    for row in range(2):
        for expert, count in enumerate(loads[row]):
            more = int(count) * len(load) - int(loads[row].sum())
            step = np.float32(rate) * np.float32((more < 0) - (more > 0))
            assert moved[row, expert] == bias[row, expert] + step, (load, row, expert)


@pytest.fixture
def run_steps(tiny, random_params):
    """bias_rate -> for each of two steps: parameters before and after it, and its metrics."""

    def run(bias_rate: float):
        config = replace(tiny, num_hidden_layers=1, first_k_dense_replace=0)
        mesh, stage = make_mesh(MeshConfig()), Stage(2, 2, 12, bias_rate=bias_rate)
        recipe = Recipe("tiny", config, (stage,), devices=1, balance_weight=0.1)
        optimizer = make_optimizer(OptimizerRecipe(warmup_steps=0, newton_schulz_steps=1), steps=2)
        params = random_params(config, mesh)
        state = TrainState(params, optimizer.init(params), jnp.int32(0))
        state = jax.device_put(state, named_sharding(mesh, ()))
        step = make_train_step(recipe, stage, optimizer, mesh)
        for number in (1, 2):
            before = jax.tree.map(np.array, state.params)
            state, metrics = step(state, conversation_batch(config.vocab_size, number))
            assert state.step == number
            yield before, jax.tree.map(np.array, state.params), metrics

    return run


def conversation_batch(vocab_size: int, seed: int) -> TrainBatch:
    """Two rows, each one conversation that is all the model's."""
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (2, 12), np.int32)
    places = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    return TrainBatch(tokens, np.ones_like(tokens), places, np.ones(tokens.shape, bool))


@pytest.mark.parametrize("bias_rate", [0.0, 0.01])
def test_a_step_moves_the_correction_bias_by_its_rate_and_nothing_else(run_steps, bias_rate):
    for before, after, metrics in run_steps(bias_rate):
        assert np.any(before["model"]["lm_head"] != after["model"]["lm_head"])
        for part, name in (("model", "load"), ("mtp", "mtp_load")):
            load = np.asarray(metrics[name])
            assert np.any(load != load.mean())
            move = np.float32(bias_rate) * np.sign(load.mean(-1, keepdims=True) - load)
            old, new = (
                tree[part]["vectors"]["e_score_correction_bias"] for tree in (before, after)
            )
            np.testing.assert_array_equal(new, old + move)
