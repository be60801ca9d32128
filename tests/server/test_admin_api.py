"""Forgetting the cache, pausing and going on, over real servers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live import Live, live, oracle, wait_until

from glmjax.server.served import ServedModel
from glmjax.server.sglang.admin_api import PAUSES

PROMPT = list(range(1, 50))


@pytest.fixture
def client(server: Live) -> Iterator[httpx.Client]:
    with server.http as http:
        yield http
        assert http.post("/continue_generation").status_code == 200
        server.wait_idle()


def body(count: int = 10, **fields: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "ignore_eos": True, "max_new_tokens": count}
    return {"input_ids": PROMPT, "sampling_params": sampling, **fields}


def cached_tokens(client: httpx.Client) -> int:
    return client.post("/generate", json=body()).json()["meta_info"]["cached_tokens"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flushing_the_cache(server: Live, client: httpx.Client, method: str):
    cached_tokens(client)
    assert cached_tokens(client) == 48
    done = client.request(method, "/flush_cache")
    assert done.json() == {"success": True, "message": "the prefix cache is empty"}
    state = client.get("/get_server_info").json()["internal_states"][0]
    assert state["num_cached_tokens"] == 0
    assert cached_tokens(client) == 0
    assert cached_tokens(client) == 48, "and it fills again"


@pytest.mark.parametrize("mode", PAUSES)
def test_a_request_of_a_paused_server_waits(server: Live, client: httpx.Client, mode: str):
    assert client.post("/pause_generation", json={"mode": mode}).json()["success"]
    assert client.get("/get_server_info").json()["paused"]
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/generate", json=body())
        time.sleep(0.2)
        assert not answer.done()
        assert server.frontend.engine.load()[:2] == (0, 1)
        assert client.get("/health").status_code == 200
        assert client.post("/continue_generation").json()["success"]
        assert answer.result().json()["output_ids"] == oracle(PROMPT, 10)
    assert not client.get("/get_server_info").json()["paused"]


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_running_request_stands_still_and_goes_on(served: ServedModel, mode: str):
    with live(served, step_s=0.002) as server, server.http as client:
        with client.stream("POST", "/generate", json=body(400, stream=True)) as response:
            lines = (line for line in response.iter_lines() if line)
            next(lines)
            assert client.post("/pause_generation", json={"mode": mode}).json()["success"]
            time.sleep(0.05)  # what was launched before is still read
            load, retracted = server.frontend.engine.load, mode == "retract"
            wait_until(lambda: load()[:2] == ((0, 1) if retracted else (1, 0)))
            assert counters(server).preemptions == retracted
            if retracted:  # nothing of it is left on the device
                client.post("/flush_cache")
                assert (load().cached_tokens, load().used_tokens) == (0, 0)
            counts = [counters(server) for _ in range(2) if time.sleep(0.1) is None]
            assert counts[0] == counts[1]
            assert counts[0].generated_tokens < 400
            client.post("/continue_generation")
            *_, last, done = lines
        assert done == "data: [DONE]"
        answer = json.loads(last.removeprefix("data: "))
        assert answer["output_ids"] == oracle(PROMPT, 400)
        server.wait_idle()


def counters(server: Live):
    return server.frontend.engine.snapshot().counters


def test_an_abort_reaches_a_request_of_a_paused_server(client: httpx.Client):
    client.post("/pause_generation", json={"mode": "in_place"})
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/generate", json=body(rid="paused"))
        while not client.post("/abort_request", json={"rid": "paused"}).json()["aborted"]:
            time.sleep(0.01)
        finish = answer.result().json()["meta_info"]["finish_reason"]
    assert finish["type"] == "abort"


def test_pausing_and_going_on_twice(client: httpx.Client):
    for path in ("pause_generation", "pause_generation", "continue_generation"):
        assert client.post(f"/{path}").json()["success"]
    assert client.post("/generate", json=body()).json()["output_ids"] == oracle(PROMPT, 10)


@pytest.mark.parametrize("given", [{}, {"json": {}}, {"json": {"mode": "abort", "x": None}}])
def test_a_pause_ends_all_requests(served: ServedModel, given: dict[str, Any]):
    """As trainers have it, which post no body and wait for answers that were aborted."""
    with (
        live(served, slots=1, step_s=0.002) as server,
        server.http as client,
        ThreadPoolExecutor() as pool,
    ):
        load = server.frontend.engine.load
        answers = [pool.submit(client.post, "/generate", json=body(2000)) for _ in range(2)]
        wait_until(lambda: load()[:2] == (1, 1))
        assert client.post("/pause_generation", **given).json()["success"]
        said = [answer.result().json() for answer in answers]
        assert [each["meta_info"]["finish_reason"]["type"] for each in said] == ["abort"] * 2
        for each in said:
            assert each["output_ids"] == oracle(PROMPT, len(each["output_ids"]))
        later = pool.submit(client.post, "/generate", json=body())
        wait_until(lambda: load()[:2] == (0, 1))
        client.post("/continue_generation")
        assert later.result().json()["output_ids"] == oracle(PROMPT, 10)


@pytest.mark.parametrize("mode", ["aborted", ""])
def test_other_ways_to_pause_are_refused(client: httpx.Client, mode: str):
    refusal = client.post("/pause_generation", json={"mode": mode})
    assert refusal.status_code == 400
    error = refusal.json()["error"]
    assert error["param"] == "mode"
    assert f"mode is {mode!r}, but must be one of ['abort'" in error["message"]
    assert not client.get("/get_server_info").json()["paused"]


def test_pausing_with_a_body_that_is_not_known(client: httpx.Client):
    refusal = client.post("/pause_generation", json={"modus": "in_place"})
    assert refusal.status_code == 400
    assert refusal.json()["error"]["param"] == "modus"
    assert not client.get("/get_server_info").json()["paused"]


def test_while_the_server_shuts_down(served: ServedModel):
    with live(served) as server, server.http as client:
        assert server.drain()
        assert client.post("/flush_cache").status_code == 200
        server.frontend.engine.close()
        for path in ("flush_cache", "pause_generation", "continue_generation"):
            refusal = client.post(f"/{path}")
            assert refusal.status_code == 503
            assert "stopped" in refusal.json()["error"]["message"]


def test_what_the_server_tells_of_itself(server: Live, client: httpx.Client):
    client.post("/flush_cache")
    cached_tokens(client)
    info = client.get("/get_server_info").json()
    assert info["weight_version"] == "default"
    assert info["paused"] is False
    state = info["internal_states"][0]
    assert state["num_cached_tokens"] >= 48
    assert 0 < state["cache_hit_rate"] < 1
    assert 1 <= state["avg_spec_accept_length"] <= server.frontend.engine.limits.num_drafts + 1
    assert state["last_gen_throughput"] > 0


@pytest.mark.parametrize("path", ["/get_model_info", "/model_info"])
def test_what_the_model_is(server: Live, client: httpx.Client, path: str):
    folder = str(server.frontend.served.folder)
    assert client.get(path).json() == {
        "model_path": folder,
        "tokenizer_path": folder,
        "served_model_name": server.model,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
    }


def test_how_busy_it_is(served: ServedModel):
    with live(served, slots=1, step_s=0.002) as server, server.http as client:
        with ThreadPoolExecutor() as pool:
            for _ in range(3):
                pool.submit(client.post, "/generate", json=body(2000))
            wait_until(lambda: server.frontend.engine.load()[:2] == (1, 2))
            (load,) = client.get("/v1/loads?include=core").json()["loads"]
            old = client.get("/get_load").json()
            client.post("/abort_request", json={"abort_all": True})
        numbers = {"num_running_reqs": 1, "num_waiting_reqs": 2, "num_total_reqs": 3}
        assert load.items() >= ({"dp_rank": 0} | numbers).items()
        assert old[0].pop("num_tokens") > 0
        assert old == [{"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 2}]
        server.wait_idle()
        (load,) = client.get("/v1/loads").json()["loads"]
        assert load["num_total_reqs"] == 0


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_a_look_at_the_head(client: httpx.Client, path: str):
    head, whole = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == whole.headers["content-type"]
