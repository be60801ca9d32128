"""Real servers on real ports, over an engine whose runner needs no device."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc
import httpx
import numpy as np
import openai
import pytest
from smg_grpc_proto import sglang_scheduler_pb2_grpc as pb_grpc

from glmjax.config import SchedulerConfig
from glmjax.engine import Engine
from glmjax.plans import ChunkRow, Limits, StepPlan, StepResult
from glmjax.runner.fake import FakeHandle, FakeRunner, next_token
from glmjax.scheduler.buckets import make_buckets
from glmjax.server.access import EVERYONE, Access
from glmjax.server.frontend import Frontend
from glmjax.server.served import ServedModel
from glmjax.server.serving import running
from glmjax.types import SamplingParams

HOST = "127.0.0.1"
DRAFTS = 3


class PacedRunner(FakeRunner):
    """A runner whose steps may take a while, follow a script, or fail.

    Attributes:
        step_s: seconds a step takes.
        script: what to answer every prompt with, again and again; None: noise.
        broken: whether the next step fails.
        asked: how the sequences that came by wanted to be sampled.
    """

    def __init__(self, limits: Limits, step_s: float = 0.0, script: list[int] | None = None):
        self.step_s, self.script, self.broken = step_s, script, False
        self.asked: list[SamplingParams] = []
        self._prompt_len: dict[int, int] = {}
        super().__init__(limits)

    def launch(self, plan: StepPlan) -> FakeHandle:
        if self.broken:
            raise RuntimeError("the device is on fire")
        time.sleep(self.step_s)
        return super().launch(plan)

    def _chunk(
        self, g: int, c: int, row: ChunkRow, result: StepResult, plan: StepPlan, first: int
    ) -> None:
        self.asked.append(row.sampling)
        self._prompt_len[row.slot] = row.start + len(row.token_ids)
        super()._chunk(g, c, row, result, plan, first)

    def _sample(self, g: int, slot: int, seen: np.ndarray, mask: np.ndarray | None) -> int:
        if self.script is None:
            return super()._sample(g, slot, seen, mask)
        token = self.script[(len(seen) - self._prompt_len[slot]) % len(self.script)]
        allowed = mask is None or mask[token // 32] >> np.uint32(token % 32) & np.uint32(1)
        return token if allowed else super()._sample(g, slot, seen, mask)


def make_limits(served: ServedModel, slots: int) -> Limits:
    pages = slots * -(-served.max_seq_len // 16) + 1
    return Limits(
        groups=1,
        slots=slots,
        pages=pages,
        page_size=16,
        max_seq_len=served.max_seq_len,
        num_drafts=DRAFTS,
        vocab_size=served.config.vocab_size,
        buckets=make_buckets(slots, 64, DRAFTS),
    )


def make_engine(
    served: ServedModel, slots: int = 8, queue: int = 64, **runner_options
) -> tuple[Engine, PacedRunner]:
    runner = PacedRunner(make_limits(served, slots), **runner_options)
    config = SchedulerConfig(max_queued_requests=queue)
    return Engine(runner, config, served.eos_token_ids), runner


def oracle(
    prompt_ids: list[int], count: int, seed: int = 0, ends: tuple[int, ...] = ()
) -> list[int]:
    """What the runner continues a prompt with: `count` tokens, or up to one of `ends`."""
    tokens = list(prompt_ids)
    while len(tokens) < len(prompt_ids) + count:
        tokens.append(next_token(np.array(tokens), seed, 512))
        if tokens[-1] in ends:
            break
    return tokens[len(prompt_ids) :]


@dataclass
class Live:
    """Servers that are up, and clients of them."""

    frontend: Frontend
    runner: PacedRunner
    http_port: int
    grpc_port: int
    loop: asyncio.AbstractEventLoop

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.http_port}"

    @property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=False)  # no TLS: quick to make

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=30)

    @property
    def model(self) -> str:
        return self.frontend.served.name

    @contextlib.contextmanager
    def stub(self) -> Iterator[pb_grpc.SglangSchedulerStub]:
        with grpc.insecure_channel(f"{HOST}:{self.grpc_port}") as channel:
            yield pb_grpc.SglangSchedulerStub(channel)

    def drain(self, timeout_s: float = 20) -> bool:
        """Drain from outside the servers' loop; blocks until done."""
        work = self.frontend.engine.drain(timeout_s)
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s + 5)

    def wait_idle(self) -> None:
        """Until no request holds a slot or waits."""
        wait_until(lambda: sum(self.frontend.engine.load()[:3]) == 0)


def wait_until(holds: Callable[[], bool], timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def logged(caplog: pytest.LogCaptureFixture, *parts: str) -> str:
    """The only line of the log with all `parts`, for which it waits: ends of streams reach clients
    before the log."""

    def found() -> list[str]:
        return [line for line in caplog.messages if all(part in line for part in parts)]

    wait_until(lambda: bool(found()))
    (line,) = found()
    return line


@contextlib.contextmanager
def live(served: ServedModel, access: Access = EVERYONE, **engine_options) -> Iterator[Live]:
    """Servers on a thread of their own, with an event loop of their own."""
    engine, runner = make_engine(served, **engine_options)
    up, down = threading.Event(), asyncio.Event()
    found: list[Live] = []

    async def main() -> None:
        async with running(engine, served, access, HOST, 0, 0) as servers:
            ports = (servers.http_port, servers.grpc_port)
            found.append(Live(servers.frontend, runner, *ports, asyncio.get_running_loop()))
            up.set()
            await down.wait()

    def run() -> None:
        try:
            asyncio.run(main())
        finally:
            up.set()

    thread = threading.Thread(target=run)
    thread.start()
    up.wait()
    try:
        assert found, "the servers did not start"
        yield found[0]
    finally:
        if found:
            found[0].loop.call_soon_threadsafe(down.set)
        thread.join()
