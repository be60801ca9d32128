"""Host 0 and a follower over a real connection, each with a runner that only tells what it did."""

from __future__ import annotations

import json
import logging
import queue
import threading
from typing import Any, cast

import numpy as np
import pytest

from glmjax.errors import ConfigError
from glmjax.hosts.channel import Channel, Kind
from glmjax.hosts.joining import Place, gather
from glmjax.hosts.roles import Follower, Leader, described, joined
from glmjax.plans import Bucket, Limits
from glmjax.runner.blob import blob_size
from glmjax.runner.commands import Launch, Step, encode
from glmjax.runner.fake import FakeRunner

SOON_S = 20.0
BUCKET = Bucket(3, 0, 0, 0)
LIMITS = Limits(1, 5, 99, 4, 96, 0, 70, (BUCKET,))


def launch(number: int) -> Launch:
    blob = np.full((LIMITS.groups, blob_size(BUCKET, LIMITS)), number, np.int32)
    return Launch((), Step(BUCKET, blob, None, False, False))


class Recorded(FakeRunner):
    """What a device runner is asked for, in `did`: the number of a launch, its wait, a reset."""

    def __init__(self, fails: frozenset[str] = frozenset()):
        self.did: queue.Queue[Any] = queue.Queue()
        self.fails = fails
        super().__init__(LIMITS)

    def commands(self, plan: int) -> Launch:
        return launch(plan)

    def execute(self, launched: Launch) -> Handle:
        number = int(launched.step.blob[0, 0])
        self.did.put(number)
        self._check("execute")
        return Handle(self, number)

    def reset(self) -> None:
        self.did.put("reset")
        super().reset()

    def _check(self, what: str) -> None:
        if what in self.fails:
            raise RuntimeError("the device is on fire")


class Handle:
    def __init__(self, runner: Recorded, number: int):
        self.runner, self.number = runner, number

    def wait(self) -> None:
        self.runner.did.put(("waited", self.number))
        self.runner._check("wait")

    def result(self) -> int:
        self.runner._check("result")
        return self.number


def heard(channel: Channel) -> tuple[Kind, bytes]:
    while True:
        kind, payload = channel.receive(SOON_S)
        if kind is not Kind.BEAT:
            return kind, payload


@pytest.fixture
def leads(pair, exits):
    """Makes a leader over a runner, and the end of its channel at host 1, which has compiled."""
    roles: list[Leader] = []

    def make(runner: Recorded, theirs: dict | None = None) -> tuple[Leader, Channel]:
        ours, other = pair()
        roles.append(Leader({1: ours}))
        other.send(Kind.READY, json.dumps(theirs or described(cast(Any, runner))).encode())
        return roles[-1].over(cast(Any, runner)), other

    yield make
    for role in roles:
        role.peers.close()


def everything(did: queue.Queue) -> list:
    return [did.get_nowait() for _ in range(did.qsize())]


def test_a_leader_sends_what_it_launches_and_resets(leads):
    runner = Recorded()
    everything(runner.did)
    leader, other = leads(runner)
    assert leader.launch(cast(Any, 7)).result() == 7
    leader.reset()
    leader.launch(cast(Any, 8))
    assert [heard(other) for _ in range(3)] == [
        (Kind.LAUNCH, encode(launch(7))),
        (Kind.RESET, b""),
        (Kind.LAUNCH, encode(launch(8))),
    ]
    assert everything(runner.did) == [7, "reset", 8]


@pytest.mark.parametrize("where", ["execute", "result"])
def test_a_step_that_fails_on_host_0_ends_all(leads, exits, where):
    leader, other = leads(Recorded(frozenset({where})))
    with pytest.raises(SystemExit):
        leader.launch(cast(Any, 1)).result()
    assert exits.get_nowait() == 1
    assert heard(other)[0] is Kind.LAUNCH
    kind, words = heard(other)
    assert kind is Kind.FAILED
    assert b"host 0 failed" in words
    assert b"RuntimeError: the device is on fire" in words


