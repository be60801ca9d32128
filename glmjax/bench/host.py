"""How long the host takes for a step: plan, pack and commit, with no device at all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from glmjax.bench.engines import Engines
from glmjax.bench.streams import in_turn, ratios
from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.plans import Limits, StepPlan, StepResult
from glmjax.runner.blob import field_shapes, pack, split
from glmjax.scheduler.buckets import make_buckets
from glmjax.tables import Table
from glmjax.types import Request, SamplingParams

VOCAB_SIZE, PAGE_SIZE, MAX_SEQ_LEN, DRAFTS = 151_552, 16, 131_072, 3
CHUNK_TOKENS = 8192  # only so that prompts are over soon
CACHED_PROMPT = 1000  # tokens of each prompt that fills the cache
SPARE_STEPS = 64  # before the first measured one

COLUMNS = (
    "requests",
    "prompt tokens",
    "cached",
    "median us",
    "p99 us",
    "pack us",
    "CPU us",
    "ratio",
    "least",
    "most",
)


class Load(NamedTuple):
    """What an engine holds while its steps are timed.

    Attributes:
        requests: that decode.
        context: tokens of each one's prompt, all different.
        cached: tokens of other prompts that the prefix cache holds.
    """

    requests: int
    context: int
    cached: int


class Sizes(NamedTuple):
    """Rounds, steps of each, and loads to compare; ratios are to the first load."""

    rounds: int = 5
    steps: int = 100
    loads: tuple[Load, ...] = (
        Load(256, 1_000, 100_000),
        Load(256, 100, 100_000),
        Load(256, 10_000, 100_000),
        Load(256, 1_000, 0),
        Load(256, 1_000, 10_000),
        Load(32, 1_000, 100_000),
    )


QUICK = Sizes(rounds=1, steps=20, loads=(Load(8, 100, 1_000), Load(8, 20, 0)))


@dataclass(frozen=True)
class NullHandle:
    """A step that is done."""

    done: StepResult

    def result(self) -> StepResult:
        """The step's tokens."""
        return self.done


class NullRunner:
    """Packs plans as a device's runner does, and answers them at once.

    Args:
        limits: shapes to offer.

    Attributes:
        pack_s: how long packing the last plan took.
        answer_s: how long making up its answer took, which is no work of the host's.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.pack_s = self.answer_s = 0.0
        self._launched = 0

    def launch(self, plan: StepPlan) -> NullHandle:
        """Pack; rows accept 1, 2, 3, 1, ... of their drafts, chunks that sample give a token."""
        start = time.perf_counter()
        blob = pack(plan, self.limits)
        packed = time.perf_counter()
        self._launched += 1
        done = _answer(plan, blob, self.limits, 1 + self._launched % DRAFTS)
        self.pack_s, self.answer_s = packed - start, time.perf_counter() - packed
        return NullHandle(done)

    def reset(self) -> None:
        """Nothing to forget."""

    def update_params(self, params: Any) -> None:
        """Nothing to update."""


def _answer(plan: StepPlan, blob: np.ndarray, limits: Limits, accepted: int) -> StepResult:
    bucket = plan.bucket
    parts = [split(values, field_shapes(bucket, limits)) for values in blob]
    counts = [np.append(np.minimum(part.drafts, accepted) + 1, part.sample) for part in parts]
    shape = len(parts), bucket.rows + bucket.chunk_rows
    tokens = np.ones((*shape, bucket.drafts + 1), np.int32)
    drafts = np.ones((*shape, bucket.drafts), np.int32)
    return StepResult(tokens, np.array(counts, np.int32), drafts, np.zeros(shape, bool))


class Times(NamedTuple):
    """Of single steps, float64 [steps], in microseconds.

    Attributes:
        step: the host's work for a step: plan, pack and commit.
        cpu: that without what the operating system gave to others meanwhile.
        pack: of `step`, packing.
    """

    step: np.ndarray
    cpu: np.ndarray
    pack: np.ndarray


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Times of steps of all loads, in turn. No model takes part."""
    del engines
    steps = (sizes.rounds + 1) * sizes.steps
    started = {load: decoding(load, steps) for load in sizes.loads}
    cases = {str(load): partial(time_steps, *started[load], sizes.steps) for load in started}
    found = in_turn(cases, sizes.rounds, "host")
    first = _cpu(found[str(sizes.loads[0])])
    rows = [_row(load, found[str(load)], first) for load in sizes.loads]
    note = (
        f"Plan, pack and commit of a step in which all requests decode with {DRAFTS} drafts, 1 to "
        f"{DRAFTS} of them accepted; contexts grow by {steps * DRAFTS:,} tokens meanwhile. "
        f"{sizes.rounds} rounds of {sizes.steps} steps. Ratios are of CPU time, to the first row."
    )
    return [Table("Host work of a step", COLUMNS, rows, note)]


