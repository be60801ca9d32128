"""The training loss: the forward pass that serving has, and what is counted of it."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.config import MeshConfig
from glmjax.model.decoder import Decoder
from glmjax.model.layers import embed
from glmjax.model.moe import Routing
from glmjax.model.mtp import MTP
from glmjax.sharding import make_mesh, psum_data, shard_map
from glmjax.train.loss import LossWeights, TrainBatch, balance_loss, loads, total_loss
from glmjax.train.recipe import Recipe, Stage
from glmjax.train.sequences import Sequences
from glmjax.train.step import BATCH_AXES, TrainState, make_train_step
from harness import Forward

ROWS, TOKENS = 4, 16
WEIGHTS = LossWeights(prompt=0.25, mtp=0.5, balance=0.1)


def pack(lengths, config, seed: int = 0) -> TrainBatch:
    """Conversations of random tokens, about half of them trained, one list of lengths a row."""
    rng = np.random.default_rng(seed)
    segments, positions = (np.zeros((ROWS, TOKENS), np.int32) for _ in range(2))
    for row, row_lengths in enumerate(lengths):
        ends = np.minimum(np.cumsum([0, *row_lengths]), TOKENS)
        for number, (start, end) in enumerate(pairwise(ends), 1):
            segments[row, start:end] = number
            positions[row, start:end] = np.arange(end - start)
    tokens = rng.integers(0, config.vocab_size, segments.shape, np.int32)
    trained = (rng.random(segments.shape) < 0.5) & (segments > 0)
    return TrainBatch(tokens, segments, positions, trained)


def conversations(batch: TrainBatch):
    """(row, slice) of each."""
    for row, segments in enumerate(batch.segments):
        for number in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == number)
            if len(places):
                yield row, slice(places[0], places[-1] + 1)


UNEVEN = [[7, 7], [TOKENS], [7, 7, 2], [3]]  # a row that is full, a row mostly padding


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def forward(tiny, mesh):
    """(params, batch) -> logits and MTP logits [R, S, V], and the routing of each MoE layer."""
    decoder_graph, mtp_graph = nnx.graphdef(Decoder(tiny)), nnx.graphdef(MTP(tiny))

    def local(params, batch, following):
        decoder = nnx.merge(decoder_graph, nnx.State(params["model"]))
        block = nnx.merge(mtp_graph, nnx.State(params["mtp"]))
        layout = Sequences(batch.segments, batch.positions)
        hidden, _, routings = decoder(batch.tokens.reshape(-1), None, layout)
        embedded = embed(following.reshape(-1), decoder.embed_tokens.get_value())
        drafted, _, routing = block(embedded, hidden, None, layout, tiny.num_hidden_layers)
        logits = (decoder.logits(x).reshape(ROWS, TOKENS, -1) for x in (hidden, drafted))
        return *logits, [*routings, routing]

    run = jax.jit(shard_map(local, mesh, ((), (), ()), ()))

    def outputs(params, batch):
        # what stands after a conversation's last token predicts nothing there, but is routed
        following = np.roll(batch.tokens, -1, axis=1)
        return jax.tree.map(np.asarray, run(params, batch, following))

    return outputs


@pytest.fixture(scope="module")
def loss_on(tiny):
    """A mesh's function (params, batch, weights) -> the loss and metrics."""

    def make(mesh):
        def local(params, batch, weights):
            return psum_data(total_loss(params, batch, tiny, LossWeights(*weights)))

        run = jax.jit(shard_map(local, mesh, ((), BATCH_AXES, ()), ()))

        def call(params, batch, weights: LossWeights = WEIGHTS):
            numbers = np.float32([weights.prompt, weights.mtp, weights.balance])
            return jax.tree.map(np.asarray, run(params, batch, numbers))

        return call

    return make


@pytest.fixture(scope="module")
def loss(loss_on, mesh):
    return loss_on(mesh)


@pytest.fixture(scope="module")
def gradients_on(tiny):
    """(mesh, params, batch) -> gradients, which this optimiser keeps; params are used up."""

    def make(mesh, params, batch):
        stage = Stage(1, ROWS, TOKENS, mtp_weight=WEIGHTS.mtp)
        extra = {"prompt_weight": WEIGHTS.prompt, "balance_weight": WEIGHTS.balance}
        recipe = Recipe("tiny", tiny, (stage,), devices=mesh.size, **extra)
        keeper = optax.trace(decay=0.0)
        state = TrainState(params, keeper.init(params), jnp.int32(0))
        state, _ = make_train_step(recipe, stage, keeper, mesh)(state, batch)
        return jax.tree.map(np.asarray, state.optimizer.trace)

    return make


