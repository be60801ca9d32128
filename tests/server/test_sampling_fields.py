"""Every field of sampling arrives at the device as it was asked for, through each protocol."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live, wait_until
from smg_grpc_proto import sglang_scheduler_pb2 as pb

from glmjax.errors import InvalidRequestError
from glmjax.server.sampling_fields import deadline, logit_bias, spelled
from glmjax.server.served import ServedModel
from glmjax.types import SamplingParams

FIELDS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.75,
    "top_k": 7,
    "min_p": 0.125,
    "frequency_penalty": 0.5,
    "presence_penalty": -1.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"5": 2.0, "500": -100.0},
    "stop_token_ids": [9, 10],
    "ignore_eos": True,
}
SEED = 77


def chat(server: Live, fields: dict[str, Any]) -> None:
    body = fields | {"messages": [{"role": "user", "content": "hi"}], "seed": SEED}
    post(server, "/v1/chat/completions", body | {"max_tokens": 4, "min_tokens": 2})


def complete(server: Live, fields: dict[str, Any]) -> None:
    body = fields | {"prompt": "hi", "max_tokens": 4, "min_tokens": 2, "seed": SEED}
    post(server, "/v1/completions", body)


def generate(server: Live, fields: dict[str, Any]) -> None:
    sampling = fields | {"max_new_tokens": 4, "min_new_tokens": 2, "sampling_seed": SEED}
    post(server, "/generate", {"text": "hi", "sampling_params": sampling})


def call(server: Live, fields: dict[str, Any]) -> None:
    sampling = pb.SamplingParams(max_new_tokens=4, min_new_tokens=2, **fields)
    request = pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=[1, 2]), sampling_params=sampling
    )
    with server.stub() as stub:
        list(stub.Generate(request))


def post(server: Live, path: str, body: dict[str, Any]) -> Any:
    with server.http as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("ask", [chat, complete, generate, call])
def test_every_field_arrives(server: Live, ask: Callable[[Live, dict[str, Any]], None]):
    server.runner.asked.clear()
    ask(server, FIELDS)
    asked = server.runner.asked[-1]
    bias = {5: 2.0, 500: -100.0}
    expected = FIELDS | {"logit_bias": bias, "stop_token_ids": frozenset([9, 10])}
    seed = asked.seed if ask is call else SEED  # the message has none
    assert asked == SamplingParams(**expected, max_new_tokens=4, min_new_tokens=2, seed=seed)


@pytest.mark.parametrize("ask", [chat, complete, generate])
def test_null_is_the_default(server: Live, ask: Callable[[Live, dict[str, Any]], None]):
    server.runner.asked.clear()
    ask(server, dict.fromkeys(FIELDS))
    assert server.runner.asked[-1] == SamplingParams(max_new_tokens=4, min_new_tokens=2, seed=SEED)


@pytest.mark.parametrize("ask", [chat, complete, generate])
def test_no_likeliest_tokens_are_all_tokens(
    server: Live, ask: Callable[[Live, dict[str, Any]], None]
):
    server.runner.asked.clear()
    ask(server, {"top_k": 0})
    assert server.runner.asked[-1].top_k == -1


def test_openais_client_passes_its_own_fields(server: Live):
    server.runner.asked.clear()
    with server.openai as client:
        client.chat.completions.create(
            model=server.model,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=2,
            frequency_penalty=0.5,
            presence_penalty=0.25,
            logit_bias={"7": -5},
        )
    asked = server.runner.asked[-1]
    assert (asked.frequency_penalty, asked.presence_penalty) == (0.5, 0.25)
    assert asked.logit_bias == {7: -5.0}


@settings(deadline=None)
@given(key=st.text(max_size=4) | st.integers(-5, 600).map(str))
def test_keys_of_logit_bias_are_ids(served: ServedModel, key: str):
    valid = key in {str(i) for i in range(512)} or (key.isdecimal() and key.isascii())
    if valid and int(key) < 512:
        assert logit_bias({key: 1.5}, served) == {int(key): 1.5}
    else:
        with pytest.raises(InvalidRequestError, match="token ids, 0 to 511") as caught:
            logit_bias({key: 1.5}, served)
        assert caught.value.param == "logit_bias"


def test_errors_speak_the_clients_language():
    with (
        pytest.raises(InvalidRequestError, match=r"^max_tokens is 0, but .* 1 or more") as caught,
        spelled({"max_new_tokens": "max_tokens"}),
    ):
        SamplingParams(max_new_tokens=0)
    assert caught.value.param == "max_tokens"


NAMES = {"max_new_tokens": "limit", "min_new_tokens": "least", "stop": "ends", "a": "b"}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("stop is 'stop'", "ends is 'stop'"),
        ("min_new_tokens 5 is above max_new_tokens 4", "least 5 is above limit 4"),
        ("3 a tokens and max_new_tokens 9 make 12", "3 a tokens and limit 9 make 12"),
        ("it has no <think>: leave stop out", "it has no <think>: leave ends out"),
        ("stop must be a schema: Invalid type: stop", "ends must be a schema: Invalid type: stop"),
        ('stop[0].stop is "max_new_tokens"', 'ends[0].stop is "max_new_tokens"'),
        ("stopping a stop is not a stop", "stopping a stop is not a stop"),
    ],
)
def test_words_of_the_client_stay_as_they_are(said: str, told: str):
    with pytest.raises(InvalidRequestError) as caught, spelled(NAMES):
        raise InvalidRequestError(said, "stop")
    assert (str(caught.value), caught.value.param) == (told, "ends")


def test_errors_about_other_fields_stay_as_they_are():
    with pytest.raises(InvalidRequestError, match=r"^stop is it$") as caught, spelled(NAMES):
        raise InvalidRequestError("stop is it", "other")
    assert caught.value.param == "other"


# Priorities and deadlines


def test_a_timeout_ends_a_request(served: ServedModel, caplog: Any):
    caplog.set_level(logging.INFO, "glmjax.server.frontend")
    with live(served, step_s=0.005) as server, server.http as client:
        body: dict[str, Any] = {"prompt": "hi", "max_tokens": 4000, "timeout": 0.2}
        body["ignore_eos"] = True
        begun = time.monotonic()
        response = client.post("/v1/completions", json=body)
        assert time.monotonic() - begun < 5
        assert response.status_code == 504
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded")
        assert error["message"].startswith("deadline")

        lines = client.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        last = json.loads(lines[-3].removeprefix("data: "))
        assert last["error"]["code"] == "deadline_exceeded"
        assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"]

        body = {"text": "hi", "timeout": 0.2, "sampling_params": {"max_new_tokens": 4000}}
        body["sampling_params"]["ignore_eos"] = True
        assert client.post("/generate", json=body).status_code == 504
        server.wait_idle()
    lines = [record.getMessage() for record in caplog.records]
    assert ["failed ('deadline" in line for line in lines] == [True] * 3


def test_a_timeout_in_time_changes_nothing(server: Live):
    with server.http as client:
        body = {"prompt": "hi", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        plain = client.post("/v1/completions", json=body).json()
        timed = client.post("/v1/completions", json=body | {"timeout": 60}).json()
    assert plain["choices"] == timed["choices"]


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan")])
def test_timeouts_are_above_0(timeout_s: float):
    with pytest.raises(InvalidRequestError, match="seconds above 0") as caught:
        deadline(timeout_s)
    assert caught.value.param == "timeout"


@pytest.mark.parametrize("path", ["/v1/completions", "/generate"])
def test_a_higher_priority_goes_first(served: ServedModel, path: str):
    with live(served, slots=1, step_s=0.002) as server, ThreadPoolExecutor(3) as pool:

        def ask(tokens: int, priority: int) -> float:
            sampling = {"ignore_eos": True, "max_new_tokens": tokens}
            body: dict[str, Any] = {"text": "hi", "sampling_params": sampling}
            if path != "/generate":
                body = {"prompt": "hi", "ignore_eos": True, "max_tokens": tokens}
            post(server, path, body | {"priority": priority})
            return time.monotonic()

        load = server.frontend.engine.load
        first = pool.submit(ask, 300, 0)
        wait_until(lambda: load().running == 1)
        low = pool.submit(ask, 2, 0)
        wait_until(lambda: load().waiting == 1)
        high = pool.submit(ask, 2, 5)
        assert high.result() < low.result()
        first.result()
