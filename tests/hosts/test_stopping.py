"""A host that is told to stop before all have met, or before host 0 serves."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import pytest

from glmjax.hosts.channel import Channel, Kind
from glmjax.hosts.joining import Place, dial, enter, gather
from glmjax.hosts.roles import Alone, joined
from glmjax.hosts.stopping import StoppedError, acting_on_signals

OPTIONS = {"--mesh": "2"}
SOON_S = 20.0


def beside(function, *arguments) -> Future:
    """What it returned or raised, on a thread."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function, *arguments)
    pool.shutdown(wait=False)
    return future


def until(holds) -> None:
    deadline = time.monotonic() + SOON_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def met(caplog, index: int) -> bool:
    return f"host {index} of 3 came" in caplog.text


def signal_when_met(caplog, kind: signal.Signals) -> Future:
    def work() -> None:
        until(lambda: met(caplog, 1))
        os.kill(os.getpid(), kind)

    return beside(work)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_host_0_while_it_waits(coordinator, signals, caplog, kind):
    caplog.set_level(logging.INFO, "glmjax")
    other = beside(enter, Place(3, 1, coordinator), OPTIONS, SOON_S)
    told = signal_when_met(caplog, kind)
    with pytest.raises(SystemExit) as ended, joined(Place(3, 0, coordinator), OPTIONS):
        pytest.fail("they met")
    assert ended.value.code == 0
    told.result()
    with pytest.raises(StoppedError, match="host 0 was told to stop before the service was ready"):
        other.result()


def test_a_follower_while_it_waits(coordinator, signals, caplog):
    caplog.set_level(logging.INFO, "glmjax")
    leader = beside(gather, Place(3, 0, coordinator), OPTIONS, SOON_S)
    told = signal_when_met(caplog, signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, joined(Place(3, 1, coordinator), OPTIONS):
        pytest.fail("they met")
    assert ended.value.code == 0
    told.result()
    with pytest.raises(StoppedError, match="host 1 was told to stop before the service was ready"):
        leader.result()


def test_a_follower_that_finds_nobody(coordinator, signals, caplog):
    caplog.set_level(logging.INFO, "glmjax")

    def work() -> None:
        until(lambda: "waiting for host 0" in caplog.text)
        os.kill(os.getpid(), signal.SIGTERM)

    told = beside(work)
    with pytest.raises(SystemExit) as ended, joined(Place(2, 1, coordinator), OPTIONS):
        pytest.fail("they met")
    assert ended.value.code == 0
    told.result()


def follower(coordinator: str) -> Channel:
    """As host 1, welcomed."""
    place = Place(2, 0, coordinator)
    while True:
        with suppress(ConnectionRefusedError):
            channel = Channel(dial(place.host, place.port + 1), "")
            break
    channel.send(Kind.HELLO, json.dumps({"index": 1, "options": OPTIONS}).encode())
    assert channel.receive(SOON_S)[0] is Kind.WELCOME
    return channel


def heard(channel: Channel) -> tuple[Kind, str]:
    while True:
        kind, payload = channel.receive(SOON_S)
        if kind is not Kind.BEAT:
            return kind, payload.decode()


def test_host_0_while_it_compiles(coordinator, signals, exits):
    other = beside(follower, coordinator)
    with joined(Place(2, 0, coordinator), OPTIONS) as role:
        os.kill(os.getpid(), signal.SIGTERM)
        assert exits.get(timeout=SOON_S) == 0
        assert heard(other.result()) == (
            Kind.STOPPED,
            "host 0 was told to stop before the service was ready",
        )
        assert not isinstance(role, Alone)
        role.peers.close()
    other.result().close()


def test_a_follower_while_host_0_compiles(coordinator, signals, exits):
    other = beside(follower, coordinator)
    with joined(Place(2, 0, coordinator), OPTIONS) as role:
        other.result().send(Kind.STOP)
        assert exits.get(timeout=SOON_S) == 0
        assert heard(other.result()) == (
            Kind.STOPPED,
            "host 1 was told to stop before the service was ready",
        )
        assert not isinstance(role, Alone)
        role.peers.close()
    other.result().close()


def test_a_follower_asks_host_0(coordinator, signals, exits):
    leader = beside(gather, Place(2, 0, coordinator), OPTIONS, SOON_S)
    with joined(Place(2, 1, coordinator), OPTIONS) as role:
        channel = leader.result()[1]
        for kind in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), kind)
            assert heard(channel) == (Kind.STOP, "")
        assert exits.empty()
        channel.send(Kind.STOPPED, b"all end")
        assert exits.get(timeout=SOON_S) == 0
        assert not isinstance(role, Alone)
        role.peers.close()
    channel.close()


def test_signals_are_acted_on_one_by_one_and_then_ignored(signals):
    acted: queue.Queue[int] = queue.Queue()
    with acting_on_signals(lambda: acted.put(1)):
        for kind in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), kind)
            assert acted.get(timeout=SOON_S)
    os.kill(os.getpid(), signal.SIGTERM)  # would end the tests
    assert acted.empty()