@pytest.fixture(scope="module")
def gradients(gradients_on, random_params, tiny, mesh):
    """Of the uneven batch, on one device."""
    return gradients_on(mesh, random_params(tiny, mesh), pack(UNEVEN, tiny))


def test_packed_conversations_compute_what_serving_computes(tiny, mesh, random_params, forward):
    params, batch = random_params(tiny, mesh), pack(UNEVEN, tiny)
    logits, drafted, _ = forward(params, batch)
    served = Forward(tiny, mesh, params["model"], params["mtp"])
    for row, places in [(0, slice(0, 7)), (0, slice(7, 14)), (2, slice(7, 14))]:
        served.lens.update(main=0, mtp=0)
        ids = batch.tokens[row, places]
        expected, hidden = served.main(ids)
        np.testing.assert_allclose(logits[row, places], expected, rtol=1e-4, atol=1e-4)
        expected, _ = served.draft(ids[1:], hidden[:-1])
        np.testing.assert_allclose(drafted[row, places][:-1], expected, rtol=1e-4, atol=1e-4)


def mean(values, weights) -> float:
    return float(np.dot(values, weights) / sum(weights)) if sum(weights) else 0.0


def predictions(logits, batch: TrainBatch, ahead: int):
    """Loss, whether it was right, and whether it is trained, of each token to be predicted."""
    found = []
    for row, places in conversations(batch):
        targets = batch.tokens[row, places][ahead:]
        trained = batch.trained[row, places][ahead:]
        for z, target, own in zip(logits[row, places], targets, trained, strict=False):
            p = np.exp(np.float64(z)) / np.exp(np.float64(z)).sum()
            found.append((-np.log(p[target]), z.argmax() == target, own))
    return np.array(found, float).reshape(-1, 3).T


def expected_balance(routing: Routing, valid: np.ndarray) -> float:
    """Of rows whose tokens count where valid [R, S]."""
    rows = []
    for kept, ids, scores in zip(valid, *by_row(routing, len(valid)), strict=True):
        experts, tokens = scores.shape[-1], max(kept.sum(), 1)
        chosen = np.bincount(ids[kept].reshape(-1), minlength=experts)
        share = experts * chosen / (tokens * ids.shape[-1])
        rows.append(share @ (scores / scores.sum(-1, keepdims=True))[kept].sum(0) / tokens)
    return float(np.mean(rows))


def by_row(routing: Routing, rows: int):
    """ids and scores, in float64."""
    ids, scores = np.asarray(routing.ids), np.float64(routing.scores)
    return ids.reshape(rows, -1, ids.shape[-1]), scores.reshape(rows, -1, scores.shape[-1])


def expected_load(routing: Routing, valid: np.ndarray) -> np.ndarray:
    ids = np.asarray(routing.ids)[valid.reshape(-1)]
    return np.bincount(ids.reshape(-1), minlength=routing.scores.shape[-1])


@settings(max_examples=20)
@given(
    lengths=st.lists(
        st.lists(st.integers(1, TOKENS), max_size=5), min_size=ROWS, max_size=ROWS
    ).filter(any),
    prompt=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 2**16),
)
def test_the_loss_counts_what_follows_in_the_same_conversation(
    tiny, mesh, random_params, forward, loss, lengths, prompt, seed
):
    params, batch = random_params(tiny, mesh), pack(lengths, tiny, seed)
    *both_logits, routings = forward(params, batch)
    total, metrics = loss(params, batch, LossWeights(prompt, 0.5, 0.1))
    expected = 0.0
    parts = zip(both_logits, ("", "mtp_"), (1.0, 0.5), strict=True)
    for ahead, (logits, name, weight) in enumerate(parts, 1):
        losses, right, trained = predictions(logits, batch, ahead)
        expected += weight * mean(losses, np.where(trained, 1.0, prompt))
        assert metrics[f"{name}loss"] == pytest.approx(mean(losses, trained), rel=1e-4, abs=1e-6)
        assert metrics[f"{name}accuracy"] == pytest.approx(mean(right, trained), abs=1e-6)
    balance = sum(expected_balance(routing, batch.segments > 0) for routing in routings)
    assert metrics["balance"] == pytest.approx(balance, rel=1e-4)
    assert total == pytest.approx(expected + 0.1 * balance, rel=1e-4)


