"""Who does what: host 0 leads and is driven by the engine, the others follow its launches."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from glmjax.errors import ConfigError, GlmjaxError
from glmjax.hosts.agreement import Options, difference
from glmjax.hosts.channel import Channel, Kind
from glmjax.hosts.joining import Place, enter, gather
from glmjax.hosts.peers import Peers, failed
from glmjax.hosts.stopping import (
    StoppedError,
    acting_on_signals,
    ignore_signals,
    raise_on_signals,
    told_to_stop,
)
from glmjax.plans import Limits, StepPlan, StepResult
from glmjax.runner.commands import decode, encode
from glmjax.runner.runner import DeviceHandle, DeviceRunner

log = logging.getLogger(__name__)

Watch = Callable[[Callable[[], object], Callable[[str], None]], None]
Serve = Callable[[Watch | None], None]


class Alone:
    """The only host."""

    def over(self, runner: DeviceRunner) -> DeviceRunner:
        """What the engine drives."""
        return runner

    def run(self, serve: Serve) -> None:
        """Serve until told to stop."""
        serve(None)


@dataclass(frozen=True)
class LedHandle:
    """A step launched on all hosts."""

    handle: DeviceHandle
    peers: Peers

    def result(self) -> StepResult:
        """Block until the outputs are here. A step that fails ends the process."""
        try:
            return self.handle.result()
        except Exception as error:
            self.peers.fail_unless_gone(0, error)
            raise


class Leader:
    """Host 0: the runner of its engine, and its channels to all others.

    Args:
        channels: of the followers, by index.
    """

    def __init__(self, channels: Mapping[int, Channel]):
        self._drain: Callable[[], object] | None = None  # once it serves
        self._ready: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._count = len(channels)
        self.peers = Peers(channels, self._take)

    def over(self, runner: DeviceRunner) -> Leader:
        """What the engine drives, once all followers have compiled.

        Raises:
            ConfigError: one has other devices, or another KV pool.
        """
        self._runner, ours = runner, described(runner)
        log.info("compiled; waiting until all %d hosts have", self._count + 1)
        for _ in range(self._count):
            index, theirs = self._ready.get()
            if problem := difference(index, json.loads(theirs), ours):
                raise ConfigError(problem)
        return self

    def run(self, serve: Serve) -> None:
        """Serve until told to stop, by a signal here or on any host; then all exit."""
        serve(self._watch)
        ignore_signals()
        self.peers.leave()
        self.peers.send(Kind.STOP)

    @property
    def limits(self) -> Limits:
        """The runner's."""
        return self._runner.limits

    def launch(self, plan: StepPlan) -> LedHandle:
        """Dispatch a step on all hosts. One that fails here ends the process.

        Raises:
            KeyError: the plan's bucket was not compiled.
        """
        launch = self._runner.commands(plan)
        self.peers.send(Kind.LAUNCH, encode(launch))
        try:
            return LedHandle(self._runner.execute(launch), self.peers)
        except Exception as error:
            self.peers.fail_unless_gone(0, error)
            raise

    def reset(self) -> None:
        """Forget all sequences and pages, on all hosts.

        Called only when a plan could not be made a launch, and so no host has launched it.
        """
        self.peers.send(Kind.RESET)
        self._runner.reset()

    def update_params(self, params: Any) -> None:
        """Not over several hosts. Raises ConfigError."""
        raise ConfigError(
            "weights cannot be updated while a model is served over several hosts: each host has "
            "parts of them; convert the new weights and start all hosts again"
        )

    def stop(self, index: int = 0) -> None:
        """Drain, or end all hosts where there is nothing to drain yet.

        Args:
            index: of the host that was told to stop.
        """
        if self._drain is None:
            self.peers.stop(told_to_stop(index))
        else:
            log.info("host %d was told to stop: all hosts do", index)
            self._drain()

    def _watch(self, drain: Callable[[], object], fail: Callable[[str], None]) -> None:
        self._drain = drain
        self.peers.on_failure(fail)

    def _take(self, index: int, kind: Kind, payload: bytes) -> None:
        if kind is Kind.READY:
            self._ready.put((index, payload))
        elif kind is Kind.STOP:
            self.stop(index)


class Follower:
    """Another host: runs what host 0 launches, in its order.

    Args:
        index: of this host.
        channel: to host 0.
    """

    def __init__(self, index: int, channel: Channel):
        self._index = index
        self._said: queue.SimpleQueue[tuple[Kind, bytes]] = queue.SimpleQueue()
        self.peers = Peers({0: channel}, self._take)

    def over(self, runner: DeviceRunner) -> DeviceRunner:
        """Tell host 0 that this one has compiled."""
        self._runner = runner
        self.peers.send(Kind.READY, json.dumps(described(runner)).encode())
        return runner

    def run(self, serve: Serve) -> None:
        """Launch what host 0 launches until it stops. Raises what a step fails with."""
        del serve  # this host answers no requests
        log.info("ready: host %d follows host 0", self._index)
        self._follow()
        self.peers.close()
        log.info("stopped")

    def stop(self) -> None:
        """Ask host 0 to stop, which knows whether there is something to drain."""
        self.peers.send(Kind.STOP)

    def _follow(self) -> None:
        """Launch one step ahead of the one waited for, as the engine does."""
        before: DeviceHandle | None = None
        while (message := self._said.get())[0] is not Kind.STOP:
            if message[0] is Kind.RESET:
                self._runner.reset()
                continue
            handle = self._runner.execute(decode(message[1], self._runner.limits))
            if before is not None:
                before.wait()
            before = handle

    def _take(self, index: int, kind: Kind, payload: bytes) -> None:
        del index
        if kind is Kind.STOP:
            self.peers.leave()
        if kind in (Kind.LAUNCH, Kind.RESET, Kind.STOP):
            self._said.put((kind, payload))


Role = Alone | Leader | Follower


@contextlib.contextmanager
def joined(place: Place, ours: Options) -> Iterator[Role]:
    """Meet the other hosts. With several, what is raised within ends all of them.

    Args:
        place: which host this is.
        ours: what must be the same on all, as `agreement` gives it.

    Raises:
        ConfigError: a host did not come, or was started otherwise.
        SystemExit: with status 0, when a host was told to stop before all were there.
    """
    if place.hosts == 1:
        yield Alone()
        return
    role = _meet(place, ours)
    try:
        with acting_on_signals(role.stop):
            yield role
    except GlmjaxError as error:
        role.peers.fail(failed(place.index, error))
    except BaseException as error:
        role.peers.fail_unless_gone(place.index, error)


def _meet(place: Place, ours: Options) -> Leader | Follower:
    raise_on_signals(place.index)
    try:
        if place.index:
            return Follower(place.index, enter(place, ours))
        return Leader(gather(place, ours))
    except StoppedError as error:
        log.info("%s", error)
        sys.exit(0)


def described(runner: DeviceRunner) -> dict[str, str]:
    """What the programs of a runner were compiled for, as far as hosts could differ in it."""
    return {"sizes of the KV pool and of steps": str(runner.limits)}
