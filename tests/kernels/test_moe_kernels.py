"""The expert MLP from kernels, in the interpreter, against plain jax.numpy and a loop."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Backend
from pallas_kernels.dispatch import padded_rows
from pallas_kernels.linear import QuantRows, quantize_rows
from pallas_kernels.moe import grouped_mlp

TRITON = Backend("triton", interpret=True)
HIDDEN, WIDTH, EXPERTS = 32, 16, 5
ERRORS = {jnp.float32: 1e-5, jnp.bfloat16: 2**-6}  # of the largest value

ref = jax.jit(grouped_mlp, static_argnames="block")
kernels = jax.jit(partial(grouped_mlp, backend=TRITON), static_argnames="block")


def draw_inputs(rng, pattern: str, tokens: int, k: int, dtype):
    """x, ids, weights, gate_up, down."""
    ids = np.argsort(rng.random((tokens, EXPERTS)), axis=1)[:, :k].astype(np.int32)
    if pattern == "hot":
        ids[:] = np.arange(k) + 1
    if pattern == "padding":
        ids[tokens // 2 :] = EXPERTS
    shapes = (tokens, HIDDEN), (EXPERTS, 2, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    x, gate_up, down = (jnp.asarray(rng.standard_normal(s), dtype) for s in shapes)
    weights = jnp.asarray(rng.random((tokens, k)), jnp.float32)
    return x, jnp.asarray(ids), weights, gate_up, down


def assert_near(got, expected, error: float) -> None:
    assert got.dtype == expected.dtype
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(got, expected, rtol=0, atol=error * (1 + np.abs(expected).max()))


def quantised(weight, block: int | None):
    """FP8 values of weight [..., K] and scales [..., B]."""
    values, scale = quantize_rows(weight.reshape(-1, weight.shape[-1]), block)
    return values.reshape(weight.shape), scale.reshape(*weight.shape[:-1], -1)


@settings(max_examples=12)
@given(
    sizes=st.sampled_from([(1, 2), (7, 3)]),
    pattern=st.sampled_from(["random", "hot", "padding"]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
    with_shared=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_kernels_equal_plain_jax(sizes, pattern, dtype, with_shared, seed):
    rng = np.random.default_rng(seed)
    inputs = draw_inputs(rng, pattern, *sizes, dtype)
    shared = jnp.asarray(rng.standard_normal(inputs[0].shape), dtype) if with_shared else None
    expected = ref(*inputs, shared=shared)
    assert_near(kernels(*inputs, shared=shared), expected, ERRORS[dtype])


@pytest.mark.parametrize("block", [None, 16])
@pytest.mark.parametrize("given_rows", [False, True])
def test_fp8_kernels_equal_plain_jax(block, given_rows):
    rng = np.random.default_rng(0)
    x, ids, weights, gate_up, down = draw_inputs(rng, "padding", 6, 3, jnp.bfloat16)
    (gate_up, gate_up_scale), (down, down_scale) = (quantised(w, block) for w in (gate_up, down))
    arrays = x, ids, weights, gate_up, down, gate_up_scale, down_scale
    rows = quantize_rows(x, block) if given_rows else None
    expected = ref(*arrays, shared=x, block=block)
    assert np.abs(np.asarray(expected - x, np.float32)).max() > 1
    # Between the products values are rounded to FP8: a step apart where bfloat16 was.
    assert_near(kernels(*arrays, shared=x, quantized=rows, block=block), expected, 2**-4)


def test_rows_that_are_quantised_already_are_what_experts_get():
    rng = np.random.default_rng(1)
    x, ids, weights, gate_up, down = draw_inputs(rng, "random", 3, 2, jnp.float32)
    (gate_up, gate_up_scale), (down, down_scale) = (quantised(w, None) for w in (gate_up, down))
    arrays = ids, weights, gate_up, down, gate_up_scale, down_scale
    values, scale = quantize_rows(x)
    other = kernels(x, *arrays, quantized=QuantRows(values, 2 * scale))
    assert_near(other, ref(2 * x, *arrays), 2**-4)


@pytest.mark.parametrize(("ways", "block_rows"), [(1, 64), (8, 16)])
def test_tiles_are_those_of_the_rows_that_a_device_expects(ways, block_rows):
    """Of 160 tokens with 2 choices, or of an eighth of those, on 5 experts."""
    inputs = draw_inputs(np.random.default_rng(3), "random", 160, 2, jnp.float32)
    run = partial(grouped_mlp, ways=ways, backend=TRITON)
    padded = padded_rows(320, EXPERTS, block_rows)
    text = str(jax.make_jaxpr(run)(*inputs))
    assert f"f32[{padded},{HIDDEN}]" in text
    assert f"i32[{padded // block_rows}]" in text


@pytest.mark.parametrize("pattern", ["hot", "random"])
def test_more_rows_than_expected_are_computed_too(pattern):
    inputs = draw_inputs(np.random.default_rng(4), pattern, 40, 2, jnp.float32)
    got = jax.jit(partial(grouped_mlp, ways=8, backend=TRITON))(*inputs)
    assert_near(got, ref(*inputs), ERRORS[jnp.float32])


def test_rows_are_independent_of_the_rest_of_the_batch():
    rng = np.random.default_rng(2)
    x, ids, *rest = draw_inputs(rng, "random", 7, 3, jnp.float32)
    together = kernels(x, ids, *rest)
    alone = jnp.where(jnp.arange(7)[:, None] == 4, ids, EXPERTS)
    np.testing.assert_array_equal(kernels(x, alone, *rest)[4], together[4])
    loud = jnp.where(jnp.arange(7)[:, None] == 4, x, jnp.nan)
    np.testing.assert_array_equal(kernels(loud, ids, *rest)[4], together[4])
