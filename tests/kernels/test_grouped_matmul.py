"""Grouped matmul: its oracle against loops, which kernel a shape gets, and the schedule."""

from __future__ import annotations

import logging
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import mosaic, tiles
from pallas_kernels.backend import Backend
from pallas_kernels.grouped_decode import own_steps, place
from pallas_kernels.grouped_matmul import (
    GroupedTile,
    choose_tiles,
    grouped_matmul,
    misfit,
    stages_that_fit,
)
from pallas_kernels.grouped_prefill import parts, warpgroup_tile

FP8, BF16 = jnp.dtype("float8_e4m3fn"), jnp.dtype("bfloat16")
MOSAIC, TRITON = Backend("mosaic"), Backend("triton")
SMALL = GroupedTile("triton", block_rows=4, block_n=16, block_k=16, stages=1)

SPLITS = {
    f"{name} {split}": (experts, hidden, width)
    for name, E, hidden, F in (("air", 128, 4096, 1408), ("355b", 160, 5120, 1536))
    for split, experts, width in (
        *((f"tp{n}", E, F // n) for n in (1, 2, 4, 8)),
        ("ep8", E // 8, F),
    )
}


def shapes(split):
    experts, hidden, width = SPLITS[split]
    return (experts, 2 * width, hidden), (experts, hidden, width)


def product_loop(x, w, experts, num_blocks, rows, x_scale, w_scale, block):
    out = np.zeros((x.shape[0], w.shape[1]))
    for p in range(num_blocks * rows):
        e = experts[p // rows]
        for b in range(x_scale.shape[1]):
            at = slice(b * block, (b + 1) * block)
            out[p] += (w[e][:, at] @ x[p, at]) * x_scale[p, b] * w_scale[e, :, b]
    return out


@settings(max_examples=8, deadline=None)
@given(
    columns=st.integers(1, 9),
    depth=st.integers(1, 9),
    block=st.sampled_from([None, 2, 4]),
    experts=st.sampled_from([(0, 1, 2, 2), (1, 1, 1, 1), (2, 99, 99, 99)]),
    live=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_the_oracle_equals_loops(columns, depth, block, experts, live, seed):
    rng = np.random.default_rng(seed)
    live = min(live, 1) if 99 in experts else live  # no block beyond has an expert
    x, w = rng.standard_normal((16, depth)), rng.standard_normal((3, columns, depth))
    blocks = 1 if block is None else -(-depth // block)
    x_scale, w_scale = rng.random((16, blocks)), rng.random((3, columns, blocks))
    got = grouped_matmul(
        *(jnp.asarray(a, jnp.float32) for a in (x, w)),
        jnp.array(experts, jnp.int32),
        jnp.array([live], jnp.int32),
        SMALL,
        x_scale=jnp.asarray(x_scale, jnp.float32),
        w_scale=jnp.asarray(w_scale, jnp.float32),
        block=block,
        out_dtype=jnp.float32,
    )
    expected = product_loop(x, w, experts, live, 4, x_scale, w_scale, block or depth)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_rows_must_be_those_of_the_blocks():
    x, w = jnp.zeros((8, 4)), jnp.zeros((1, 2, 4))
    with pytest.raises(ValueError, match="8 rows are not 3 blocks of 4"):
        grouped_matmul(x, w, jnp.zeros(3, jnp.int32), jnp.ones(1, jnp.int32), SMALL)


def test_a_kernel_says_why_it_cannot_multiply():
    x, w = jnp.zeros((8, 32), BF16), jnp.zeros((1, 96, 32), BF16)
    tile = GroupedTile("decode", 8, 64, 32, stages=2)
    inputs = x, w, jnp.zeros(1, jnp.int32), jnp.ones(1, jnp.int32), tile
    with pytest.raises(ValueError, match="N = 96 is not divisible by 64"):
        grouped_matmul(*inputs, backend=MOSAIC)


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from(sorted(SPLITS)),
    dtype=st.sampled_from([FP8, BF16]),
    backend=st.sampled_from([MOSAIC, TRITON]),
    rows=st.integers(8, 65536),
    block=st.sampled_from([None, 128]),
)
def test_tiles_share_their_rows_and_fit(split, dtype, backend, rows, block):
    chosen = choose_tiles(rows, *shapes(split), dtype, backend, block)
    assert chosen[0].block_rows == chosen[1].block_rows
    for tile, shape in zip(chosen, shapes(split), strict=True):
        if tile.kernel == "triton":
            assert min(tile.block_rows, tile.block_n, tile.block_k) >= 16
            assert block is None or block % tile.block_k == 0
        else:
            assert backend == MOSAIC
            assert block is None
            assert misfit(tile, shape, dtype, block) == ""
            assert 1 <= stages_that_fit(tile, dtype, jnp.float32) <= tile.stages


@pytest.mark.parametrize("dtype", [FP8, BF16])
@pytest.mark.parametrize("split", sorted(SPLITS))
def test_tensor_cores_read_official_shapes_unless_experts_are_too_thin(split, dtype):
    decode = [tile.kernel for tile in choose_tiles(64, *shapes(split), dtype, MOSAIC)]
    prefill = [tile.kernel for tile in choose_tiles(32768, *shapes(split), dtype, MOSAIC)]
    thin = split == "air tp8"  # 352 columns; and FP8 rows of 176 bytes
    expected_decode = ["triton" if thin else "decode", "decode"]
    expected_prefill = ["prefill", "prefill"]
    if thin and dtype == FP8:
        expected_decode[1] = expected_prefill[1] = "triton"
    assert (decode, prefill) == (expected_decode, expected_prefill)


def test_float32_and_blocks_of_scales_go_through_triton():
    for dtype, block in ((jnp.float32, None), (FP8, 128)):
        chosen = choose_tiles(512, *shapes("355b tp8"), dtype, MOSAIC, block)
        assert [tile.kernel for tile in chosen] == ["triton", "triton"]


@pytest.mark.parametrize(
    ("rows", "block_rows"), [(1, 8), (1280, 8), (1281, 16), (5121, 64), (10241, 128), (65536, 128)]
)
def test_blocks_hold_an_experts_average_of_rows(rows, block_rows):
    tile, _ = choose_tiles(rows, *shapes("355b tp8"), FP8, MOSAIC)
    assert tile.block_rows == block_rows


def test_what_falls_back_is_logged_once(caplog):
    odd = (3, 72, 4096)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            choose_tiles(8, odd, odd, BF16, MOSAIC)
    [record] = caplog.records
    assert "[3, 72, 4096] runs through Triton: N = 72 is not divisible" in record.message


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"block_n": 96}, "tiles of 96 columns"),
        ({"block_n": 256}, "N = 384"),
        ({"block_k": 96}, "K = 5120"),
        ({"block_k": 20}, "whole products"),
        ({"block_rows": 64}, "blocks have 64 rows"),
        ({"stages": 9}, "shared memory"),
    ],
)
def test_misfits(change, fault):
    tile = GroupedTile("decode", 16, 128, 256, stages=4)
    assert misfit(tile, (160, 384, 5120), FP8, None) == ""
    assert fault in misfit(replace(tile, **change), (160, 384, 5120), FP8, None)


def listed(monkeypatch, *tile_of_n):
    entries = [
        {"when": {"n": n, "backend": "mosaic"}, "tile": {**vars(tile)}} for n, tile in tile_of_n
    ]
    monkeypatch.setattr(tiles, "table", lambda: {"h100": {"grouped_matmul": entries}})


def test_the_table_goes_before_the_rules(monkeypatch):
    wide = GroupedTile("decode", 32, 128, 128, stages=3)
    listed(monkeypatch, (5120, wide))
    gate_up, down = choose_tiles(64, *shapes("355b tp2"), FP8, MOSAIC)
    assert down == wide
    assert gate_up.block_rows == 32


@pytest.mark.parametrize(
    "tile",
    [
        GroupedTile("decode", 32, 192, 128, stages=3),  # no divisor
        GroupedTile("prefill", 32, 128, 128, stages=3),  # no such rows
    ],
)
def test_what_the_table_has_must_fit(monkeypatch, tile):
    listed(monkeypatch, (5120, tile))
    assert tile not in choose_tiles(64, *shapes("355b tp2"), FP8, MOSAIC)


def test_tables_that_disagree_about_rows_give_one(monkeypatch):
    first = GroupedTile("decode", 16, 128, 128, stages=3)
    listed(monkeypatch, (1536, first), (5120, replace(first, block_rows=32)))
    chosen = choose_tiles(64, *shapes("355b tp2"), FP8, MOSAIC)
    assert chosen[0] == first
    assert chosen[1].block_rows == 16


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.integers(0, 9),
    tiles_n=st.integers(1, 4),
    steps_k=st.integers(1, 4),
    processors=st.integers(1, 7),
)
def test_every_tile_is_computed_once_and_in_one_run_of_steps(blocks, tiles_n, steps_k, processors):
    grid = tiles_n, steps_k, processors
    seen = []
    for block in range(processors):
        steps = [place(s, block, grid) for s in range(int(own_steps(blocks, block, grid)))]
        runs = [steps[i : i + steps_k] for i in range(0, len(steps), steps_k)]
        for run in runs:
            assert [k for *_, k in run] == list(range(steps_k))
            assert len({at[:2] for at in run}) == 1
            seen.append(run[0][:2])
    assert sorted(seen) == [(b, n) for b in range(blocks) for n in range(tiles_n)]


@pytest.mark.parametrize("block_rows", [64, 128])
@pytest.mark.parametrize("block_n", range(16, 257, 16))
def test_warpgroups_share_a_tile_in_products_of_whole_columns(block_rows, block_n):
    rows, columns = warpgroup_tile(block_rows, block_n)
    assert 2 * rows * columns == block_rows * block_n
    assert rows == mosaic.WARPGROUP_ROWS
    width, rest = divmod(columns, parts(columns))
    assert rest == 0
    assert width % 8 == 0
    assert width <= 128
