"""Connected channels, and ends of the process that do not end it."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from ports import HOST, free_ports

from glmjax.hosts import peers
from glmjax.hosts.channel import Channel

Pair = tuple[Channel, Channel]


@pytest.fixture
def pair() -> Iterator[Callable[[], Pair]]:
    """Makes two ends of a connection."""
    with contextlib.ExitStack() as opened:

        def make() -> Pair:
            with socket.create_server(("127.0.0.1", 0)) as server:
                ours = Channel(socket.create_connection(server.getsockname()), "there")
                theirs = Channel(server.accept()[0], "here")
            for channel in (ours, theirs):
                opened.callback(channel.close)
            return ours, theirs

        yield make


@pytest.fixture
def exits(monkeypatch) -> queue.Queue[int]:
    """The statuses that this process would have ended with.

    The main thread gets SystemExit; others, which are daemons, go no further.
    """
    statuses: queue.Queue[int] = queue.Queue()

    def end(status: int) -> None:
        statuses.put(int(status))
        if threading.current_thread() is threading.main_thread():
            raise SystemExit(status)
        threading.Event().wait()

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(peers, "GRACE_S", 0.05)
    monkeypatch.setattr(peers, "NOTICE_S", 0.05)
    return statuses


@pytest.fixture
def signals() -> Iterator[None]:
    """Handlers as they were before."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for kind, handler in before.items():
        signal.signal(kind, handler)


@pytest.fixture
def coordinator() -> str:
    """An address with two free ports, one after another."""
    return f"{HOST}:{free_ports(2)[0]}"
