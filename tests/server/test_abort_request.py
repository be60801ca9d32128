"""Ending requests early: one, an answer of several, or all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live import Live, live, wait_until

from glmjax.server.served import ServedModel

LONG = {"max_new_tokens": 3000, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow(served: ServedModel) -> Iterator[Live]:
    """A server that takes its time."""
    with live(served, step_s=0.002) as server:
        yield server


@pytest.fixture
def client(slow: Live) -> Iterator[httpx.Client]:
    with slow.http as made:
        yield made
        made.post("/abort_request", json={"abort_all": True})
    slow.wait_idle()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as made:
        yield made


def begin(
    pool: ThreadPoolExecutor, slow: Live, running: int, path: str = "/generate", **body: Any
) -> Future[httpx.Response]:
    """Ask, and wait until so many requests run."""

    def ask() -> httpx.Response:
        with slow.http as client:
            return client.post(path, json=body)

    asked = pool.submit(ask)
    wait_until(lambda: asked.done() or slow.frontend.engine.load().running == running)
    return asked


def abort(client: httpx.Client, **body: Any) -> bool:
    response = client.post("/abort_request", json=body)
    assert response.status_code == 200, response.text
    return response.json()["aborted"]


def ends(asked: Future[httpx.Response]) -> list[str]:
    """Why its answers ended."""
    answers = asked.result().json()
    many = answers if isinstance(answers, list) else [answers]
    return [each["meta_info"]["finish_reason"]["type"] for each in many]


def test_all_requests(client: httpx.Client, slow: Live, pool: ThreadPoolExecutor):
    assert not abort(client, abort_all=True), "there is none"
    limits: dict[str, Any] = {"max_tokens": 3000, "ignore_eos": True}
    hi = [{"role": "user", "content": "hi"}]
    asked = begin(pool, slow, 1, text="a", sampling_params=LONG)
    batch = begin(pool, slow, 3, text=["b", "c"], rid="two", sampling_params=LONG)
    chat = begin(pool, slow, 4, "/v1/chat/completions", messages=hi, **limits)
    grammar = begin(pool, slow, 5, "/v1/completions", prompt="d", regex="a{3000}", max_tokens=3000)
    assert abort(client, rid="", abort_all=True, abort_message=None)
    assert ends(asked) + ends(batch) == ["abort"] * 3
    for each in (chat, grammar):
        assert each.result().json()["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ],
)
def test_completions_by_an_id_of_the_client(
    client: httpx.Client, slow: Live, pool: ThreadPoolExecutor, path: str, asked: dict, n: int
):
    body = asked | {"rid": "mine", "n": n, "max_tokens": 3000, "ignore_eos": True}
    running = begin(pool, slow, n, path, **body)
    error = client.post(path, json=body).json()["error"]
    assert error["param"] == "rid"
    assert "in use" in error["message"]
    assert abort(client, rid="mine")
    answer = running.result().json()
    assert answer["id"] == "mine"
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["abort"] * n
    assert client.post(path, json=asked | {"rid": "", "max_tokens": 1}).json()["id"] != ""


def test_a_request_that_the_engine_does_not_know_yet(
    client: httpx.Client, slow: Live, pool: ThreadPoolExecutor
):
    """Its grammar takes a while to compile."""
    regex = "|".join(f"{n:05}b+" for n in range(20_000))

    def ask() -> httpx.Response:
        sampling = {"max_new_tokens": 1000, "regex": regex}
        return client.post("/generate", json={"text": "a", "rid": "r", "sampling_params": sampling})

    asked = pool.submit(ask)
    wait_until(lambda: abort(client, rid="r"))
    assert ends(asked) == ["abort"]


def test_a_message(client: httpx.Client, slow: Live, pool: ThreadPoolExecutor):
    asked = begin(pool, slow, 1, text="a", rid="mine", sampling_params=LONG)
    assert abort(client, rid="mine", abort_all=False, abort_message="weights are new")
    finish = asked.result().json()["meta_info"]["finish_reason"]
    assert finish == {"type": "abort", "message": "weights are new"}
    asked = begin(pool, slow, 1, text="a", sampling_params=LONG)
    assert abort(client, abort_all=True)
    finish = asked.result().json()["meta_info"]["finish_reason"]
    assert finish == {"type": "abort", "message": "aborted"}


@pytest.mark.parametrize("body", [{}, {"rid": None}, {"rid": ""}, {"rid": "x"}, {"abort_all": 0}])
def test_what_names_no_request(
    client: httpx.Client, slow: Live, pool: ThreadPoolExecutor, body: dict[str, Any]
):
    asked = begin(pool, slow, 1, text="a", rid="xyz", sampling_params=LONG)
    assert not abort(client, **body)
    assert slow.frontend.engine.load().running == 1
    assert abort(client, rid="xyz")
    assert ends(asked) == ["abort"]


def test_one_answer_of_several(client: httpx.Client, slow: Live, pool: ThreadPoolExecutor):
    short = LONG | {"max_new_tokens": 300}
    asked = begin(pool, slow, 3, text=["a", "b", "c"], rid="zz", sampling_params=short)
    assert abort(client, rid="zz-1")
    assert ends(asked) == ["length", "abort", "length"]
    assert [each["meta_info"]["id"] for each in asked.result().json()] == ["zz-0", "zz-1", "zz-2"]
    asked = begin(pool, slow, 2, text="a", rid="zz", sampling_params=LONG | {"n": 2})
    assert abort(client, rid="zz")
    assert ends(asked) == ["abort", "abort"]
    assert not abort(client, rid="zz-1"), "it is over"


def test_an_id_for_each_prompt(client: httpx.Client, slow: Live, pool: ThreadPoolExecutor):
    short = LONG | {"max_new_tokens": 300}
    asked = begin(pool, slow, 2, text=["a", "b"], rid=["x", "y"], sampling_params=short)
    assert abort(client, rid="x")
    assert ends(asked) == ["abort", "length"]
    assert [each["meta_info"]["id"] for each in asked.result().json()] == ["x", "y"]
    sampling = [{"max_new_tokens": 1, "n": n} for n in (2, 2)]
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": sampling}
    answers = client.post("/generate", json=body).json()
    assert [each["meta_info"]["id"] for each in answers] == ["x-0", "x-1", "y-0", "y-1"]
    body = {"text": "a", "rid": ["x"], "sampling_params": {"max_new_tokens": 1}}
    assert client.post("/generate", json=body).json()["meta_info"]["id"] == "x"


@pytest.mark.parametrize(
    ("rid", "words"),
    [
        (["x"], "1 rid for 2 prompts"),
        (["x", "x"], "rid holds 'x', but"),
        (["", "x"], "rid holds '', but"),
        (["a\nb", "x"], "is not printable"),
        (["busy", "x"], "'busy' is in use"),
        ("busy", "'busy' is in use"),
    ],
)
def test_ids_that_cannot_be(
    client: httpx.Client, slow: Live, pool: ThreadPoolExecutor, rid: Any, words: str
):
    asked = begin(pool, slow, 1, text="a", rid="busy", sampling_params=LONG)
    refused = client.post("/generate", json={"text": ["a", "b"], "rid": rid})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["param"], words in error["message"]) == ("rid", True), error
    assert abort(client, rid="busy")
    assert ends(asked) == ["abort"]
    assert client.post("/generate", json={"text": "a", "rid": "x"}).status_code == 200


def test_ids_are_free_again(client: httpx.Client):
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": {"max_new_tokens": 1}}
    for _ in range(2):
        assert client.post("/generate", json=body).status_code == 200
