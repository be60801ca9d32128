"""SIGTERM and SIGINT on one host, which end the service on all of them.

From the first word between hosts on they have a handler: without one a signal ends the process and
the others take it for a fault, or, as PID 1 of a container, it does nothing at all.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from typing import NoReturn

from glmjax.errors import GlmjaxError
from glmjax.hosts.peers import start_thread

log = logging.getLogger(__name__)

KINDS = (signal.SIGTERM, signal.SIGINT)


class StoppedError(GlmjaxError):
    """A host was told to stop before the service was ready: no fault."""


def told_to_stop(index: int) -> str:
    """What ends all hosts before host 0 serves, in words."""
    return f"host {index} was told to stop before the service was ready"


def raise_on_signals(index: int) -> None:
    """Have the first signal raise StoppedError in the main thread, where that runs Python alone."""

    def stop(*_: object) -> NoReturn:
        ignore_signals()  # one is enough: another would keep the others from being told
        raise StoppedError(told_to_stop(index))

    for kind in KINDS:
        signal.signal(kind, stop)


def ignore_signals() -> None:
    """Have signals do nothing, where all that is left to do is to end."""
    for kind in KINDS:
        signal.signal(kind, signal.SIG_IGN)


@contextlib.contextmanager
def acting_on_signals(act: Callable[[], None]) -> Iterator[None]:
    """Call `act`, on a thread of its own, at each signal; after that they do nothing.

    The main thread may be in a compiler for minutes, and a signal may reach any thread and wake
    none; but its number always reaches the wakeup socket.
    """
    read, write = socket.socketpair()
    write.setblocking(False)

    def wait() -> None:
        with read:
            while number := read.recv(1):
                log.info("%s: told to stop", signal.Signals(number[0]).name)
                act()

    start_thread(wait)
    for kind in KINDS:
        signal.signal(kind, _nothing)
    signal.set_wakeup_fd(write.fileno())
    try:
        yield
    finally:
        ignore_signals()
        signal.set_wakeup_fd(-1)
        write.close()


def _nothing(*_: object) -> None:
    """A handler: that there is one keeps the signal from ending the process."""
