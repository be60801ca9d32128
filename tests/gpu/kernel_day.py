"""Kernels at official shapes: do they agree with their oracles, how fast are they, which tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from day import Day, Peak, Row

from pallas_kernels import tiles
from pallas_kernels.backend import Backend
from pallas_kernels.measure import Program
from pallas_kernels.official import (
    AIR,
    BF16,
    FP8,
    LARGE,
    SPLITS,
    Case,
    Sizes,
    all_cases,
    attention_case,
    dispatch_cases,
    grouped_cases,
    norm_case,
    quantize_case,
    rotate_case,
    route_case,
    silu_case,
)
from pallas_kernels.tile_candidates import Task, grouped_tasks
from pallas_kernels.tune import TASKS, Settings, select, tune

BACKENDS = ("triton", "mosaic")
USUAL = (AIR.tensor(1), AIR.tensor(8), LARGE.tensor(8), LARGE.expert(8))
TINY = Sizes("tiny", hidden=64, experts=4, width=64, kv_heads=2, queries=2, head_dim=16, top_k=2)


def cases(day: Day, backend: Backend) -> list[Case]:
    """What is run: the tiny shapes of a rehearsal, the usual deployments, or all."""
    if day.rehearse:
        return list(_tiny_cases(backend))
    return all_cases(backend, SPLITS if day.every else USUAL)


def _tiny_cases(backend: Backend) -> Iterator[Case]:
    s, tokens = TINY, 3
    if backend.name == "mosaic":  # of the others it has none of its own
        yield from list(grouped_cases(s, tokens, BF16, backend))[:1]
        return
    yield from list(grouped_cases(s, tokens, FP8, backend))[:1]
    yield from dispatch_cases(s, tokens, 16, BF16)
    yield rotate_case(s, tokens, BF16, qk_norm=True)
    yield norm_case(s, tokens, quantize=True)
    yield silu_case(s, tokens * s.top_k, quantize=False)
    yield route_case(s, tokens)
    yield quantize_case(s, tokens)
    yield attention_case(s, 2, 1, 20, 16, BF16)


def parity(day: Day) -> Iterator[Row]:
    """Each case and backend against the oracle: see `measure.Difference`."""

    def check(program: Program) -> Row:
        return program.check(program.inputs())._asdict()

    yield from _each(day, check, copies=1)


def bandwidth(day: Day) -> Iterator[Row]:
    """Bytes and operations a second of each case, and how close that is to the roofline."""

    def speed(program: Program) -> Row:
        taken = program.seconds(program.inputs(), **day.timing)
        return roofline(program.case, taken, day.peak)

    yield from _each(day, speed, copies=1 if day.rehearse else None)


def roofline(case: Case, taken_s: float, peak: Peak) -> Row:
    """A case's figures, if a run of it takes so long."""
    fp8 = case.op == "grouped_matmul" and FP8.name in case.label
    least_s = max(case.read_bytes / peak.bytes_s, case.flops / (peak.fp8_s if fp8 else peak.bf16_s))
    return {
        "taken_us": 1e6 * taken_s,
        "gbyte_per_s": case.read_bytes / taken_s / 1e9,
        "tflop_per_s": case.flops / taken_s / 1e12,
        "roofline_share": least_s / taken_s,
    }


def _each(day: Day, measure: Callable[[Program], Row], copies: int | None) -> Iterator[Row]:
    """A row a case and backend; one that fails has its error."""
    for name in BACKENDS:
        backend = day.backend(name)
        for case in cases(day, backend):
            row = {"backend": name, "op": case.op, "case": case.label}
            try:
                yield row | measure(Program(case, backend, copies))
            except Exception as error:  # is the result
                yield row | {"error": f"{type(error).__name__}: {error}"[:500]}


def tuned(day: Day) -> Iterator[Row]:
    """Tune the shapes that --tune names, into tiles.json; of a rehearsal, a tile or two."""
    if day.rehearse:
        backend = day.backend("triton")
        found = [_shortened(task) for task in grouped_tasks(backend, [TINY], [3])][:1]
        out, settings = Path("rehearsed_tiles.json"), Settings(copies=1, **day.timing)
    elif day.tiles is None:
        yield {"note": "not asked for: --tune REGEX tunes the shapes that it names"}
        return
    else:
        backend, out, settings = day.backend("mosaic"), tiles.FILE, Settings()
        found = select(backend, list(TASKS), day.tiles)
    for task in found:
        yield from tune([task], backend, out, settings)


def _shortened(task: Task) -> Task:
    return replace(task, parts=tuple(replace(p, tiles=p.tiles[:1]) for p in task.parts))
