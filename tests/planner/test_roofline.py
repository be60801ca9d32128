"""Bounds, against times worked out by hand and against each other."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import glmjax.aot
from glmjax.aot.hardware import GPU, GPUS
from glmjax.config import MeshConfig
from glmjax.errors import ConfigError
from glmjax.planner.ops import Op, Queries
from glmjax.planner.roofline import (
    Cost,
    bound,
    decode_bounds,
    drafting_bounds,
    prefill_bounds,
)
from glmjax.planner.work import Work, step_work
from glmjax.releases import KNOWN_MODELS

BF16, FP8 = "bfloat16", "float8_e4m3fn"
MODEL = KNOWN_MODELS["zai-org/GLM-4.5-FP8"]
AIR = KNOWN_MODELS["zai-org/GLM-4.5-Air-FP8"]
EIGHT = MeshConfig(1, 8)
H100 = GPUS["h100"]
SLOW = GPU("slow", 100, 10.0, 100.0, 200.0, 5.0, 0.5)


# GPUs


@pytest.mark.parametrize("name", GPUS)
def test_memory_is_as_the_compiler_is_told(name):
    text = (Path(*glmjax.aot.__path__) / f"{name}.textproto").read_text("utf-8")
    told = dict(re.findall(r"(\w+): (\d+)", text))
    assert GPUS[name].memory_bytes == int(told["device_memory_size"])
    assert GPUS[name].memory_bytes_per_s == int(told["memory_bandwidth"])


def test_peaks_are_of_the_data_sheet_without_sparsity():
    for gpu in GPUS.values():
        assert gpu.flops_per_s(BF16) == pytest.approx(1979e12 / 2, rel=0.001)
        assert gpu.flops_per_s(FP8) == pytest.approx(3958e12 / 2, rel=0.001)
        assert (gpu.nvlink_bytes_per_s, gpu.network_bytes_per_s) == (900e9 / 2, 400e9 / 8)


def test_a_dtype_without_a_peak_is_refused():
    with pytest.raises(ConfigError, match=r"float32.*bfloat16, float8_e4m3fn"):
        decode_bounds(replace(AIR, quant=None, dtype="float32"), EIGHT, H100, "float32", [1], 10)


# One step


def op(name: str, weight: float, data: float, flops: float, precision: str = BF16) -> Op:
    return Op(name, weight, data, flops, precision)


def test_operations_take_whichever_is_longer_one_after_another():
    ops = (
        op("read", 30, 20, 100),  # 5 s; 1 s
        op("mixed", 10, 0, 300),  # 1 s; 3 s
        op("mixed", 0, 10, 100, FP8),  # 1 s; 0.5 s
    )
    found = bound(Work(ops, 0, 0), SLOW, MeshConfig(1, 1))
    assert found.seconds == 9
    assert found.by == {
        "read": Cost(5, "memory"),
        "mixed": Cost(4, "compute"),
        "sums": Cost(0, found.by["sums"].limit),
        "joined logits": Cost(0, found.by["joined logits"].limit),
    }
    assert list(found.by)[:2] == ["read", "mixed"]
    assert found.shares == pytest.approx({"memory": 6 / 9, "compute": 3 / 9, "links": 0})
    assert (found.limit, found.share) == ("memory", pytest.approx(6 / 9))


@pytest.mark.parametrize(
    ("mesh", "sums_s", "join_s"),
    [
        (MeshConfig(1, 1), 0, 0),
        (MeshConfig(1, 4), 1.5 * 80 / 5, 0.75 * 80 / 5),
        (MeshConfig(2, 4, hosts=2), 1.5 * 80 / 5, 0.75 * 80 / 5),  # a group a host: no network
        (MeshConfig(1, 8, hosts=2), 1 * 80 / 4 / 0.5, 0.5 * 80 / 4 / 0.5),  # 4 ports a host
        (MeshConfig(2, 8, hosts=4), 1 * 80 / 4 / 0.5, 0.5 * 80 / 4 / 0.5),
        (MeshConfig(1, 4, hosts=4), 1.5 * 80 / 0.5, 0.75 * 80 / 0.5),  # nothing but network
        (MeshConfig(3, 2, hosts=2), 1 * 80 / 0.5, 0.5 * 80 / 0.5),  # the group in the middle
    ],
    ids=str,
)
def test_links_bound_sums_and_joins(mesh, sums_s, join_s):
    found = bound(Work((op("read", 10, 0, 0),), 80, 80), SLOW, mesh)
    assert found.by["sums"].seconds == pytest.approx(sums_s)
    assert found.by["joined logits"].seconds == pytest.approx(join_s)
    assert found.seconds == pytest.approx(1 + sums_s + join_s)
    assert (found.limit == "links") == (mesh.tensor > 1)


def test_nvlink_bounds_where_the_network_is_fast():
    fast = replace(SLOW, network_bytes_per_s=100)
    found = bound(Work((), 80, 0), fast, MeshConfig(1, 8, hosts=2))
    assert found.seconds == pytest.approx(1.5 * 80 / 5)


# Decode


def test_a_decode_step_by_hand():
    """355B FP8 on 8 H100: the weights of a single token, and the K and V of 8k positions."""
    [row] = decode_bounds(MODEL, EIGHT, H100, BF16, [1], 8191)
    experts = 89 * 9 * (3 * 1536 * 5120 / 8)  # 8 and the shared one
    dense = 3 * 3 * 12288 * 5120 / 8
    attention = 92 * (2 * 96 + 2 * 8) * 128 * 5120 / 8
    router, head = 89 * 160 * 5120 * 2, 151552 * 5120 * 2 / 8
    kv = 8192 * 92 * 2 * 128 * 2
    least_s = (experts + dense + attention + router + head + kv) / 3.35e12
    assert row.step_s == pytest.approx(least_s, rel=0.02)  # scales, sums
    assert row.step_s > least_s
    assert row.tokens_per_s == row.tokens_per_s_user == pytest.approx(1 / row.step_s)
    assert row.bound.limit == "memory"


def test_rows_say_what_a_batch_gets():
    rows = decode_bounds(MODEL, EIGHT, H100, BF16, [1, 64], 4096)
    assert [row.batch for row in rows] == [1, 64]
    assert rows[1].tokens_per_s == pytest.approx(64 / rows[1].step_s)
    assert rows[1].tokens_per_s_user == pytest.approx(1 / rows[1].step_s)
    assert sum(cost.seconds for cost in rows[1].bound.by.values()) == pytest.approx(rows[1].step_s)


def test_the_fullest_group_sets_the_pace():
    two = MeshConfig(2, 8, hosts=2)
    uneven, even = decode_bounds(MODEL, two, H100, BF16, [15, 16], 4096)
    [alone] = decode_bounds(MODEL, EIGHT, H100, BF16, [8], 4096)
    assert uneven.step_s == even.step_s == alone.step_s
    assert even.tokens_per_s == pytest.approx(2 * alone.tokens_per_s)
    assert uneven.tokens_per_s == pytest.approx(15 / alone.step_s)


# Prefill


def chunks_s(*steps: list[Queries], drafts: int | None = None) -> list[float]:
    """Bounds of steps that sample once for each chunk."""
    return [
        bound(
            step_work(AIR, EIGHT, BF16, step, sampled=sum(q.seqs for q in step), drafts=drafts),
            H100,
            EIGHT,
        ).seconds
        for step in steps
    ]


@pytest.mark.parametrize("drafts", [None, 2])
def test_chunks_are_filled_with_one_prompt_after_another(drafts):
    [row] = prefill_bounds(AIR, EIGHT, H100, BF16, 100, 64, [2], drafts=drafts)
    steps = chunks_s(
        [Queries(1, 64, 0)],
        [Queries(1, 36, 64), Queries(1, 28, 0)],
        [Queries(1, 64, 28)],
        [Queries(1, 8, 92)],
        drafts=drafts,
    )
    assert row.first_s == pytest.approx(sum(steps[:2]))
    assert row.last_s == pytest.approx(sum(steps))
    assert row.tokens_per_s == pytest.approx(200 / sum(steps))


def test_short_prompts_share_a_step():
    rows = prefill_bounds(AIR, EIGHT, H100, BF16, 32, 128, [1, 4, 5])
    one, four, five = (chunks_s([Queries(n, 32, 0)])[0] for n in (1, 4, 1))
    assert [row.first_s for row in rows] == pytest.approx([one, four, four])
    assert [row.last_s for row in rows] == pytest.approx([one, four, four + five])


def test_groups_share_out_the_prompts():
    two = MeshConfig(2, 8, hosts=2)
    [both] = prefill_bounds(AIR, two, H100, BF16, 1000, 300, [6])
    [alone] = prefill_bounds(AIR, EIGHT, H100, BF16, 1000, 300, [3])
    assert (both.first_s, both.last_s) == (alone.first_s, alone.last_s)
    assert both.tokens_per_s == pytest.approx(2 * alone.tokens_per_s)


def test_a_long_prompt_is_bound_by_links_and_products():
    [row] = prefill_bounds(MODEL, EIGHT, H100, BF16, 16384, 16384, [1])
    sums_s = 185 * 16384 * 5120 * 2 * 1.75 / 450e9
    assert row.bound.by["sums"].seconds == pytest.approx(sums_s)
    assert row.bound.by["experts"].limit == "compute"
    experts_s = 89 * 16384 * 8 * 2 * 3 * 1536 * 5120 / 8 / 1978.9e12
    assert row.bound.by["experts"].seconds == pytest.approx(experts_s)


# Drafting


def test_drafting_pays_from_where_both_are_as_fast():
    rows = drafting_bounds(
        MODEL, EIGHT, H100, BF16, [1, 64], 4096, num_drafts=3, accepted_tokens=2.0
    )
    for row in rows:
        seqs = row.batch
        queries = [Queries(seqs, 4, 4096)]
        work = step_work(MODEL, EIGHT, BF16, queries, sampled=4 * seqs, drafts=3)
        assert row.verify_s == pytest.approx(bound(work, H100, EIGHT).seconds)
        assert row.break_even == pytest.approx(row.verify_s / row.decode_s)
        assert row.ratio == pytest.approx((2 / row.verify_s) / (1 / row.decode_s))
    args = MODEL, EIGHT, H100, BF16, [64], 4096
    [even] = drafting_bounds(*args, num_drafts=3, accepted_tokens=rows[1].break_even)
    assert even.ratio == pytest.approx(1)


def test_the_fullest_group_drafts_for_all():
    two, options = MeshConfig(2, 8, hosts=2), {"num_drafts": 3, "accepted_tokens": 2.0}
    [uneven] = drafting_bounds(MODEL, two, H100, BF16, [15], 4096, **options)
    [alone] = drafting_bounds(MODEL, EIGHT, H100, BF16, [8], 4096, **options)
    assert uneven == replace(alone, batch=15)


def test_drafting_nearly_doubles_where_every_expert_is_read_anyway():
    """Two tokens a step, at the cost of little more than one."""
    args = MODEL, EIGHT, H100, BF16, [8, 64], 1024
    few, many = drafting_bounds(*args, num_drafts=3, accepted_tokens=2.0)
    assert few.ratio < 1 < 1.5 < many.ratio < 2


# Order

BATCHES = st.integers(1, 600)
TENSOR = st.sampled_from([1, 2, 4, 8])


@settings(deadline=None)
@given(batch=BATCHES, tensor=TENSOR, ep=st.booleans(), context=st.integers(0, 20_000))
def test_more_to_do_never_takes_less_time(batch, tensor, ep, context):
    mesh = MeshConfig(1, tensor, ep)
    few, many = decode_bounds(MODEL, mesh, H100, BF16, [batch, batch + 1], context)
    [longer] = decode_bounds(MODEL, mesh, H100, BF16, [batch], context + 1)
    assert few.step_s < many.step_s
    assert few.step_s < longer.step_s
    assert few.tokens_per_s_user > many.tokens_per_s_user


@settings(deadline=None)
@given(batch=BATCHES, tensor=TENSOR, context=st.integers(0, 20_000))
def test_better_devices_and_smaller_caches_never_take_longer(batch, tensor, context):
    args = [batch], context
    mesh = MeshConfig(1, tensor)
    [h100] = decode_bounds(MODEL, mesh, H100, BF16, *args)
    [h200] = decode_bounds(MODEL, mesh, GPUS["h200"], BF16, *args)
    [small] = decode_bounds(MODEL, mesh, H100, FP8, *args)
    [plain] = decode_bounds(replace(MODEL, quant=None), mesh, H100, BF16, *args)
    assert h200.step_s < h100.step_s < plain.step_s
    assert small.step_s < h100.step_s


@settings(deadline=None, max_examples=50)
@given(
    prompt=st.integers(1, 300),
    chunk=st.integers(1, 200),
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(sorted),
)
def test_the_last_prompt_is_never_before_the_first(prompt, chunk, batches):
    rows = prefill_bounds(AIR, EIGHT, H100, BF16, prompt, chunk, batches)
    lasts = [row.last_s for row in rows]
    assert all(row.first_s <= row.last_s for row in rows)
    assert lasts == sorted(lasts)
    [whole] = prefill_bounds(AIR, EIGHT, H100, BF16, prompt, prompt * max(batches), [max(batches)])
    assert lasts[-1] >= whole.last_s * (1 - 1e-9)  # chunks read the weights again
