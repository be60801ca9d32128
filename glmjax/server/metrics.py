"""GET /metrics, for Prometheus. Read from the engine when asked: nothing is counted twice.

Names are SGLang's where it has one, so that its dashboards fit; our own begin with "glmjax:".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastapi import APIRouter, Request
from prometheus_client import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.responses import Response

from glmjax.server.engine_thread import EngineThread
from glmjax.server.request_times import Histogram, RequestTimes
from glmjax.types import EngineCounters, EngineLoad, FinishReason

# Never OpenMetrics, though Prometheus accepts it: there the library writes names without colons.
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"

router = APIRouter()


def ratio(part: float, whole: float) -> float:
    """Their quotient; 0 of nothing."""
    return part / whole if whole else 0.0


def cache_hit_rate(counters: EngineCounters) -> float:
    """Share of prompt tokens that were found in the prefix cache."""
    return ratio(counters.cached_tokens, counters.prompt_tokens)


def accept_length(counters: EngineCounters) -> float:
    """Tokens that a verification gave on average: accepted drafts and one more; 0 before any."""
    return ratio(counters.verifications + sum(counters.accepted), counters.verifications)


class Reading(NamedTuple):
    """What is measured at a time."""

    load: EngineLoad
    counters: EngineCounters
    times: RequestTimes


# Name -> (what it says, its value).
GAUGES: dict[str, tuple[str, Callable[[Reading], float]]] = {
    "sglang:num_running_reqs": ("Requests that run.", lambda r: r.load.running),
    "sglang:num_queue_reqs": ("Requests in the queue.", lambda r: r.load.waiting),
    "sglang:num_used_tokens": (
        "Token positions in KV pages of running requests.",
        lambda r: r.load.used_tokens,
    ),
    "sglang:token_usage": (
        "Share of all token positions that running requests hold.",
        lambda r: ratio(r.load.used_tokens, r.load.max_total_tokens),
    ),
    "sglang:cache_hit_rate": (
        "Share of prompt tokens found in the prefix cache, since the start.",
        lambda r: cache_hit_rate(r.counters),
    ),
    "sglang:gen_throughput": (
        "Tokens generated a second, over the last 10 seconds.",
        lambda r: r.times.tokens.per_second(time.monotonic()),
    ),
    "sglang:spec_accept_length": (
        "Tokens that a verification of drafts gave on average, since the start.",
        lambda r: accept_length(r.counters),
    ),
    "sglang:spec_accept_rate": (
        "Share of drafts that were accepted, since the start.",
        lambda r: ratio(sum(r.counters.accepted), sum(r.counters.drafted)),
    ),
    "glmjax:prefix_cache_tokens": (
        "Token positions in KV pages that only the prefix cache holds.",
        lambda r: r.load.cached_tokens,
    ),
}
COUNTERS: dict[str, tuple[str, Callable[[Reading], float]]] = {
    "sglang:prompt_tokens_total": (
        "Prompt tokens of requests that started.",
        lambda r: r.counters.prompt_tokens,
    ),
    "sglang:generation_tokens_total": (
        "Tokens generated.",
        lambda r: r.counters.generated_tokens,
    ),
    "sglang:cached_tokens_total": (
        "Prompt tokens found in the prefix cache.",
        lambda r: r.counters.cached_tokens,
    ),
    "sglang:num_requests_total": (
        "Requests that ended, the aborted ones too.",
        lambda r: r.times.ends.total(),
    ),
    "sglang:num_aborted_requests_total": (
        "Requests that were aborted: by a client that left, a deadline, or a failure.",
        lambda r: r.times.ends[FinishReason.ABORT],
    ),
    "glmjax:failed_requests_total": (
        "Requests that an error of the engine ended.",
        lambda r: r.counters.failed_requests,
    ),
    "glmjax:preemptions_total": (
        "Times that a request left the device, to be computed again.",
        lambda r: r.counters.preemptions,
    ),
    "glmjax:computed_tokens_total": (
        "Prompt tokens computed, those after a preemption too.",
        lambda r: r.counters.computed_tokens,
    ),
    "glmjax:steps_total": ("Steps of the engine.", lambda r: r.counters.steps),
}
# By place in the chain of drafts.
COUNTERS_BY_POSITION: dict[str, tuple[str, Callable[[Reading], tuple[int, ...]]]] = {
    "glmjax:spec_drafted_total": ("Drafts that were verified.", lambda r: r.counters.drafted),
    "glmjax:spec_accepted_total": ("Drafts that were accepted.", lambda r: r.counters.accepted),
}
HISTOGRAMS: dict[str, tuple[str, Callable[[Reading], Histogram]]] = {
    "sglang:time_to_first_token_seconds": (
        "From a request's arrival to its first token.",
        lambda r: r.times.first_token,
    ),
    "sglang:inter_token_latency_seconds": (
        "Between tokens of a request.",
        lambda r: r.times.inter_token,
    ),
    "sglang:e2e_request_latency_seconds": (
        "From a request's arrival to its end, where it was not aborted.",
        lambda r: r.times.whole,
    ),
}


class EngineCollector(Collector):
    """All metrics of an engine, read when they are collected.

    Args:
        model: label of every sample.
        engine: where requests run.
        times: what observes that engine's requests.
    """

    def __init__(self, model: str, engine: EngineThread, times: RequestTimes):
        self._model = model
        self._engine = engine
        self._times = times

    def collect(self) -> Iterator[Metric]:
        """Every metric with its samples."""
        snapshot = self._engine.snapshot()
        reading = Reading(snapshot.load, snapshot.counters, self._times)
        yield self._cache_config(reading)
        for name, (text, gauge) in GAUGES.items():
            metric = GaugeMetricFamily(name, text, labels=["model_name"])
            metric.add_metric([self._model], gauge(reading))
            yield metric
        for name, (text, counter) in COUNTERS.items():
            metric = CounterMetricFamily(name, text, labels=["model_name"])
            metric.add_metric([self._model], counter(reading))
            yield metric
        for name, (text, counts) in COUNTERS_BY_POSITION.items():
            metric = CounterMetricFamily(name, text, labels=["model_name", "position"])
            for position, count in enumerate(counts(reading)):
                metric.add_metric([self._model, str(position)], count)
            yield metric
        for name, (text, histogram) in HISTOGRAMS.items():
            metric = HistogramMetricFamily(name, text, labels=["model_name"])
            metric.add_metric([self._model], *_buckets(histogram(reading)))
            yield metric

    def _cache_config(self, reading: Reading) -> Metric:
        page_size = self._engine.limits.page_size
        pages = reading.load.max_total_tokens // page_size
        metric = InfoMetricFamily("sglang:cache_config", "The KV pool.", labels=["model_name"])
        metric.add_metric([self._model], {"page_size": str(page_size), "num_pages": str(pages)})
        return metric


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """What a HistogramMetricFamily takes: counts by bound, and the sum."""
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return list(zip(bounds, histogram.cumulative(), strict=True)), histogram.sum


@router.head("/metrics", include_in_schema=False)
@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics, in Prometheus' text format."""
    return Response(generate_latest(request.app.state.metrics), media_type=MEDIA_TYPE)
