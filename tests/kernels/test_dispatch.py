"""Dispatch against a loop over routed rows; kernels run in the interpreter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import dispatch_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.dispatch import align, combine, gather_rows, padded_rows
from pallas_kernels.linear import QuantRows

FP8 = jnp.float8_e4m3fn
TRITON = Backend("triton", interpret=True)
aligned = jax.jit(align, static_argnums=(1, 2), static_argnames="backend")
combined = jax.jit(combine, static_argnames=("dtype", "backend"))
BACKENDS = pytest.mark.parametrize("backend", [REF, TRITON], ids=lambda b: b.name)


def draw_ids(rng, pattern: str, tokens: int, k: int, experts: int) -> np.ndarray:
    """int32 [tokens, k]; "hot": all have the last expert; "padding": some tokens have none."""
    k = min(k, experts)
    ids = np.argsort(rng.random((tokens, experts)), axis=1)[:, :k].astype(np.int32)
    if pattern == "hot":
        ids[:] = experts - 1 - np.arange(k)
    if pattern == "padding":
        ids[rng.random(tokens) < 0.5] = experts + rng.integers(0, 2)
    if pattern == "all padding":
        ids[:] = experts
    return ids


def align_loop(ids, experts: int, block_rows: int, size: int):
    """Rows, places and owners of blocks, filled expert by expert."""
    rows, places, owners = [], np.full(ids.size, size), []
    for expert in range(experts):
        for row in np.flatnonzero(ids.reshape(-1) == expert):
            places[row] = len(rows)
            rows.append(row)
        rows += [ids.size] * (-len(rows) % block_rows)
        owners += [expert] * (len(rows) // block_rows - len(owners))
    return rows + [ids.size] * (size - len(rows)), places.reshape(ids.shape), owners


# Tokens, k, experts and rows a block. Few, because each is compiled.
SIZES = st.sampled_from([(1, 8, 160, 8), (13, 1, 2, 4), (13, 3, 5, 1), (6, 8, 20, 16)])
PATTERNS = st.sampled_from(["random", "hot", "padding", "all padding"])
SEEDS = st.integers(0, 2**16)


def assert_aligned(ids, experts: int, block_rows: int, backend: Backend, run=aligned) -> None:
    got = run(jnp.asarray(ids), experts, block_rows, backend=backend)
    size = padded_rows(ids.size, experts, block_rows)
    rows, places, owners = align_loop(ids, experts, block_rows, size)
    assert len(rows) == size, "the routing does not fit"
    assert got.num_blocks.tolist() == [len(owners)]
    np.testing.assert_array_equal(got.rows, rows)
    np.testing.assert_array_equal(got.places, places)
    assert got.experts.shape == (size // block_rows,)
    assert got.experts[: len(owners)].tolist() == owners
    assert np.all((got.experts >= 0) & (got.experts < experts)), "kernels may read any block's"


@BACKENDS
@settings(max_examples=20)
@given(sizes=SIZES, pattern=PATTERNS, seed=SEEDS)
def test_each_experts_rows_lie_in_whole_blocks(backend, sizes, pattern, seed):
    tokens, k, experts, block_rows = sizes
    ids = draw_ids(np.random.default_rng(seed), pattern, tokens, k, experts)
    assert_aligned(ids, experts, block_rows, backend)


@pytest.mark.parametrize("pattern", ["random", "hot", "padding"])
@pytest.mark.parametrize("counted_by_all", [0, 1024])
def test_many_rows_take_several_chunks(monkeypatch, pattern, counted_by_all):
    """Counted by each program for itself, and in a launch of their own."""
    monkeypatch.setattr(dispatch_triton, "COUNTED_BY_ALL", counted_by_all)
    monkeypatch.setattr(dispatch_triton, "CHUNK", 16)
    monkeypatch.setattr(dispatch_triton, "FILL", 4)
    ids = draw_ids(np.random.default_rng(0), pattern, 41, 3, 7)
    assert_aligned(ids, 7, 8, TRITON, run=align)  # not one compiled before


@settings(max_examples=200)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=8),
    block_rows=st.sampled_from([1, 8, 16]),
)
def test_every_routing_has_places_enough(counts, block_rows):
    taken = sum(-(-count // block_rows) * block_rows for count in counts)
    size = padded_rows(sum(counts), len(counts), block_rows)
    assert size >= taken
    assert size % block_rows == 0
    assert size <= block_rows * sum(counts)


def test_one_row_an_expert_needs_a_block_each():
    assert padded_rows(8, 160, 16) == 8 * 16
    assert padded_rows(32768, 160, 128) == (32768 // 128 + 158) * 128


@BACKENDS
@pytest.mark.parametrize("width", [32, 37])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_are_gathered_and_padding_is_zero(backend, width, dtype):
    rng = np.random.default_rng(0)
    ids = draw_ids(rng, "padding", 9, 3, 5)
    alignment = align(jnp.asarray(ids), 5, 4)
    x = jnp.asarray(rng.standard_normal((9, width)), dtype)
    got = gather_rows(x, alignment, 3, backend=backend)
    assert got.dtype == dtype
    for row, values in zip(alignment.rows.tolist(), np.asarray(got, np.float32), strict=True):
        expected = np.zeros(width) if row == ids.size else np.asarray(x[row // 3], np.float32)
        np.testing.assert_array_equal(values, expected)


@BACKENDS
@pytest.mark.parametrize("blocks", [1, 3])
def test_scales_are_gathered_with_their_rows(backend, blocks):
    rng = np.random.default_rng(1)
    ids = draw_ids(rng, "padding", 7, 2, 5)
    alignment = align(jnp.asarray(ids), 5, 4)
    values = jnp.asarray(rng.standard_normal((7, 24)), jnp.float32).astype(FP8)
    scale = jnp.asarray(rng.random((7, blocks)), jnp.float32)
    got = gather_rows(QuantRows(values, scale), alignment, 2, backend=backend)
    assert got.values.dtype == FP8
    live = np.asarray(alignment.rows) < ids.size
    tokens = np.asarray(alignment.rows)[live] // 2
    as_floats = np.asarray(got.values.astype(jnp.float32))
    np.testing.assert_array_equal(as_floats[live], values.astype(jnp.float32)[tokens])
    np.testing.assert_array_equal(np.asarray(got.scale)[live], scale[tokens])
    assert live.any()
    assert not live.all()
    assert not as_floats[~live].any()
    assert np.all(np.asarray(got.scale)[~live] == 1)


@BACKENDS
@settings(max_examples=20)
@given(
    sizes=st.sampled_from([(1, 8), (5, 3)]),
    pattern=PATTERNS,
    with_shared=st.booleans(),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float32]),
    seed=SEEDS,
)
def test_choices_are_summed_by_weight(backend, sizes, pattern, with_shared, dtype, seed):
    tokens, k = sizes
    rng = np.random.default_rng(seed)
    ids = draw_ids(rng, pattern, tokens, k, 11)
    places = np.asarray(aligned(jnp.asarray(ids), 11, 4).places)
    weights = rng.random(ids.shape).astype(np.float32)
    size = padded_rows(ids.size, 11, 4)
    out = rng.standard_normal((size, 20)).astype(np.float32)
    shared = rng.standard_normal((tokens, 20)).astype(np.float32) if with_shared else 0 * out[:1]
    out, shared = (np.array(jnp.asarray(a, dtype), np.float32) for a in (out, shared))
    routed = np.zeros((tokens, 20))
    for (t, j), place in np.ndenumerate(places):
        routed[t] += weights[t, j] * out[place] if place < size else 0
    dead = np.setdiff1d(np.arange(size), places)
    out[dead] = np.nan  # what nobody computed
    weights[places >= size] = np.nan
    arrays = jnp.asarray(out, dtype), jnp.asarray(places), jnp.asarray(weights)
    beside = jnp.asarray(shared, dtype) if with_shared else None
    got = combined(*arrays, beside, dtype=dtype, backend=backend)
    assert got.dtype == dtype
    error = 1e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
        np.asarray(got, np.float32), routed + shared, atol=error * (1 + np.abs(routed).max())
    )


@BACKENDS
def test_the_sum_is_rounded_before_the_shared_expert_is_added(backend):
    out = jnp.array([[1.0], [2.0**-8]], jnp.float32)  # their sum is a tie in bfloat16
    shared = jnp.array([[2.0**-8]], jnp.bfloat16)
    places, weights = jnp.array([[0, 1]]), jnp.ones((1, 2), jnp.float32)
    got = combine(out, places, weights, shared, dtype=jnp.bfloat16, backend=backend)
    expected = jnp.bfloat16(1 + 2.0**-8) + jnp.bfloat16(2.0**-8)
    assert got.dtype == jnp.bfloat16
    assert float(got[0, 0]) == float(expected) == 1.0


@BACKENDS
def test_columns_beyond_one_programs_are_combined(monkeypatch, backend):
    monkeypatch.setattr(dispatch_triton, "COMBINE_COLUMNS", 16)
    out = jnp.arange(3 * 37, dtype=jnp.float32).reshape(3, 37)
    got = combine(
        out, jnp.array([[2, 0]]), jnp.ones((1, 2)), None, dtype=jnp.float32, backend=backend
    )
    np.testing.assert_array_equal(got, (out[2] + out[0])[None])


def test_nothing_is_sorted():
    ids = jax.ShapeDtypeStruct((64, 8), jnp.int32)
    for backend in (REF, TRITON):
        program = jax.jit(lambda ids, b=backend: align(ids, 16, 8, backend=b)).lower(ids)
        assert "stablehlo.sort" not in program.as_text()