def _row(load: Load, found: Sequence[Times], first: list[float]) -> tuple[Any, ...]:
    step, pack_us = (np.hstack([getattr(t, name) for t in found]) for name in ("step", "pack"))
    times = np.median(step), np.percentile(step, 99), np.median(pack_us), np.median(_cpu(found))
    return (*load, *map(float, times), *ratios(_cpu(found), first))


def _cpu(found: Sequence[Times]) -> list[float]:
    """A figure for each round."""
    return [float(np.median(times.cpu)) for times in found]


def limits_for(load: Load, steps: int) -> Limits:
    """Room for a load, and for as many steps of its requests."""
    tokens = load.requests * (load.context + _new_tokens(steps)) + load.cached
    return Limits(
        groups=1,
        slots=load.requests,
        pages=2 * tokens // PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_seq_len=MAX_SEQ_LEN,
        num_drafts=DRAFTS,
        vocab_size=VOCAB_SIZE,
        buckets=make_buckets(load.requests, CHUNK_TOKENS, DRAFTS),
    )


def _new_tokens(steps: int) -> int:
    return (steps + SPARE_STEPS) * (DRAFTS + 1)


def decoding(load: Load, steps: int) -> tuple[Engine, NullRunner]:
    """An engine whose requests all decode, and will for `steps` steps; and its runner."""
    runner = NullRunner(limits_for(load, steps))
    fills = -(-load.cached // CACHED_PROMPT)
    engine = Engine(runner, SchedulerConfig(load.requests, load.requests + fills))
    rng = np.random.default_rng(0)
    for request in _requests(rng, "cached", fills, CACHED_PROMPT, 1):
        engine.add(request)
    while engine.has_work():
        engine.step()
    for request in _requests(rng, "running", load.requests, load.context, _new_tokens(steps)):
        engine.add(request)
    while engine.load().waiting or _prefilling(engine, load, fills):
        engine.step()
    return engine, runner


def _prefilling(engine: Engine, load: Load, fills: int) -> bool:
    goal = load.requests * load.context + fills * CACHED_PROMPT
    return engine.counters().computed_tokens < goal


def _requests(
    rng: np.random.Generator, name: str, count: int, length: int, new_tokens: int
) -> Iterator[Request]:
    sampling = SamplingParams(new_tokens, ignore_eos=True)
    for i in range(count):
        yield Request(
            f"{name} {i}", tuple(rng.integers(VOCAB_SIZE, size=length).tolist()), sampling
        )


def time_steps(engine: Engine, runner: NullRunner, steps: int) -> Times:
    """Run an engine for so many steps."""
    taken = np.zeros((3, steps))
    for i in range(steps):
        start, cpu = time.perf_counter(), time.thread_time()
        engine.step()
        spent, cpu_spent = time.perf_counter() - start, time.thread_time() - cpu
        taken[:, i] = spent - runner.answer_s, cpu_spent - runner.answer_s, runner.pack_s
    return Times(*(1e6 * taken))
