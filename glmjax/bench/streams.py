"""Running requests through an engine, and comparing engines in turn."""

from __future__ import annotations

import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from glmjax.engine import Engine
from glmjax.errors import RequestFailedError
from glmjax.types import EngineCounters, Request, RequestOutput

T = TypeVar("T")

RATE_COLUMNS = ("case", "streams", "tokens/s", "ratio", "least", "most", "tokens a verification")


class Outcome(NamedTuple):
    """What a run of requests gave.

    Attributes:
        seconds: from the first request to the last token.
        tokens: by request id.
        cached: by request id, prompt tokens found in the prefix cache.
        done: what the engine did for them.
    """

    seconds: float
    tokens: dict[str, tuple[int, ...]]
    cached: dict[str, int]
    done: EngineCounters

    @property
    def rate(self) -> float:
        """New tokens a second."""
        return self.done.generated_tokens / self.seconds


def answer(engine: Engine, requests: Sequence[Request], at_once: int | None = None) -> Outcome:
    """Run requests to their ends; the prefix cache stays as it is before and after.

    Args:
        at_once: alive at a time; the next starts when one ends. None: all.

    Raises:
        RequestFailedError: the engine could not finish one.
    """
    waiting, alive = deque(requests), 0
    tokens: dict[str, tuple[int, ...]] = {request.id: () for request in requests}
    cached: dict[str, int] = {}
    before, start = engine.counters(), time.perf_counter()
    while waiting or engine.has_work():
        while waiting and (at_once is None or alive < at_once):
            engine.add(waiting.popleft())
            alive += 1
        for output in engine.step():
            check(output)
            tokens[output.request_id] += output.token_ids
            cached[output.request_id] = output.cached_tokens
            alive -= output.finish_reason is not None
    seconds = time.perf_counter() - start
    return Outcome(seconds, tokens, cached, since(engine.counters(), before))


def check(output: RequestOutput) -> None:
    """Raise RequestFailedError where the engine could not finish a request."""
    if output.error is not None:
        raise RequestFailedError(f"request {output.request_id}: {output.error}")


def since(now: EngineCounters, before: EngineCounters) -> EngineCounters:
    """What was done between two readings."""
    return EngineCounters(*map(_difference, now, before))


def _difference(now: Any, before: Any) -> Any:
    if isinstance(now, tuple):
        return tuple(n - b for n, b in zip(now, before or (0,) * len(now), strict=True))
    return now - before


def in_turn(cases: Mapping[str, Callable[[], T]], rounds: int, label: str) -> dict[str, list[T]]:
    """Results of each case, A B A B ...: what slows the machine down meets them alike.

    One more round goes before, and does not count.
    """
    found: dict[str, list[T]] = {name: [] for name in cases}
    for i in follow(range(rounds + 1), label):
        for name, case in cases.items():
            result = case()
            found[name] += [result] if i else []
    return found


def follow(items: Sequence[T], label: str) -> Iterator[T]:
    """Go through items, with a bar on a terminal, else a line each."""
    if sys.stderr.isatty():
        yield from tqdm(items, label, leave=False)
        return
    for i, item in enumerate(items, 1):
        print(f"{label}: {i} of {len(items)}", file=sys.stderr, flush=True)
        yield item


def ratios(values: Iterable[float], base: Iterable[float]) -> tuple[float, float, float]:
    """Median, least and most of the ratios of values to those of the same rounds."""
    found = [value / other for value, other in zip(values, base, strict=True)]
    return statistics.median(found), min(found), max(found)


def rate_rows(streams: int, found: Mapping[str, Sequence[Outcome]]) -> list[tuple[Any, ...]]:
    """Rows of RATE_COLUMNS: tokens a second of each case, and relative to the first case."""
    base = [outcome.rate for outcome in next(iter(found.values()))]
    rows = []
    for name, outcomes in found.items():
        rates = [outcome.rate for outcome in outcomes]
        gain = verified([outcome.done for outcome in outcomes])
        rows.append((name, streams, statistics.median(rates), *ratios(rates, base), gain))
    return rows


def verified(done: Sequence[EngineCounters]) -> float | None:
    """Tokens that a verification of drafts gave, its own one included; None: there was none."""
    verifications = sum(d.verifications for d in done)
    return 1 + sum(sum(d.accepted) for d in done) / verifications if verifications else None
