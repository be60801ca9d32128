"""Servers under load, left by their clients, drained, broken and stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live import HOST, Live, live, make_engine, oracle, wait_until
from ports import free_ports
from smg_grpc_proto import sglang_scheduler_pb2 as pb

from glmjax.errors import ConfigError
from glmjax.server.access import EVERYONE
from glmjax.server.http.server import listen
from glmjax.server.served import ServedModel
from glmjax.server.serving import running, serve

ENDLESS = {"temperature": 0, "max_new_tokens": 4000, "ignore_eos": True}
STEP_S = 0.002


def endless(name: str, **fields: Any) -> dict[str, Any]:
    return {"input_ids": [1, 2, 3], "rid": name, "sampling_params": ENDLESS, **fields}


def grpc_request(name: str, count: int = 4000, stream: bool = True) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        request_id=name,
        stream=stream,
        tokenized=pb.TokenizedInput(input_ids=[1, 2, 3]),
        sampling_params=pb.SamplingParams(max_new_tokens=count, ignore_eos=True),
    )


def load(server: Live) -> tuple[int, int]:
    numbers = server.frontend.engine.load()
    return numbers.running, numbers.waiting


def test_a_full_queue(served: ServedModel):
    with (
        live(served, slots=1, queue=1, step_s=STEP_S) as server,
        server.http as client,
        server.stub() as stub,
    ):
        with client.stream("POST", "/generate", json=endless("a", stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            waiting_one = stub.Generate(grpc_request("b"))
            wait_until(lambda: load(server) == (1, 1))
            refusal = client.post("/generate", json=endless("c"))
            assert refusal.status_code == 429
            assert int(refusal.headers["retry-after"]) >= 1
            assert refusal.json()["error"]["code"] == "queue_full"
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.Generate(grpc_request("d")))
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert client.get("/health").status_code == 200, "busy, not ill"
            waiting_one.cancel()
        server.wait_idle()


def leave_stream(server: Live, client: httpx.Client) -> None:
    with client.stream("POST", "/generate", json=endless("s", stream=True)) as response:
        next(response.iter_bytes())


def leave_openai_stream(server: Live, client: httpx.Client) -> None:
    body = {"prompt": [1], "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_bytes())


def leave_one_shot(server: Live, client: httpx.Client) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/generate", json=endless("o"), timeout=0.2)


def leave_grpc(server: Live, client: httpx.Client) -> None:
    with server.stub() as stub:
        call = stub.Generate(grpc_request("g"))
        next(call)
        call.cancel()


def leave_by_deadline(server: Live, client: httpx.Client) -> None:
    with server.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(grpc_request("d"), timeout=0.2))
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    "leave", [leave_stream, leave_openai_stream, leave_one_shot, leave_grpc, leave_by_deadline]
)
def test_a_client_that_leaves_frees_its_slot(
    served: ServedModel, leave: Callable[[Live, httpx.Client], None], caplog
):
    caplog.set_level(logging.INFO, "glmjax")
    with live(served, slots=1, step_s=STEP_S) as server, server.http as client:
        leave(server, client)
        short = ENDLESS | {"max_new_tokens": 4}
        answer = client.post("/generate", json=endless("next", sampling_params=short)).json()
        assert answer["output_ids"] == oracle([1, 2, 3], 4)
        server.wait_idle()
    assert "cancelled" in caplog.text
    assert "next: 3 prompt + 4 completion tokens, length" in caplog.text


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_aborting_by_id(served: ServedModel, protocol: str):
    with (
        live(served, step_s=STEP_S) as server,
        server.http as client,
        server.stub() as stub,
        ThreadPoolExecutor() as pool,
    ):
        answer = pool.submit(client.post, "/generate", json=endless("mine"))
        call = stub.Generate(grpc_request("other"))
        next(call)
        wait_until(lambda: load(server)[0] == 2)
        if protocol == "http":
            for name in ("mine", "other"):
                done = client.post("/abort_request", json={"rid": name}).json()
                assert done == {"aborted": True}
            done = client.post("/abort_request", json={"rid": "mine, long gone"}).json()
            assert done == {"aborted": False}
        else:
            for name in ("mine", "other"):
                assert stub.Abort(pb.AbortRequest(request_id=name)).success
            assert not stub.Abort(pb.AbortRequest(request_id="unknown")).success
        assert answer.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert list(call)[-1].complete.finish_reason == "abort"
        server.wait_idle()


def test_an_id_in_use(served: ServedModel):
    with live(served, step_s=STEP_S) as server, server.http as client:
        with client.stream("POST", "/generate", json=endless("twin", stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            assert client.post("/generate", json=endless("twin")).status_code == 400
        server.wait_idle()


def test_draining(served: ServedModel):
    with (
        live(served, step_s=STEP_S) as server,
        server.http as client,
        server.stub() as stub,
        ThreadPoolExecutor() as pool,
        grpc.insecure_channel(f"{HOST}:{server.grpc_port}") as channel,
    ):
        params = ENDLESS | {"max_new_tokens": 150}
        answer = pool.submit(client.post, "/generate", json=endless("a", sampling_params=params))
        call = stub.Generate(grpc_request("b", 150))
        next(call)
        wait_until(lambda: load(server)[0] == 2)
        drained = pool.submit(server.drain)
        wait_until(lambda: client.get("/health").status_code == 503)
        assert not drained.done()
        refusal = client.post("/v1/completions", json={"prompt": "hi"})
        assert refusal.status_code == 503
        assert "shutting down" in refusal.json()["error"]["message"]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(grpc_request("c")))
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stub.HealthCheck(pb.HealthCheckRequest()).healthy
        status = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status
        assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert len(answer.result().json()["output_ids"]) == 150
        assert len(list(call)[-1].complete.output_ids) == 150
        assert drained.result()


@dataclass
class Ends:
    """How three requests that ran ended, each told in its own way."""

    stream: str
    whole: httpx.Response
    call: grpc.Call


def fail_while_busy(server: Live, client: httpx.Client, stub) -> Ends:
    """Break the runner while requests run."""
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(client.post, "/generate", json=endless("whole"))
        call = stub.Generate(grpc_request("call"))
        next(call)
        with client.stream("POST", "/generate", json=endless("stream", stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            wait_until(lambda: load(server)[0] == 3)
            server.runner.broken = True
            *_, last, done = filter(None, lines)
        assert done == "data: [DONE]"
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert isinstance(caught.value, grpc.Call)
        return Ends(last, whole.result(), caught.value)


def test_a_step_that_fails(served: ServedModel):
    with live(served, step_s=STEP_S) as server, server.http as client, server.stub() as stub:
        ends = fail_while_busy(server, client, stub)
        assert '"code":"engine_error"' in ends.stream
        assert "the device is on fire" in ends.stream
        assert ends.whole.status_code == 500
        assert "the device is on fire" in ends.whole.json()["error"]["message"]
        assert ends.call.code() is grpc.StatusCode.INTERNAL
        assert client.get("/health").json() == {"status": "running"}
        server.runner.broken = False
        short = ENDLESS | {"max_new_tokens": 4}
        answer = client.post("/generate", json=endless("next", sampling_params=short)).json()
        assert answer["output_ids"] == oracle([1, 2, 3], 4)
        server.wait_idle()


def test_an_engine_that_cannot_go_on(served: ServedModel, monkeypatch: pytest.MonkeyPatch):
    def lost() -> None:
        raise RuntimeError("the device is gone")

    with live(served, step_s=STEP_S) as server, server.http as client, server.stub() as stub:
        monkeypatch.setattr(server.runner, "reset", lost)
        ends = fail_while_busy(server, client, stub)
        assert '"code":"unavailable"' in ends.stream
        assert "the device is on fire" in ends.stream
        assert "the device is gone" in ends.stream
        assert ends.whole.status_code == 503
        assert ends.call.code() is grpc.StatusCode.UNAVAILABLE
        assert "the device is gone" in (ends.call.details() or "")
        assert client.get("/health").json() == {"status": "failed"}
        assert client.get("/health_generate").status_code == 503
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert not stub.HealthCheck(pb.HealthCheckRequest()).healthy


def test_a_taken_port(served: ServedModel):
    async def start(port: int, grpc_port: int) -> None:
        async with running(make_engine(served)[0], served, EVERYONE, HOST, port, grpc_port):
            pytest.fail("it started")

    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port}.*another port"):
            asyncio.run(start(port, 0))
        with pytest.raises(ConfigError, match=f"port {port}.*--grpc-port"):
            asyncio.run(start(0, port))


def test_small_writes_leave_at_once():
    with (
        listen(HOST, 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as connection,
    ):
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def serve_and(served: ServedModel, client: Callable[[str], Any]) -> Any:
    """Run `serve` on this, the main thread, with a client in another; SIGTERM at its word."""
    engine, _ = make_engine(served, step_s=STEP_S)
    port, results = free_ports(1)[0], []

    def work() -> None:
        url = f"http://{HOST}:{port}"
        wait_until(lambda: answers(url))
        results.append(client(url))

    thread = threading.Thread(target=work)
    thread.start()
    asyncio.run(serve(engine, served, EVERYONE, HOST, port, 0, drain_timeout_s=30))
    thread.join()
    return results[0]


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.ConnectError:
        return False


def test_sigterm_drains(served: ServedModel, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "glmjax")

    def client(url: str) -> int:
        params = ENDLESS | {"max_new_tokens": 100}
        body = endless("last", stream=True, sampling_params=params)
        with httpx.stream("POST", f"{url}/generate", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGTERM)
            *_, last, done = filter(None, lines)
            assert done == "data: [DONE]"
            return json.loads(last.removeprefix("data: "))["meta_info"]["completion_tokens"]

    assert serve_and(served, client) == 100
    for words in ("ready: tiny-glm at http://", "draining: 1 requests", "stopped"):
        assert words in caplog.text


def test_a_second_signal_ends_at_once(served: ServedModel):
    def client(url: str) -> str:
        with httpx.stream("POST", f"{url}/generate", json=endless("x", stream=True)) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
            os.kill(os.getpid(), signal.SIGTERM)
            return [line for line in lines if line][-2]

    assert "the server has stopped" in serve_and(served, client)
