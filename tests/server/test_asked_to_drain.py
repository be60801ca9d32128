"""A server of several hosts, of which any may be told to stop, or all at once."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from live import HOST, make_engine, wait_until

from glmjax.server.access import EVERYONE
from glmjax.server.served import ServedModel
from glmjax.server.serving import serve

COUNT = 200
STEP_S = 0.004
SOON_S = 20.0


class Told:
    """What happens to a server, in turn."""

    def __init__(self, url: str, drain: Callable[[], object]):
        self._url, self._drain, self._own = url, drain, iter((signal.SIGTERM, signal.SIGINT))

    def other(self) -> None:
        """Another host was told to stop."""
        self._drain()
        wait_until(lambda: httpx.get(f"{self._url}/health").status_code == 503)

    def own(self) -> None:
        """This process gets a signal, of another kind each time, so that none is lost."""
        os.kill(os.getpid(), next(self._own))


def last_words(served: ServedModel, turns: str) -> dict[str, Any]:
    """How a request ends that runs while these `turns` of `Told` happen to its server."""
    watched: queue.Queue[Callable[[], object]] = queue.Queue()
    words: list[dict[str, Any]] = []
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]

    def work() -> None:
        url, drain = f"http://{HOST}:{port}", watched.get(timeout=SOON_S)
        params = {"temperature": 0, "max_new_tokens": COUNT, "ignore_eos": True}
        body = {"input_ids": [1, 2, 3], "sampling_params": params, "stream": True}
        told = Told(url, drain)
        with httpx.stream("POST", f"{url}/generate", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            for turn in turns.split():
                getattr(told, turn)()
            *_, last, _ = filter(None, lines)
        words.append(json.loads(last.removeprefix("data: ")))

    thread = threading.Thread(target=work)
    thread.start()
    engine, _ = make_engine(served, step_s=STEP_S)
    times = {"drain_timeout_s": 30.0, "watch": lambda drain, fail: watched.put(drain)}
    asyncio.run(serve(engine, served, EVERYONE, HOST, port, 0, **times))
    thread.join()
    return words[0]


@pytest.mark.parametrize("turns", ["other", "other other", "own other other", "other own other"])
def test_others_that_are_told_to_stop_cut_nothing(served: ServedModel, turns: str):
    assert last_words(served, turns)["meta_info"]["completion_tokens"] == COUNT


@pytest.mark.parametrize("turns", ["other own own", "own other own"])
def test_its_own_second_signal_cuts(served: ServedModel, turns: str):
    assert "the server has stopped" in json.dumps(last_words(served, turns))
