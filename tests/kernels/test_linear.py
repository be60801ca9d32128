"""FP8 rows and products against what their values and scales stand for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import quantize_rows, scaled_linear

KERNELS = Backend("triton", interpret=True)
BACKENDS = st.sampled_from([REF, KERNELS])
few = settings(deadline=None, max_examples=8)


def meaning(values, scale, block):
    """float64 of FP8 [..., K] and scales [..., B]."""
    columns = values.shape[-1]
    wide = np.repeat(np.asarray(scale, np.float64), block or columns, axis=-1)[..., :columns]
    return np.asarray(values, np.float64) * wide


@few
@given(
    tokens=st.integers(1, 9),
    columns=st.sampled_from([1, 7, 96, 128, 300, 520]),
    block=st.sampled_from([None, 4, 6, 128]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    backend=BACKENDS,
    seed=st.integers(0, 99),
)
@example(tokens=3, columns=20, block=6, dtype=jnp.float32, backend=KERNELS, seed=1)
def test_each_row_and_block_fills_the_range_of_fp8(tokens, columns, block, dtype, backend, seed):
    rng = np.random.default_rng(seed)
    spread = 10.0 ** rng.integers(-6, 7, (tokens, columns))
    x = rng.standard_normal((tokens, columns)) * spread * (rng.random((tokens, 1)) > 0.2)
    x = jnp.asarray(x, dtype)
    values, scale = quantize_rows(x, block, backend=backend)
    assert values.dtype == jnp.float8_e4m3fn
    assert values.shape == x.shape
    size = block or columns
    assert scale.shape == (tokens, -(-columns // size))
    wide = np.asarray(x, np.float64)
    for b in range(scale.shape[1]):
        part = wide[:, b * size : (b + 1) * size]
        peak = np.abs(part).max(-1)
        np.testing.assert_allclose(scale[:, b], np.where(peak > 0, peak / 448, 1), rtol=1e-6)
        got = meaning(values[:, b * size : (b + 1) * size], scale[:, b : b + 1], None)
        # Half a step: of 4 bits of significand, or of the smallest exponent's.
        step = np.maximum(np.abs(part) / 16, np.asarray(scale)[:, b : b + 1] * 2.0**-10)
        assert np.all(np.abs(got - part) <= step * 1.001)


@pytest.mark.parametrize("backend", [REF, KERNELS], ids=lambda b: b.name)
def test_quantising_never_overflows(backend):
    rng = np.random.default_rng(0)
    x = 2.0 ** rng.uniform(-100, 127, (64, 3)) * (1 + rng.random((64, 3)) * 0.9)
    values, _ = quantize_rows(jnp.asarray(x, jnp.float32), backend=backend)
    values = np.asarray(values, np.float32)
    assert np.all(np.isfinite(values))
    assert np.all(values.max(-1) == 448)


@few
@given(
    tokens=st.integers(1, 5),
    lead=st.sampled_from([(), (2,), (1, 3)]),
    sizes=st.sampled_from([(16, 32), (7, 48), (16, 40), (3, 10)]),
    block=st.sampled_from([None, 16]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    seed=st.integers(0, 99),
)
def test_fp8_products_scale_by_token_and_channel(tokens, lead, sizes, block, dtype, seed):
    check_product(REF, tokens, lead, sizes, block, dtype, seed)


@pytest.mark.parametrize("block", [None, 32])
@pytest.mark.parametrize("sizes", [(8, 32), (9, 72)])
def test_products_that_cublaslt_lacks_run_as_one_expert(sizes, block):
    check_product(KERNELS, 3, (2,), sizes, block, jnp.float32, 0)


def check_product(backend, tokens, lead, sizes, block, dtype, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, sizes[1])) * 10.0 ** rng.integers(-3, 4, (tokens, 1))
    x = jnp.asarray(x * (np.arange(tokens) != 1)[:, None], dtype)
    flat = rng.standard_normal((int(np.prod(lead)) * sizes[0], sizes[1]))
    values, scale = quantize_rows(jnp.asarray(flat, jnp.float32), block)
    weight = meaning(values, scale, block)
    values, scale = (array.reshape(*lead, sizes[0], -1) for array in (values, scale))
    rows = quantize_rows(x, block)
    expected = (meaning(*rows, block) @ weight.T).reshape(tokens, *lead, sizes[0])
    got = scaled_linear(x, values, scale, block, out_dtype=dtype, backend=backend)
    assert got.dtype == dtype
    size = np.abs(np.asarray(x, np.float64)).max(-1).reshape(-1, *[1] * (len(lead) + 1))
    bound = size * sizes[1] * (1e-6 if dtype == jnp.float32 else 2**-8)
    assert np.all(np.abs(np.asarray(got, np.float64) - expected) <= bound + 1e-30)
    again = scaled_linear(rows, values, scale, block, out_dtype=jnp.float32, backend=backend)
    assert again.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(again, np.float64) - expected) <= bound + 1e-30)


def test_a_products_rows_do_not_depend_on_each_other():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, 32)), jnp.bfloat16)
    values, scale = quantize_rows(jnp.asarray(rng.standard_normal((16, 32)), jnp.float32))
    product = jax.jit(lambda x: scaled_linear(x, values, scale, out_dtype=jnp.float32))
    together = product(x)
    alone = jnp.concatenate([product(x[t : t + 1]) for t in range(4)])
    np.testing.assert_allclose(together, alone, rtol=1e-6)
