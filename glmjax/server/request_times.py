"""What clients wait for, request by request: histograms, counts, and tokens a second."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from glmjax.server.engine_thread import Observer
from glmjax.types import FinishReason

RATE_WINDOW_S = 10


class Histogram:
    """How often values came, and how large. One thread observes, any may read.

    prometheus_client's own takes one value a call, and a lock for each; here all tokens of a step
    come at once.

    Args:
        bounds: upper bounds of its buckets, rising; one more holds what is larger.
    """

    def __init__(self, bounds: Sequence[float]):
        self.bounds = tuple(bounds)
        self.sum = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def cumulative(self) -> list[int]:
        """How many values were at most each bound; the last is how many there were."""
        return list(accumulate(self._counts))


class Rate:
    """How many a second, over the last `RATE_WINDOW_S`. One thread adds, any may read."""

    def __init__(self) -> None:
        self._seconds = [(0, 0)] * (RATE_WINDOW_S + 1)  # (second, count), at second % length

    def add(self, now_s: float, count: int) -> None:
        """Count `count` at time `now_s`."""
        second = int(now_s)
        place = second % len(self._seconds)
        held, before = self._seconds[place]
        self._seconds[place] = (second, count + (before if held == second else 0))

    def per_second(self, now_s: float) -> float:
        """The rate at time `now_s`: of the second that runs and the whole ones before."""
        begin = int(now_s) - RATE_WINDOW_S
        return sum(n for second, n in self._seconds if second >= begin) / (now_s - begin)


def _steps(least: int, most: int) -> list[float]:
    """1, 2 and 5 times each power of ten from 10^least on, then 10^most."""
    return [float(f"{m}e{e}") for e in range(least, most) for m in (1, 2, 5)] + [float(f"1e{most}")]


@dataclass(slots=True)
class _Ticket:
    """When a request was submitted, and when its latest tokens came: None before the first."""

    began_s: float
    latest_s: float | None = None


class RequestTimes(Observer):
    """Times of requests, as whoever submits them sees them.

    Attributes:
        first_token: seconds from submission to the first token.
        inter_token: seconds between tokens; those of one step share the time since the one before.
        whole: seconds from submission to the end of requests that were not aborted.
        tokens: tokens a second.
        ends: requests that ended, by reason.
    """

    def __init__(self) -> None:
        self.first_token = Histogram(_steps(-3, 2))
        self.inter_token = Histogram(_steps(-4, 1))
        self.whole = Histogram(_steps(-2, 3))
        self.tokens = Rate()
        self.ends: Counter[FinishReason] = Counter()

    def began(self) -> _Ticket:
        """A request is submitted."""
        return _Ticket(time.monotonic())

    def output(self, ticket: _Ticket, new_tokens: int) -> None:
        """A step gave a request tokens. Those beside its first one took no time of their own."""
        now = time.monotonic()
        if ticket.latest_s is None:
            self.first_token.observe(now - ticket.began_s)
        else:
            self.inter_token.observe((now - ticket.latest_s) / new_tokens, new_tokens)
        ticket.latest_s = now
        self.tokens.add(now, new_tokens)

    def ended(self, ticket: _Ticket, reason: FinishReason) -> None:
        """A request ended."""
        self.ends[reason] += 1
        if reason is not FinishReason.ABORT:
            self.whole.observe(time.monotonic() - ticket.began_s)
