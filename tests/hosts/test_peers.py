"""How hosts keep each other alive, and how all end, whatever one of them does."""

from __future__ import annotations

import logging
import threading
import time

import pytest

from glmjax.errors import ConfigError
from glmjax.hosts import peers
from glmjax.hosts.channel import Channel, Kind
from glmjax.hosts.peers import Peers

SOON_S = 20.0  # before a send to who reads nothing is given up
LARGE = bytes(64 << 20)  # more than sockets hold for who reads nothing


@pytest.fixture
def followed(pair, exits):
    """Makes `Peers` and the other ends of their channels."""
    made: list[Peers] = []

    def make(hosts: int = 1) -> tuple[Peers, list[Channel]]:
        pairs = [pair() for _ in range(hosts)]
        made.append(Peers({i: ours for i, (ours, _) in enumerate(pairs, 1)}, lambda *_: None))
        return made[-1], [theirs for _, theirs in pairs]

    yield make
    for one in made:
        one.close()


def said(channel: Channel) -> tuple[Kind, str]:
    """The next message that is no beat; it comes soon."""
    deadline = time.monotonic() + SOON_S
    while True:
        kind, payload = channel.receive(max(deadline - time.monotonic(), 0.01))
        if kind is not Kind.BEAT:
            return kind, payload.decode()


def stuck(one: Peers) -> threading.Thread:
    """Have a first host that reads nothing hold up who sends to it."""
    sending = threading.Thread(target=one.send, args=(Kind.LAUNCH, LARGE), daemon=True)
    sending.start()
    return sending


def test_a_host_that_reads_nothing_holds_up_no_beat(followed, monkeypatch):
    monkeypatch.setattr(peers, "BEAT_S", 0.02)
    one, (_, other) = followed(2)
    sending = stuck(one)
    for _ in range(30):
        assert other.receive(SOON_S)[0] is Kind.BEAT
    assert sending.is_alive()


def test_a_host_that_reads_nothing_keeps_no_other_from_being_told(followed, exits):
    one, (_, other) = followed(2)
    sending = stuck(one)
    threading.Thread(target=one.fail, args=("why",), daemon=True).start()
    assert said(other) == (Kind.FAILED, "why")
    assert exits.get(timeout=SOON_S) == 1
    assert sending.is_alive()


def test_a_stop_is_no_fault(followed, exits, caplog):
    caplog.set_level(logging.INFO, "glmjax")
    one, (other,) = followed()
    with pytest.raises(SystemExit):
        one.stop("host 1 was told to")
    assert said(other) == (Kind.STOPPED, "host 1 was told to")
    assert exits.get_nowait() == 0
    assert [r.levelname for r in caplog.records if "told to" in r.message] == ["INFO"]


@pytest.mark.parametrize(("kind", "status"), [(Kind.FAILED, 1), (Kind.STOPPED, 0)])
def test_an_end_is_passed_on(followed, exits, kind, status):
    told: list[str] = []
    one, (first, second) = followed(2)
    one.on_failure(told.append)
    first.send(kind, b"why")
    assert said(second) == (kind, "why")
    assert exits.get(timeout=SOON_S) == status
    assert told == ["why"]


def test_requests_that_cannot_be_told_keep_nothing_from_its_end(followed, exits, caplog):
    def broken(words: str) -> None:
        raise ValueError("no loop")

    one, (other,) = followed()
    one.on_failure(broken)
    with pytest.raises(SystemExit):
        one.fail("why")
    assert exits.get_nowait() == 1
    assert said(other) == (Kind.FAILED, "why")
    assert "ValueError: no loop" in caplog.text


def test_requests_that_hang_keep_nothing_from_its_end(followed, exits):
    free = threading.Event()
    one, (other,) = followed()
    one.on_failure(lambda _: free.wait(SOON_S) and None)
    with pytest.raises(SystemExit):
        one.fail("why")
    assert exits.get_nowait() == 1
    assert said(other) == (Kind.FAILED, "why")
    free.set()


def test_a_log_that_breaks_keeps_nothing_from_its_end(followed, exits, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(peers.log, "log", broken)
    with pytest.raises(SystemExit):
        followed()[0].fail("why")
    assert exits.get_nowait() == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [(RuntimeError("fire"), "RuntimeError: fire"), (ConfigError("no room"), "no room")],
)
def test_an_error_of_a_host_is_told_when_all_are_there(followed, exits, caplog, error, words):
    one, (other,) = followed()
    with pytest.raises(SystemExit):
        one.fail_unless_gone(3, error)
    told = f"host 3 failed, and with it the service on every host: {words}"
    assert said(other) == (Kind.FAILED, told)
    assert told in caplog.text


def test_a_host_that_is_gone_is_told_in_place_of_an_error(followed, exits, monkeypatch):
    monkeypatch.setattr(peers, "NOTICE_S", 3600.0)
    one, (first, second) = followed(2)
    failing = threading.Thread(target=one.fail_unless_gone, args=(0, RuntimeError()), daemon=True)
    failing.start()
    first.close()
    kind, words = said(second)
    assert kind is Kind.FAILED
    assert "host 1 at there is gone (it closed the connection): the service ends" in words
    assert exits.get(timeout=SOON_S) == 1


def test_who_leaves_lets_others_go(followed, exits):
    one, (first, second) = followed(2)
    one.leave()
    first.close()
    one.send(Kind.STOP)
    assert said(second) == (Kind.STOP, "")
    assert exits.empty()
