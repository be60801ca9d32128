"""/metrics: right numbers after known traffic, in a form that Prometheus reads."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live, oracle, wait_until
from prometheus_client import parser

from glmjax.server import request_times
from glmjax.server.metrics import COUNTERS, COUNTERS_BY_POSITION, GAUGES, HISTOGRAMS
from glmjax.server.request_times import Histogram, Rate, RequestTimes
from glmjax.server.served import ServedModel
from glmjax.types import FinishReason

GREEDY = {"temperature": 0, "ignore_eos": True}
Samples = dict[str, dict[tuple[str, ...], float]]


@pytest.fixture
def fresh(served: ServedModel) -> Iterator[Live]:
    with live(served) as server:
        yield server


def scrape(server: Live) -> Samples:
    """Samples by name and by their labels' values, but for the model's name."""
    found: Samples = {}
    with server.http as client:
        text = client.get("/metrics").text
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("model_name") == server.model
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def generate(client: httpx.Client, prompt: list[int], count: int, **fields: Any) -> dict[str, Any]:
    sampling = GREEDY | {"max_new_tokens": count} | fields
    answer = client.post("/generate", json={"input_ids": prompt, "sampling_params": sampling})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_idle_server_has_every_metric(fresh: Live):
    found = scrape(fresh)
    for name in GAUGES.keys() | COUNTERS.keys():
        assert found[name] == {(): 0.0}
    for name in HISTOGRAMS:
        assert found[f"{name}_count"] == found[f"{name}_sum"] == {(): 0.0}
        assert found[f"{name}_bucket"][("+Inf",)] == 0
    limits = fresh.frontend.engine.limits
    pages = limits.groups * (limits.pages - 1)
    assert found["sglang:cache_config_info"] == {(str(pages), str(limits.page_size)): 1.0}


def test_counts_after_known_traffic(fresh: Live):
    prompts = [list(range(base, base + 40)) for base in (1, 100, 200)]
    with fresh.http as client:
        for prompt in prompts:
            generate(client, prompt, 7)
        fresh.wait_idle()
        before = scrape(fresh)
        again = generate(client, prompts[0], 7)["meta_info"]["cached_tokens"]
    fresh.wait_idle()
    found = scrape(fresh)
    assert before["sglang:prompt_tokens_total"] == {(): 120}
    assert before["sglang:cached_tokens_total"] == {(): 0}
    assert before["sglang:cache_hit_rate"] == {(): 0}
    assert before["glmjax:computed_tokens_total"] == {(): 120}
    assert again == 32, "two whole pages"
    assert found["sglang:cached_tokens_total"] == {(): again}
    assert found["sglang:cache_hit_rate"] == {(): pytest.approx(again / 160)}
    assert found["glmjax:computed_tokens_total"] == {(): 160 - again}
    assert found["glmjax:prefix_cache_tokens"][()] >= 3 * 32
    assert found["sglang:generation_tokens_total"] == {(): 28}
    assert found["sglang:num_requests_total"] == {(): 4}
    assert found["sglang:num_aborted_requests_total"] == {(): 0}
    assert found["sglang:num_running_reqs"] == found["sglang:num_used_tokens"] == {(): 0}
    assert found["sglang:time_to_first_token_seconds_count"] == {(): 4}
    assert found["sglang:e2e_request_latency_seconds_count"] == {(): 4}
    assert 0 < found["sglang:gen_throughput"][()] <= 28 / request_times.RATE_WINDOW_S
    assert found["glmjax:steps_total"][()] >= 4
    for name in HISTOGRAMS:
        assert 0 < found[f"{name}_sum"][()] < 60


def test_drafts_by_their_place(fresh: Live):
    drafts = fresh.frontend.engine.limits.num_drafts
    assert drafts > 0
    with fresh.http as client:
        generate(client, [1, 2, 3], 60)
    fresh.wait_idle()
    found = scrape(fresh)
    drafted, accepted = (found[name] for name in COUNTERS_BY_POSITION)
    assert drafted.keys() == accepted.keys() == {(str(i),) for i in range(drafts)}
    assert all(accepted[place] <= drafted[place] for place in drafted)
    assert sum(drafted.values()) > 0
    rate = sum(accepted.values()) / sum(drafted.values())
    assert found["sglang:spec_accept_rate"] == {(): pytest.approx(rate)}
    assert 1 <= found["sglang:spec_accept_length"][()] <= drafts + 1


def test_who_runs_and_who_waits(served: ServedModel):
    with (
        live(served, slots=1, step_s=0.002) as server,
        server.http as client,
        ThreadPoolExecutor() as pool,
    ):
        engine = server.frontend.engine
        for name in ("running", "waiting", "waiting too"):
            sampling = GREEDY | {"max_new_tokens": 4000}
            body = {"input_ids": [1, 2, 3], "rid": name, "sampling_params": sampling}
            pool.submit(client.post, "/generate", json=body)
            wait_until(lambda: engine.snapshot().counters.generated_tokens > 0)
        wait_until(lambda: engine.load()[:2] == (1, 2))
        found = scrape(server)
        assert found["sglang:num_running_reqs"] == {(): 1}
        assert found["sglang:num_queue_reqs"] == {(): 2}
        used, usage = found["sglang:num_used_tokens"][()], found["sglang:token_usage"][()]
        assert usage == pytest.approx(used / engine.load().max_total_tokens)
        assert used > 0
        for name in ("waiting", "waiting too", "running"):
            client.post("/abort_request", json={"rid": name})
        server.wait_idle()
        found = scrape(server)
        assert found["sglang:num_aborted_requests_total"] == {(): 3}
        assert found["sglang:num_requests_total"] == {(): 3}
        assert found["sglang:time_to_first_token_seconds_count"] == {(): 1}
        assert found["sglang:e2e_request_latency_seconds_count"] == {(): 0}


def test_a_stop_string_is_no_abort(served: ServedModel):
    ids = served.tokenizer.encode("one two STOP three")
    with live(served, script=ids) as server, server.http as client:
        answer = generate(client, [1, 2, 3], 1000, stop=["STOP"])
        assert answer["meta_info"]["finish_reason"]["type"] == "stop"
        server.wait_idle()
        found = scrape(server)
    assert found["sglang:num_requests_total"] == {(): 1}
    assert found["sglang:num_aborted_requests_total"] == {(): 0}
    assert found["sglang:e2e_request_latency_seconds_count"] == {(): 1}


def test_a_client_that_leaves_is_an_abort(served: ServedModel):
    with live(served, step_s=0.002) as server, server.http as client:
        body = {
            "input_ids": [1, 2, 3],
            "stream": True,
            "sampling_params": GREEDY | {"max_new_tokens": 4000},
        }
        with client.stream("POST", "/generate", json=body) as response:
            next(response.iter_bytes())
        server.wait_idle()
        wait_until(lambda: scrape(server)["sglang:num_requests_total"] == {(): 1})
        assert scrape(server)["sglang:num_aborted_requests_total"] == {(): 1}


def test_requests_that_fail_are_counted(served: ServedModel):
    with (
        live(served, step_s=0.002) as server,
        server.http as client,
        ThreadPoolExecutor() as pool,
    ):
        body = {"input_ids": [1, 2, 3], "sampling_params": GREEDY | {"max_new_tokens": 4000}}
        answer = pool.submit(client.post, "/generate", json=body)
        wait_until(lambda: server.frontend.engine.load().running == 1)
        server.runner.broken = True
        assert answer.result().status_code == 500
        server.runner.broken = False
        assert generate(client, [1, 2, 3], 5)["output_ids"] == oracle([1, 2, 3], 5)
        server.wait_idle()
        found = scrape(server)
    assert found["glmjax:failed_requests_total"] == {(): 1}
    assert found["sglang:num_aborted_requests_total"] == {(): 1}
    assert found["sglang:num_requests_total"] == {(): 2}


def test_prometheus_gets_the_names_with_their_colons(fresh: Live):
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2"
    with fresh.http as client:
        answer = client.get("/metrics", headers={"accept": accept})
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "# TYPE sglang:prompt_tokens_total counter" in answer.text


VALUES = st.lists(
    st.tuples(st.floats(0, 20, allow_subnormal=False), st.integers(1, 4)), max_size=30
)


@given(VALUES)
@settings(deadline=None)
def test_histograms_count_what_is_at_most_each_bound(values: list[tuple[float, int]]):
    histogram = Histogram((0.5, 1.0, 10.0))
    for value, times in values:
        histogram.observe(value, times)
    flat = sorted(value for value, times in values for _ in range(times))
    expected = [*(bisect_right(flat, bound) for bound in histogram.bounds), len(flat)]
    assert histogram.cumulative() == expected
    assert histogram.sum == pytest.approx(sum(flat))


@given(
    st.lists(st.tuples(st.floats(0, 8), st.integers(1, 100)), max_size=30),
    st.floats(0, 30),
)
@settings(deadline=None)
def test_rates_forget_what_is_long_ago(events: list[tuple[float, int]], rest_s: float):
    rate, now, seen = Rate(), 1000.0, []
    for pause_s, count in events:
        now += pause_s
        rate.add(now, count)
        seen.append((now, count))
    now += rest_s
    begin = int(now) - request_times.RATE_WINDOW_S
    expected = sum(count for when, count in seen if when >= begin) / (now - begin)
    assert rate.per_second(now) == pytest.approx(expected)


def test_tokens_of_a_step_share_its_time(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 0.3, 0.7, 0.8])
    monkeypatch.setattr(request_times.time, "monotonic", lambda: next(clock))
    times = RequestTimes()
    ticket = times.began()
    times.output(ticket, 3)
    times.output(ticket, 4)
    times.ended(ticket, FinishReason.LENGTH)
    assert times.first_token.cumulative()[-1] == 1
    assert times.first_token.sum == pytest.approx(0.3)
    assert times.inter_token.cumulative()[-1] == 4, "not those that came with the first"
    assert times.inter_token.sum == pytest.approx(0.4)
    assert times.whole.sum == pytest.approx(0.8)
    assert times.ends == {FinishReason.LENGTH: 1}