def test_a_follower_that_compiled_for_another_pool_is_refused(leads):
    theirs = described(cast(Any, Recorded())) | {"sizes of the KV pool and of steps": "less"}
    with pytest.raises(ConfigError, match="sizes of the KV pool and of steps is less on host 1"):
        leads(Recorded(), theirs)


def test_weights_are_not_updated_over_several_hosts(leads):
    runner = Recorded()
    leader, _ = leads(runner)
    with pytest.raises(ConfigError, match=r"cannot be updated while .* over several hosts"):
        leader.update_params(1)
    assert runner.params == 0


def test_a_stop_of_a_follower_drains_host_0_once_it_serves(leads, exits, caplog, signals):
    caplog.set_level(logging.INFO, "glmjax")
    leader, other = leads(Recorded())
    asked: queue.Queue[str] = queue.Queue()

    def serve(watch) -> None:
        watch(lambda: asked.put("drain"), asked.put)
        other.send(Kind.STOP)
        assert asked.get(timeout=SOON_S) == "drain"
        assert "host 1 was told to stop: all hosts do" in caplog.text

    leader.run(serve)
    assert heard(other) == (Kind.STOP, b"")
    assert exits.empty()


def test_a_follower_that_fails_is_told_to_requests(leads, exits, signals):
    leader, other = leads(Recorded())
    told: queue.Queue[str] = queue.Queue()

    def serve(watch) -> None:
        watch(lambda: None, told.put)
        other.send(Kind.FAILED, b"host 1 failed")
        assert told.get(timeout=SOON_S) == "host 1 failed"
        assert exits.get(timeout=SOON_S) == 1

    leader.run(serve)


def test_a_follower_does_what_host_0_says_one_step_ahead(pair):
    ours, other = pair()
    runner = Recorded()
    everything(runner.did)
    role = Follower(1, ours)
    role.over(cast(Any, runner))
    kind, theirs = heard(other)
    assert (kind, json.loads(theirs)) == (Kind.READY, described(cast(Any, runner)))
    for number in (1, 2):
        other.send(Kind.LAUNCH, encode(launch(number)))
    other.send(Kind.RESET)
    other.send(Kind.LAUNCH, encode(launch(3)))
    other.send(Kind.STOP)
    role.run(lambda watch: pytest.fail("it serves"))
    assert everything(runner.did) == [1, 2, ("waited", 1), "reset", 3, ("waited", 2)]


@pytest.mark.parametrize(
    ("fails", "sent", "words"),
    [
        ("execute", encode(launch(1)), b"RuntimeError: the device is on fire"),
        ("wait", encode(launch(1)), b"RuntimeError: the device is on fire"),
        ("", b"junk", b"a command of 4 bytes"),
    ],
)
def test_a_step_that_fails_on_a_follower_ends_all(coordinator, signals, exits, fails, sent, words):
    channels: queue.Queue[Channel] = queue.Queue()

    def lead() -> None:
        channels.put(gather(Place(2, 0, coordinator), {}, SOON_S)[1])

    def follow() -> None:
        with joined(Place(2, 1, coordinator), {}) as role:
            role.over(cast(Any, Recorded(frozenset({fails}))))
            role.run(lambda watch: pytest.fail("it serves"))

    def send() -> None:
        channel = channels.get(timeout=SOON_S)
        for _ in range(2):
            channel.send(Kind.LAUNCH, sent)
        channels.put(channel)

    for work in (lead, send):
        threading.Thread(target=work).start()
    with pytest.raises(SystemExit):
        follow()
    assert exits.get_nowait() == 1
    other = channels.get(timeout=SOON_S)
    assert heard(other)[0] is Kind.READY
    kind, told = heard(other)
    assert kind is Kind.FAILED
    assert told.startswith(b"host 1 failed, and with it the service on every host: ")
    assert words in told
    other.close()
