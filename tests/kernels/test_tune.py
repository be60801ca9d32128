"""The tuner without a GPU: candidates, what is chosen and written; and its loop, for real."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import tiles, tune
from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul import GroupedTile, misfit
from pallas_kernels.measure import Program, copies_of, difference, seconds
from pallas_kernels.official import BF16, FP8, LARGE, Case, Sizes, rotate_case
from pallas_kernels.tile_candidates import (
    Part,
    Task,
    attention_tasks,
    attention_tiles,
    grouped_tasks,
    grouped_tiles,
    ranges,
)

TRITON, MOSAIC = Backend("triton", interpret=True), Backend("mosaic")
TINY = Sizes("tiny", hidden=32, experts=2, width=16, kv_heads=1, queries=2, head_dim=16, top_k=1)
QUICK = tune.Settings(copies=2, rounds=1, least_s=0.0)

# An operation whose tile decides what comes out: right, wrong, not at all.


def scale_case(backend: Backend) -> list[Case]:
    def run(backend: Backend, x: jax.Array) -> jax.Array:
        found = tiles.find(backend.device, "scale") if backend.kernels else {"by": 2}
        assert found, "no tile"
        return x * found["by"]

    def inputs(key: jax.Array) -> tuple[jax.Array]:
        return (jax.random.normal(key, (8,)),)

    return [Case("scale", "eight numbers", run, inputs, 64, 8)]


SCALE = Part({}, ({"by": 2}, {"by": 3}, {"by": "nothing"}, {}), scale_case)


def test_only_right_tiles_are_timed(capsys):
    found = tune.measure(Task("scale", "", (SCALE,)), TRITON, QUICK)
    assert found[0].keys() == {0}
    assert found[0][0] > 0
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "dropped by=3",
        "dropped by=nothing",
        "dropped ",
    ]
    assert "wrong by" in said[0]


def test_candidates_leave_the_table_as_it_was():
    with tune.offered("scale", SCALE, TRITON) as backends:
        assert [tiles.find(b.device, "scale") for b in backends] == list(SCALE.tiles)
    assert not [name for name in tiles.table() if "candidate" in name]


def test_a_kernel_is_tuned(tmp_path):
    [task] = [t for t in grouped_tasks(TRITON, [TINY], [2]) if BF16.name in t.label]
    short = replace(task, parts=tuple(replace(part, tiles=part.tiles[:1]) for part in task.parts))
    out = tmp_path / "tiles.json"
    rows = tune.tune([short], TRITON, out, QUICK)
    assert [row["tile"] for row in rows] == [part.tiles[0] for part in task.parts]
    entries = json.loads(out.read_text())["h100"]["grouped_matmul"]
    assert all({"when": p.when, "tile": p.tiles[0]} in entries for p in task.parts)
    assert json.loads(out.read_text())["h100"]["paged_attention"]


def test_nothing_is_written_where_no_tile_works(tmp_path):
    broken = replace(SCALE, tiles=SCALE.tiles[1:])
    assert tune.tune([Task("scale", "", (broken,))], TRITON, tmp_path / "tiles.json", QUICK) == []
    assert list(tmp_path.iterdir()) == []


def test_what_is_updated_in_place_goes_into_the_next_run():
    case = rotate_case(replace(TINY, kv_heads=1), 2, BF16, qk_norm=False)
    program = Program(case, Backend(), copies=2)
    copies = program.inputs()
    first = copies[0][0][2]
    program(copies)
    assert first.is_deleted()
    assert jnp.any(copies[0][0][2] != 0)
    assert program.seconds(copies, rounds=1, least_s=0.0) > 0


# What a difference is


def outputs_case(op: str = "any") -> Case:
    return Case(op, "", lambda *_: None, lambda key: (key,), 0, 0)


@pytest.mark.parametrize(
    ("got", "want", "wrong"),
    [
        (jnp.array([1.0, 2.0]), jnp.array([1.0, 2.001]), False),
        (jnp.array([1.0, 2.0]), jnp.array([1.0, 2.2]), True),
        (jnp.array([jnp.nan, 2.0]), jnp.array([1.0, 2.0]), True),
        (jnp.zeros(3), jnp.zeros(3), False),
        (jnp.arange(3), jnp.arange(3), False),
        (jnp.arange(3), jnp.array([0, 2, 1]), True),
        ((jnp.arange(3), jnp.ones(2)), (jnp.arange(3), jnp.zeros(2)), True),
    ],
)
def test_differences(got, want, wrong):
    assert difference(outputs_case(), (), got, want).wrong is wrong


def test_rows_that_are_not_computed_may_be_anything():
    got, want = jnp.array([[1.0]] * 2 + [[jnp.nan]] * 2), jnp.array([[1.0]] * 2 + [[0.0]] * 2)
    inputs = None, None, jnp.zeros(2, jnp.int32), jnp.array([1])  # one block of two has rows
    assert not difference(outputs_case("grouped_matmul"), inputs, got, want).wrong
    assert difference(outputs_case(), inputs, got, want).wrong


def test_other_shapes_are_no_answer():
    with pytest.raises(ValueError, match=r"float32\(2,\), expected float32\(3,\)"):
        difference(outputs_case(), (), jnp.zeros(2), jnp.zeros(3))


def test_seconds_are_of_one_call():
    made = []
    taken = seconds(lambda: made.append(time.sleep(0.005)), rounds=3, least_s=1e9, most_calls=10)
    assert len(made) == 1 + 1 + 3 * 10
    assert 0.005 <= taken < 0.025


def test_copies_fit_the_memory():
    assert copies_of(1) == 8
    assert copies_of(3 << 30) == 2
    assert copies_of(1 << 40) == 1


# Candidates


@given(st.sets(st.integers(1, 100_000), min_size=1, max_size=6))
def test_ranges_share_out_all_sizes(values):
    spans = ranges([*values])
    assert all(least <= value <= most for value, (least, most) in spans.items())
    edges = [edge for value in sorted(values) for edge in spans[value]]
    assert edges[0] == 1
    assert all(b == a + 1 for a, b in zip(edges[1::2], edges[2::2], strict=False))


@settings(deadline=None, max_examples=20)
@given(
    st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 512, 32_768]), st.sampled_from([BF16, FP8])
)
def test_candidates_are_tiles_that_kernels_take(ways, rows, dtype):
    s = LARGE.tensor(ways)
    shape = (s.experts, 2 * s.width, s.hidden)
    found = [GroupedTile(**tile) for tile in grouped_tiles(rows, shape, dtype, MOSAIC)]
    assert found
    assert len(set(found)) == len(found) < 80
    assert not [tile for tile in found if misfit(tile, shape, dtype, None)]
    assert {tile.kernel for tile in found} == ({"prefill"} if rows > 10_000 else {"decode"})


def test_what_hopper_kernels_cannot_do_is_tried_through_triton():
    odd = (128, 4096, 176)  # of Air at eight ways
    kernels = {tile["kernel"] for tile in grouped_tiles(64, odd, BF16, Backend("triton"))}
    assert kernels == {"triton"}
    assert {t["kernel"] for t in grouped_tiles(64, (4, 36, 36), BF16, MOSAIC)} == {"triton"}


@pytest.mark.parametrize("queries", [1, 12, 48, 384])
def test_attention_has_candidates_for_all_queries(queries):
    found = list(attention_tiles(queries, BF16, 128))
    assert found
    assert all(tile["rows"] >= 16 for tile in found)
    assert min(tile["rows"] for tile in found) <= max(16, queries)


def test_attention_is_tuned_once_for_all_splits():
    tasks = list(attention_tasks(MOSAIC, [LARGE.tensor(n) for n in (1, 8)], [1, 4]))
    assert [task.label for task in tasks] == [
        f"{dtype} KV, {n} x 12 queries" for dtype in ("bfloat16", "float8_e4m3fn") for n in (1, 4)
    ]
    assert tasks[0].parts[0].when == {"pool": "bfloat16", "queries": [1, 24]}
    assert len(tasks[0].parts[0].cases(MOSAIC)) == 4


def test_select_finds_by_name():
    found = tune.select(MOSAIC, ["grouped_matmul"], "355b tp8 float8.* 64 tokens")
    assert [task.label for task in found] == ["355b tp8 float8_e4m3fn, 64 tokens"]


# What is chosen


def part(*blocks: int) -> Part:
    return Part({}, tuple({"block_rows": n, "id": i} for i, n in enumerate(blocks)), lambda _: [])


def chosen(*scores: dict[int, float]) -> list[int] | None:
    task = Task("op", "", (part(8, 16, 16), part(8, 8, 16)), alike=("block_rows",))
    found = tune.choose(task, scores)
    return found and [tile["id"] for tile, _ in found]


def test_parts_agree_on_their_blocks():
    assert chosen({0: 5.0, 1: 1.0, 2: 2.0}, {0: 4.0, 1: 3.0, 2: 9.0}) == [0, 1]
    assert chosen({0: 9.0, 1: 3.0, 2: 2.0}, {0: 4.0, 1: 3.0, 2: 9.0}) == [2, 2]
    assert chosen({0: 1.0}, {2: 1.0}) is None
    assert chosen({}, {2: 1.0}) is None


# What is written


def entry(by: int, **when) -> tune.Entry:
    return {"when": when, "tile": {"by": by}}


def test_new_entries_take_the_place_of_those_they_cover_and_go_before_wider_ones():
    inside, wider, other = entry(1, n=[9, 16]), entry(2, n=[17, 99]), entry(3, n=[1, 99], kind="a")
    old = [inside, wider, other]
    table = {"h100": {"op": old, "other": [entry(4)]}, "h200": {"op": old}}
    new = tune.merge(table, "h100", "op", [entry(5, n=[8, 20])])
    assert new["h100"]["op"] == [other, entry(5, n=[8, 20]), wider]
    assert new["h100"]["other"] == [entry(4)]
    assert new["h200"] == table["h200"]
    assert table["h100"]["op"] == old


def test_more_conditions_come_first_and_numbers_in_order():
    new = tune.merge(
        {}, "h100", "op", [entry(i, n=[i, i]) for i in (100, 9)] + [entry(1, a=1, b=2)]
    )
    assert [e["tile"]["by"] for e in new["h100"]["op"]] == [1, 9, 100]


def test_a_new_device_begins_with_the_entries_it_has_used():
    new = tune.merge(
        {"h100": {"op": [entry(1)], "other": [entry(2)]}}, "h200", "op", [entry(3, n=1)]
    )
    assert new["h200"] == {"op": [entry(3, n=1), entry(1)], "other": [entry(2)]}


def test_the_file_is_json_with_an_entry_a_line(tmp_path):
    file = tmp_path / "tiles.json"
    tune.write(file, "h100", "op", [entry(1, n=[1, 2]), entry(2, n=[3, 4])])
    once = file.read_text()
    tune.write(file, "h100", "op", [entry(1, n=[1, 2])])
    assert file.read_text() == once
    assert json.loads(once)["h100"]["op"] == [entry(1, n=[1, 2]), entry(2, n=[3, 4])]
    assert '\n    {"when": {"n": [1, 2]}, "tile": {"by": 1}},\n' in once
    assert [f.name for f in tmp_path.iterdir()] == ["tiles.json"]


# The command line


def test_it_says_that_there_is_no_gpu(capsys, tmp_path):
    assert tune.main(["--out", str(tmp_path / "tiles.json")]) == 1
    said = capsys.readouterr().err
    assert "no GPU: JAX found cpu" in said
    assert "nvidia-smi" in said


def test_it_lists_shapes_without_a_gpu(capsys):
    assert tune.main(["--list", "--cases", "355b ep8 bfloat16, 8 tokens"]) == 0
    assert "grouped_matmul, 355b ep8 bfloat16, 8 tokens: " in capsys.readouterr().out


def test_an_unknown_gpu_needs_a_name():
    assert tune.known_device("NVIDIA H200") == "h200"
    with pytest.raises(RuntimeError, match="--device"):
        tune.known_device("NVIDIA A100")