def test_loads_count_every_choice_of_tokens_that_are_not_padding(
    tiny, mesh, random_params, forward, loss
):
    params, batch = random_params(tiny, mesh), pack(UNEVEN, tiny)
    _, metrics = loss(params, batch)
    measured = np.concatenate([metrics["load"], metrics["mtp_load"]])
    *_, routings = forward(params, batch)
    valid = batch.segments > 0
    np.testing.assert_array_equal(measured, [expected_load(r, valid) for r in routings])
    assert (measured.sum(-1) == valid.sum() * tiny.num_experts_per_tok).all()


def routing_of(scores, ids) -> Routing:
    return Routing(jnp.asarray(scores, jnp.float32), jnp.asarray(ids, jnp.int32))


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_balance_is_1_where_choices_and_scores_are_even(scale):
    ids = np.arange(2 * 6 * 2).reshape(12, 2) % 4
    even = routing_of(np.full((12, 4), scale), ids)
    assert balance_loss(even, rows=2) == pytest.approx(1.0)


def test_balance_grows_with_the_skew_up_to_the_number_of_experts():
    ids = np.zeros((12, 1))
    measured = []
    for peak in (1.0, 2.0, 10.0, 1e6):
        scores = np.where(np.arange(4) == 0, peak, 1.0) * np.ones((12, 1))
        measured.append(float(balance_loss(routing_of(scores, ids), rows=2)))
    assert measured[0] == pytest.approx(1.0), "any choice is as good among even scores"
    assert measured == sorted(set(measured))
    assert measured[-1] == pytest.approx(4.0, rel=1e-4)


def test_balance_is_a_matter_of_each_row():
    """Two rows that each use one expert are as skewed as can be, though their sum is even."""
    ids = np.repeat([0, 1], 6)[:, None]
    scores = np.eye(2)[ids[:, 0]] + 1e-6
    assert balance_loss(routing_of(scores, ids), rows=2) == pytest.approx(2.0, rel=1e-4)
    assert balance_loss(routing_of(scores, ids), rows=1) == pytest.approx(1.0, rel=1e-4)


@settings(max_examples=15)
@given(kept=st.lists(st.integers(0, 6), min_size=2, max_size=2), seed=st.integers(0, 2**16))
def test_padding_counts_neither_for_balance_nor_as_load(kept, seed):
    rng = np.random.default_rng(seed)
    scores = rng.random((12, 4)) + 0.1
    valid = np.arange(6) < np.array(kept)[:, None]
    ids = np.argsort(rng.random((12, 4)))[:, :2]
    routing = routing_of(scores, np.where(valid.reshape(12, 1), ids, 4))
    expected = expected_balance(routing, valid)
    assert balance_loss(routing, rows=2) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(loads([routing])[0], expected_load(routing, valid))


def test_gradients_are_the_slope_of_the_loss(tiny, mesh, random_params, loss, gradients):
    params, batch = random_params(tiny, mesh), pack(UNEVEN, tiny)
    rng = np.random.default_rng(5)
    values, shardings = jax.tree.map(np.asarray, params), jax.tree.map(lambda p: p.sharding, params)
    noisy = jax.tree.map(lambda g: g * rng.uniform(0, 2, g.shape), gradients)
    step = 1e-3 / float(optax.tree.norm(noisy))
    ends = []
    for sign in (1, -1):
        moved = jax.tree.map(lambda p, d, s=sign: np.float32(p + s * step * d), values, noisy)
        ends.append(float(loss(jax.device_put(moved, shardings), batch)[0]))
    products = jax.tree.map(lambda g, d: float(np.vdot(g, d)), gradients, noisy)
    slope = sum(jax.tree.leaves(products))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_every_parameter_but_the_correction_bias_has_a_gradient(gradients):
    without = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, gradient in jax.tree.leaves_with_path(gradients)
        if not np.any(gradient)
    ]
    bias = "vectors/e_score_correction_bias"
    assert without == [f"model/{bias}", f"mtp/{bias}"]


def assert_close(got, expected) -> None:
    """Leaf by leaf, to a part in 10,000 of the leaf's largest value."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        atol = 1e-4 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol, err_msg=str(path))


def test_two_devices_compute_what_one_does(
    tiny, mesh, random_params, loss, loss_on, gradients, gradients_on
):
    """The first device's rows hold more tokens than the second's."""
    batch, two = pack(UNEVEN, tiny), make_mesh(MeshConfig(data=2))
    assert (batch.segments[:2] > 0).sum() != (batch.segments[2:] > 0).sum()
    expected = loss(random_params(tiny, mesh), batch)
    assert_close(loss_on(two)(random_params(tiny, two), batch), expected)
    assert_close(gradients_on(two, random_params(tiny, two), batch), gradients)
