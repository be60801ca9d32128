"""How much streams that decode are held up while long prompts arrive."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from glmjax.bench.engines import Engines
from glmjax.bench.prompts import exactly, random_tokens
from glmjax.bench.streams import check, in_turn
from glmjax.engine import Engine
from glmjax.tables import Table
from glmjax.types import Request, RequestOutput

STREAM = "stream"


class Sizes(NamedTuple):
    """Streams, the prompts that arrive, and steps to watch where none does."""

    rounds: int = 5
    streams: int = 16
    stream_prompt: int = 30
    arrivals: int = 4
    prompt: int = 2000
    steps: int = 64


QUICK = Sizes(rounds=1, streams=3, arrivals=2, prompt=600, steps=8)
SETTLED = 8  # outputs that each stream has before anything is measured


@dataclass
class Watch:
    """Steps an engine, and notes what happens from `begin` on.

    Attributes:
        engine: with streams, and maybe prompts that arrived.
        gaps: (steps, seconds) between outputs of the same stream.
        steps: steps so far.
        chunks: steps that computed tokens of prompts.
        mixed: of these, how many gave tokens to streams too.
        waits_s: by prompt that arrived, how long it took to its first token.
    """

    engine: Engine
    gaps: list[tuple[int, float]] = field(default_factory=list)
    steps: int = 0
    chunks: int = 0
    mixed: int = 0
    waits_s: list[float] = field(default_factory=list)
    _last: dict[str, tuple[int, float]] = field(default_factory=dict)
    _had_chunks: bool = False
    _start_s: float = 0.0

    def begin(self) -> None:
        """Forget all but when each stream had its last output."""
        steps = self.steps
        self._last = {name: (step - steps, then) for name, (step, then) in self._last.items()}
        self.gaps, self.steps, self.chunks, self.mixed = [], 0, 0, 0
        self._start_s = time.perf_counter()

    def step(self) -> None:
        """Run one step."""
        computed = self.engine.counters().computed_tokens
        outputs = self.engine.step()
        now = time.perf_counter()
        self.steps += 1
        streams = [self._take(output, now) for output in outputs]
        # What a call returns is of the step that the call before it launched.
        self.mixed += self._had_chunks and any(streams)
        self._had_chunks = self.engine.counters().computed_tokens > computed
        self.chunks += self._had_chunks

    def _take(self, output: RequestOutput, now: float) -> bool:
        """Take in an output; whether it is a stream's."""
        check(output)
        name = output.request_id
        if not name.startswith(STREAM):
            self.waits_s.append(now - self._start_s)
            return False
        if name in self._last:
            step, then = self._last[name]
            self.gaps.append((self.steps - step, now - then))
        self._last[name] = self.steps, now
        return True


def measure(engines: Engines, sizes: Sizes) -> list[Table]:
    """Gaps between outputs of a stream, with prompts arriving and without."""
    engine = engines.engine()
    cases = {
        "no arrivals": partial(run, engine, sizes, 0),
        "arrivals": partial(run, engine, sizes, sizes.arrivals),
    }
    found = in_turn(cases, sizes.rounds, "scheduling")
    gaps = {name: [gap for w in watches for gap in w.gaps] for name, watches in found.items()}
    quiet = np.percentile([seconds for _, seconds in gaps["no arrivals"]], (50, 99))
    rows = [_gap_row(name, gaps[name], quiet) for name in found]
    columns = (
        "streams with",
        "p50 steps",
        "p99 steps",
        "p50 ms",
        "p99 ms",
        "p50 ratio",
        "p99 ratio",
    )
    note = (
        f"{sizes.streams} streams decode while {sizes.arrivals} prompts of {sizes.prompt} tokens "
        "arrive at once: time from one output of a stream to its next, and p50 and p99 relative to "
        f"no arrivals. {sizes.rounds} rounds."
    )
    return [
        Table("Gaps of streams", columns, rows, note),
        _arrivals(found["arrivals"]),
    ]


def _gap_row(name: str, gaps: list[tuple[int, float]], quiet: np.ndarray) -> tuple[Any, ...]:
    steps, seconds = zip(*gaps, strict=True)
    half, most = np.percentile(steps, (50, 99), method="higher")
    times = np.percentile(seconds, (50, 99))
    return (name, int(half), int(most), *(1e3 * times).tolist(), *(times / quiet).tolist())


def _arrivals(watches: list[Watch]) -> Table:
    def median(of: Callable[[Watch], float]) -> float:
        return float(np.median([of(watch) for watch in watches]))

    rows = [
        ("steps while they were computed", median(lambda w: w.steps)),
        ("of these with chunks of them", median(lambda w: w.chunks)),
        ("of these with tokens for streams too", median(lambda w: w.mixed)),
        ("first prompt's first token, ms", median(lambda w: 1e3 * min(w.waits_s))),
        ("last prompt's first token, ms", median(lambda w: 1e3 * max(w.waits_s))),
    ]
    return Table("Prompts that arrive", ("what", "median"), rows)


def run(engine: Engine, sizes: Sizes, arrivals: int) -> Watch:
    """Watch streams until prompts that arrive are computed; where none does, for some steps."""
    engine.flush_cache()
    rng, watch = np.random.default_rng(0), Watch(engine)
    for request in _streams(engine, sizes, rng):
        engine.add(request)
    while len(watch.gaps) < SETTLED * sizes.streams:
        watch.step()
    watch.begin()
    for i in range(arrivals):
        engine.add(Request(f"prompt {i}", random_tokens(rng, sizes.prompt), exactly(1)))
    while len(watch.waits_s) < arrivals if arrivals else watch.steps < sizes.steps:
        watch.step()
    for i in range(sizes.streams):
        engine.abort(f"{STREAM} {i}")
    while engine.has_work():
        engine.step()
    return watch


def _streams(engine: Engine, sizes: Sizes, rng: np.random.Generator) -> list[Request]:
    """Requests that do not end while they are watched."""
    chunks = sizes.arrivals * sizes.prompt // engine.limits.chunk_tokens
    steps = 4 * (chunks + sizes.steps + SETTLED)
    sampling = exactly(steps * (engine.limits.num_drafts + 1))
    prompts = [random_tokens(rng, sizes.stream_prompt) for _ in range(sizes.streams)]
    return [Request(f"{STREAM} {i}", prompt, sampling) for i, prompt in enumerate(prompts)]
