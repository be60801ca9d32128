"""Gradients of the grouped experts against a dense derivation in float64 numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels.moe import grouped_mlp

HIDDEN, WIDTH = 5, 3


def dense_gradients(x, ids, weights, gate_up, down, cotangent):
    """Every token through every expert: gradients of x, weights, gate_up and down."""
    chosen = ids[..., None] == np.arange(len(gate_up))
    share = np.einsum("tk,tke->te", weights, chosen)
    gate, up = np.einsum("ecfd,td->cetf", gate_up, x)
    sigmoid = 1 / (1 + np.exp(-gate))
    hidden = gate * sigmoid * up
    d_share = np.einsum("td,edf,etf->te", cotangent, down, hidden)
    d_hidden = np.einsum("te,td,edf->etf", share, cotangent, down)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_both = np.stack([d_gate, d_hidden * gate * sigmoid])
    return (
        np.einsum("cetf,ecfd->td", d_both, gate_up),
        np.einsum("te,tke->tk", d_share, chosen),
        np.einsum("cetf,td->ecfd", d_both, x),
        np.einsum("te,td,etf->edf", share, cotangent, hidden),
    )


@jax.jit
def gradients(x, ids, weights, gate_up, down, cotangent):
    def run(x, weights, gate_up, down):
        return grouped_mlp(x, ids, weights, gate_up, down)

    return jax.vjp(run, x, weights, gate_up, down)[1](cotangent)


def draw_inputs(rng, tokens: int, top_k: int, experts: int):
    """x, weights, gate_up, down and a cotangent, float32."""
    shapes = (
        (tokens, HIDDEN),
        (tokens, top_k),
        (experts, 2, WIDTH, HIDDEN),
        (experts, HIDDEN, WIDTH),
        (tokens, HIDDEN),
    )
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def assert_gradients_are_dense(inputs, ids):
    x, *rest = inputs
    expected = dense_gradients(*(np.float64(a) if a is not ids else a for a in (x, ids, *rest)))
    for got, exact in zip(gradients(x, ids, *rest), expected, strict=True):
        np.testing.assert_allclose(got, exact, rtol=1e-4, atol=1e-4 * max(1, np.abs(exact).max()))


def assign(rng, pattern: str, tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Distinct experts for each token, int32 [tokens, top_k]."""
    if pattern == "balanced":
        return (np.arange(tokens * top_k, dtype=np.int32) % experts).reshape(tokens, top_k)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)
    if pattern == "one expert":
        ids[:] = np.arange(top_k)
    if pattern == "padding":
        ids[rng.random(tokens) < 0.5] = experts
    return ids


@settings(max_examples=25)
@given(
    tokens=st.sampled_from([1, 30, 520]),
    pattern=st.sampled_from(["balanced", "random", "one expert", "padding"]),
    seed=st.integers(0, 2**16),
)
def test_gradients_are_those_of_dense_experts_whatever_the_load(tokens, pattern, seed):
    rng = np.random.default_rng(seed)
    inputs = draw_inputs(rng, tokens, 2, 6)
    assert_gradients_are_dense(inputs, assign(rng, pattern, tokens, 2, 6))


def test_no_load_is_one_too_many_for_its_buffer():
    """The busiest of 64 experts gets from 8, an even share, to 34 of 512 tokens."""
    rng = np.random.default_rng(0)
    inputs = draw_inputs(rng, 512, 1, 64)
    for busiest in range(8, 35):
        ids = assign(rng, "balanced", 512, 1, 64)
        ids[rng.choice(np.flatnonzero(ids), busiest - 8, replace=False)] = 0
        assert np.bincount(ids[:, 0]).max() == busiest
        assert_gradients_are_dense(inputs, ids)


def test_padding_gives_and_gets_no_gradient():
    rng = np.random.default_rng(1)
    x, *rest, cotangent = draw_inputs(rng, 40, 2, 6)
    ids = assign(rng, "random", 40, 2, 6)
    ids[7:] = 6
    d_x, d_weights, *d_experts = gradients(x, ids, *rest, cotangent)
    assert not np.any(d_x[7:])
    assert not np.any(d_weights[7:])
    loud = np.where(np.arange(40)[:, None] < 7, cotangent, 1000)
    for got, expected in zip(gradients(x, ids, *rest, loud)[2:], d_experts, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert np.any(expected)


def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(2)
    x, *rest, _ = draw_inputs(rng, 12, 2, 4)
    ids = jnp.asarray(assign(rng, "random", 12, 2, 4))

    @jax.jit
    def run(x, weights, gate_up, down):
        return grouped_mlp(x, ids, weights, gate_up, down)

    check_grads(run, (x, *rest), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2)


def test_the_value_is_the_same_where_it_is_differentiated():
    rng = np.random.default_rng(3)
    x, *rest, _ = draw_inputs(rng, 40, 2, 6)
    ids = assign(rng, "padding", 40, 2, 6)
    plain = grouped_mlp(x, ids, *rest)
    differentiated, _ = jax.vjp(lambda x, *rest: grouped_mlp(x, ids, *rest), x, *rest)
    np.testing.assert_array_equal(differentiated, plain)
    assert np.any(plain)
