"""The three grouped matmul kernels against their oracle, in Pallas' interpreters."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.backend import Backend
from pallas_kernels.grouped_decode import grouped_decode
from pallas_kernels.grouped_matmul import GroupedTile, choose_tiles, grouped_matmul

FP8, BF16, F32 = (jnp.dtype(name) for name in ("float8_e4m3fn", "bfloat16", "float32"))
TRITON = GroupedTile("triton", block_rows=4, block_n=16, block_k=16, stages=1)
DECODE = GroupedTile("decode", block_rows=8, block_n=64, block_k=32, stages=2)
PREFILL = GroupedTile("prefill", block_rows=64, block_n=64, block_k=32, stages=2)
ROUTED = {
    "an empty expert": (0, 2, 2),
    "one hot expert": (1, 1, 1),
    "all experts": (0, 1, 2),
}


def inputs(tile, dtype, N, K, experts, num_blocks, block=None, seed=0):
    """Row 0 is not finite: it must spoil no other."""
    rng = np.random.default_rng(seed)
    P, E = len(experts) * tile.block_rows, 3
    x, w = (
        jnp.asarray(rng.standard_normal(shape), F32).astype(dtype) for shape in ((P, K), (E, N, K))
    )
    x = x.at[0, 0].set(jnp.nan)
    places = jnp.array(experts, jnp.int32), jnp.array([num_blocks], jnp.int32)
    blocks = 1 if block is None else -(-K // block)
    scales = [
        jnp.asarray(rng.uniform(0.5, 2, shape), F32) for shape in ((P, blocks), (E, N, blocks))
    ]
    return x, w, *places, *(scales if dtype == FP8 else (None, None))


def run(tile, arrays, backend, block, out_dtype):
    *arrays, x_scale, w_scale = arrays
    return grouped_matmul(
        *arrays,
        tile,
        x_scale=x_scale,
        w_scale=w_scale,
        block=block,
        out_dtype=out_dtype,
        backend=backend,
    )


def check(tile, dtype, N, K, experts, num_blocks, block=None, out_dtype=F32):
    arrays = inputs(tile, dtype, N, K, experts, num_blocks, block)
    name = "triton" if tile.kernel == "triton" else "mosaic"
    got = jax.jit(
        lambda *a: run(tile, a, Backend(name, interpret=True), block, out_dtype),
    )(*arrays)
    expected = run(tile, arrays, Backend(), block, out_dtype)
    assert got.dtype == expected.dtype == out_dtype
    assert got.shape == (arrays[0].shape[0], N)
    live = slice(num_blocks * tile.block_rows)
    tolerance = 1e-5 if out_dtype == F32 else 1e-2
    scale = float(jnp.nanmax(jnp.abs(expected.astype(F32))))
    assert np.isnan(expected[:1].astype(F32)).all() or num_blocks == 0
    np.testing.assert_allclose(
        got[live].astype(F32), expected[live].astype(F32), rtol=tolerance, atol=tolerance * scale
    )


@settings(max_examples=5, deadline=None)
@given(
    columns=st.sampled_from([5, 16, 40]),
    depth=st.sampled_from([7, 32, 40]),
    dtype=st.sampled_from([FP8, BF16, F32]),
    experts=st.sampled_from(sorted(ROUTED.values())),
    live=st.integers(1, 3),
)
def test_triton_masks_the_tails_of_any_size(columns, depth, dtype, experts, live):
    check(TRITON, dtype, columns, depth, experts, live)


@pytest.mark.parametrize(("depth", "step"), [(48, 16), (40, 16), (40, 8), (7, 8)])
def test_triton_scales_blocks(depth, step):
    tile = replace(TRITON, block_k=step)
    check(tile, FP8, 20, depth, (2, 0, 1), 3, block=16)


def test_triton_says_which_steps_do_not_divide_blocks():
    with pytest.raises(ValueError, match="steps of 16 columns do not divide blocks of 24"):
        check(TRITON, FP8, 20, 48, (2, 0, 1), 3, block=24)


@pytest.mark.parametrize("routed", sorted(ROUTED))
def test_decode_multiplies_fp8(routed):
    check(DECODE, FP8, 128, 96, ROUTED[routed], 3)


def test_decode_multiplies_bfloat16_and_leaves_dead_blocks():
    check(replace(DECODE, stages=3), BF16, 64, 160, (2, 0, 99), 2, out_dtype=BF16)


def test_decode_of_no_rows_at_all():
    check(DECODE, BF16, 64, 32, (99,), 0)


def test_decode_shares_out_tiles():
    x, w, *places, x_scale, w_scale = arrays = inputs(DECODE, FP8, 128, 64, (2, 0, 1), 3)
    got = grouped_decode(
        x,
        w,
        *places,
        (x_scale[:, 0], w_scale[..., 0]),
        block_rows=8,
        block_n=64,
        block_k=32,
        stages=2,
        out_dtype=F32,
        processors=4,
        interpret=True,
    )
    np.testing.assert_allclose(got, run(DECODE, arrays, Backend(), None, F32), rtol=1e-3, atol=1e-3)


def test_prefill_splits_rows_between_warpgroups_and_wide_tiles_into_products():
    check(replace(PREFILL, block_rows=128, block_n=192), FP8, 192, 64, (1, 2, 99), 2)


def test_prefill_splits_columns_of_short_blocks():
    check(PREFILL, BF16, 128, 96, (0, 2), 2, out_dtype=BF16)


@pytest.mark.parametrize("name", ["triton", "mosaic"])
def test_chosen_tiles_multiply_the_smallest_model(name):
    shapes = (3, 192, 160), (3, 160, 96)
    backend = Backend(name, interpret=True)
    for tile, (_, N, K) in zip(choose_tiles(8, *shapes, BF16, backend), shapes, strict=True):
        check(tile, BF16, N, K, (0, 2), 2)


def test_sums_of_long_rows_are_float32():
    """As long as the largest model's: an error of bfloat16 sums would be thousandfold."""
    tile = replace(DECODE, block_k=1280)
    check(tile, FP8, 64, 5120, (2,), 1)
