"""Two replicas behind a real gateway, one of which is killed or stopped while it answers."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import gateway
from processes import ROOT, Server, wait_until_ready

pytestmark = pytest.mark.slow

MODEL = "glm-nano"
# As docs/deploy.md says, which tells why.
OPTIONS = ("--disable-worker-overload-protection", "--load-monitor-interval", "2")
OPTIONS += ("--health-check-interval-secs", "2")
# Few at once in a replica, so that one with a queue has work for longer than it takes to kill it.
SHAPES = ("--max-running-requests", "2", "--chunked-prefill-size", "64")
QUEUED = 2
FAST = {"XLA_FLAGS": ""}  # the optimised programs that users get
REQUESTS = 40
AT_ONCE = 12
BACK_TIMEOUT_S = 60
WORK_TIMEOUT_S = 60
SUMS = [(4821 + 37 * i, 397 + i) for i in range(REQUESTS)]

Answer = tuple[str, str]  # text, and how it ended: a finish reason, or an error's type


@dataclass
class Fleet:
    """Replicas, and the gateway's URL before all of them."""

    replicas: list[Server]
    url: str
    environment: dict[str, str]

    def revive(self) -> list[Server]:
        """Start those that have ended, each on its own ports; gives them once they answer."""
        dead = [server for server in self.replicas if server.process.poll() is not None]
        for server in dead:
            with server.log.open("a") as log:
                server.process = subprocess.Popen(
                    server.process.args, cwd=ROOT, env=self.environment, stderr=log, text=True
                )
        for server in dead:
            wait_until_ready(server)
        return dead

    async def busiest(self) -> Server:
        """The replica with the longer queue, as soon as one has `QUEUED` behind what it answers."""
        deadline = time.monotonic() + WORK_TIMEOUT_S
        while time.monotonic() < deadline:
            queued = [measure(server, "sglang:num_queue_reqs") for server in self.replicas]
            if max(queued) >= QUEUED:
                return self.replicas[queued.index(max(queued))]
            await asyncio.sleep(0.01)
        raise AssertionError("no replica had enough to answer")

    def until_used(self, server: Server) -> None:
        """Ask until the gateway gives a replica something to do."""
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while measure(server, "sglang:num_requests_total") == 0:
            assert time.monotonic() < deadline, "the gateway does not use the replica"
            asyncio.run(ask_all(self.url))


def measure(server: Server, name: str) -> float:
    """A sample of /metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return next(sample.value for sample in samples if sample.name == name)


@pytest.fixture(scope="module")
def started(start_server, environment, tmp_path_factory) -> Iterator[Fleet]:
    log = tmp_path_factory.mktemp("smg") / "smg.log"
    with start_server(*SHAPES, **FAST) as one, start_server(*SHAPES, **FAST) as other:
        replicas = [one, other]
        ports = [server.grpc_port for server in replicas]
        with gateway(ports, MODEL, log, *OPTIONS) as url:
            fleet = Fleet(replicas, url, environment | FAST)
            try:
                yield fleet
            finally:
                for server in replicas:
                    server.process.kill()
                    server.process.wait()


@pytest.fixture
def fleet(started: Fleet) -> Fleet:
    """Two replicas that run, and that the gateway uses."""
    started.revive()
    for server in started.replicas:
        started.until_used(server)
    return started


@pytest.fixture(scope="module")
def right(started: Fleet) -> list[Answer]:
    """What one replica answers itself, with its thoughts in the text: so the gateway has them."""
    raw = {"separate_reasoning": False}
    answers = asyncio.run(ask_all(f"{started.replicas[0].url}/v1", extra_body=raw))
    assert [end for _, end in answers] == ["stop"] * REQUESTS
    assert len(set(answers)) == REQUESTS
    return answers


async def whole(client: openai.AsyncOpenAI, **request: Any) -> Answer:
    answer = await client.chat.completions.create(**request)
    return answer.choices[0].message.content or "", answer.choices[0].finish_reason


async def tried(client: openai.AsyncOpenAI, **request: Any) -> Answer:
    """As `whole`, with an error in the place of an answer that there is none of."""
    try:
        return await whole(client, **request)
    except openai.APIError as error:
        return "", str(error)


async def streamed(client: openai.AsyncOpenAI, **request: Any) -> Answer:
    """An error in the middle of a stream is an end of its own; what came before it is kept."""
    text, end = "", "no end"
    try:
        async for chunk in await client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                end = choice.finish_reason or end
    except openai.APIError as error:
        end = error.type or str(error)
    return text, end


async def ask_all(
    url: str,
    way: Callable[..., Any] = whole,
    meanwhile: Callable[[], Any] | None = None,
    **more: Any,
) -> list[Answer]:
    """Every sum, `AT_ONCE` at a time, with no second try of the client's own."""
    turns = asyncio.Semaphore(AT_ONCE)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

        async def ask(a: int, b: int) -> Answer:
            messages = [{"role": "user", "content": f"What is {a} + {b}?"}]
            async with turns:
                return await way(client, model=MODEL, messages=messages, temperature=0, **more)

        answers = asyncio.gather(*(ask(a, b) for a, b in SUMS))
        if meanwhile:
            await meanwhile()
        return await answers


def end_one(fleet: Fleet, kind: signal.Signals, way: Callable[..., Any]) -> Any:
    """All answers, with a replica signalled while it answers some; and that replica."""
    ended: list[Server] = []

    async def end() -> None:
        ended.append(await fleet.busiest())
        ended[0].process.send_signal(kind)

    return asyncio.run(ask_all(fleet.url, way, end)), ended[0]


def test_a_replica_killed_while_it_answers_loses_no_answer(fleet, right):
    answers, killed = end_one(fleet, signal.SIGKILL, whole)
    assert killed.process.wait(60) == -signal.SIGKILL
    assert answers == right
    assert asyncio.run(ask_all(fleet.url)) == right  # and with one left


def test_a_replica_that_comes_back_under_load_is_used_again(fleet, right):
    fleet.replicas[1].process.kill()
    fleet.replicas[1].process.wait()
    answers: list[list[Answer]] = []
    used = threading.Event()

    def ask() -> None:
        while not used.is_set():
            answers.append(asyncio.run(ask_all(fleet.url, tried)))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        assert fleet.revive() == [fleet.replicas[1]]
        fleet.until_used(fleet.replicas[1])
    finally:
        used.set()
        asking.join()
    assert answers == [right] * len(answers)


@pytest.mark.parametrize("way", [whole, streamed])
def test_a_replica_told_to_stop_finishes_what_it_answers(fleet, right, way):
    answers, stopped = end_one(fleet, signal.SIGTERM, way)
    assert stopped.process.wait(60) == 0
    assert answers == right


def test_a_stream_of_a_killed_replica_ends_with_an_error_and_no_wrong_word(fleet, right):
    answers, _ = end_one(fleet, signal.SIGKILL, streamed)
    cut = [(text, i) for i, (text, end) in enumerate(answers) if end != "stop"]
    assert cut
    assert {answers[i][1] for _, i in cut} == {"stream_error"}
    assert all(right[i][0].startswith(text) for text, i in cut)
    assert [a for a in answers if a[1] == "stop"] == [
        r for a, r in zip(answers, right, strict=True) if a[1] == "stop"
    ]
