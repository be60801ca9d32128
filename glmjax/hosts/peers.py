"""The other hosts while a service runs: who is alive, and how all end together.

A launch that fails on one host leaves the others a step ahead, so nothing is recovered: one line is
logged, requests end with it, and every process exits with status 1. By `os._exit`, because some
thread may be in a collective that never ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from glmjax.errors import GlmjaxError
from glmjax.hosts.channel import BEAT_S, Channel, ChannelError, Kind

log = logging.getLogger(__name__)

GRACE_S = 5.0  # for requests and hosts to be told that they end
NOTICE_S = 5.0  # for a channel to tell that it was a host's death that a collective died of


class Peers:
    """Channels to other hosts, read and kept alive by threads.

    Args:
        channels: by the index of the host at the other end.
        take: is given what they say: index, kind, payload; on a thread of the channel.
    """

    def __init__(self, channels: Mapping[int, Channel], take: Callable[[int, Kind, bytes], None]):
        self._channels, self._take = channels, take
        self._leaving = False
        self._ending = threading.Lock()
        self._tell: Callable[[str], None] = lambda words: None
        for index, channel in channels.items():
            start_thread(self._read, index, channel)
            start_thread(_beat, channel)  # of its own: one that reads nothing holds up no other

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """To all of them; one that is gone is its reader's business."""
        for channel in self._channels.values():
            with contextlib.suppress(ChannelError):
                channel.send(kind, payload)

    def on_failure(self, tell: Callable[[str], None]) -> None:
        """Have `tell` called, with words for requests, before a failure ends the process."""
        self._tell = tell

    def fail(self, words: str, error: BaseException | None = None) -> None:
        """Log `words`, pass them on to requests and other hosts, and exit. Does not return.

        Args:
            error: of which the log is to have the stack.
        """
        self._end(Kind.FAILED, words, error)

    def fail_unless_gone(self, index: int, error: BaseException) -> None:
        """As `fail`, for an `error` of host `index`, unless another is gone: then that is told."""
        time.sleep(NOTICE_S)
        self.fail(failed(index, error), error)

    def stop(self, words: str) -> None:
        """As `fail`, but no fault: exit with status 0. For before anything is served."""
        self._end(Kind.STOPPED, words)

    def leave(self) -> None:
        """From here on the others may go."""
        self._leaving = True

    def close(self) -> None:
        """Go; the others know that this host does."""
        self.leave()
        for channel in self._channels.values():
            channel.close()

    def _end(self, kind: Kind, words: str, error: BaseException | None = None) -> None:
        self._ending.acquire()  # only the first end is told, and never released
        fault = kind is Kind.FAILED
        try:
            log.log(logging.ERROR if fault else logging.INFO, "%s", words, exc_info=error)
            start_thread(_told, self._tell, words)
            for channel in self._channels.values():  # each may hang, so none is waited for
                start_thread(_told, channel.send, kind, words.encode())
            time.sleep(GRACE_S)
            logging.shutdown()
        finally:
            os._exit(fault)

    def _read(self, index: int, channel: Channel) -> None:
        try:
            while True:
                kind, payload = channel.receive()
                if kind in (Kind.FAILED, Kind.STOPPED):
                    self._end(kind, payload.decode(errors="replace"))
                self._take(index, kind, payload)
        except ChannelError as error:
            if not self._leaving:
                self.fail(
                    f"host {index} at {channel.address} is gone ({error}): the service ends on "
                    "every host; see that host's log, then start all hosts again"
                )


def failed(index: int, error: BaseException) -> str:
    """What all hosts are told of an error of one."""
    words = str(error) if isinstance(error, GlmjaxError) else f"{type(error).__name__}: {error}"
    return f"host {index} failed, and with it the service on every host: {words}"


def start_thread(function: Callable[..., None], *args: Any) -> None:
    """On a thread that does not keep the process alive."""
    threading.Thread(target=function, args=args, daemon=True).start()


def _beat(channel: Channel) -> None:
    """Until it is gone, which its reader tells."""
    with contextlib.suppress(ChannelError):
        while True:
            channel.send(Kind.BEAT)
            time.sleep(BEAT_S)


def _told(tell: Callable[..., None], *words: Any) -> None:
    """Tell one that all ends, as well as that goes."""
    try:
        tell(*words)
    except ChannelError as error:
        log.debug("a host could not be told that all ends: %s", error)
    except Exception:
        log.exception("not all could be told that the service ends")
