"""Messages between two hosts: frames over TCP, whose silence means that a host is gone."""

from __future__ import annotations

import contextlib
import enum
import math
import select
import socket
import struct
import threading
import time

from glmjax.errors import GlmjaxError

MAGIC = b"glm1"
FRAME = struct.Struct("<4sBI")  # magic, kind, bytes that follow
MAX_BYTES = 1 << 30
ONE_SEND_BYTES = 1 << 16  # below it a copy is cheaper than another packet
BEAT_S = 5.0
SILENCE_S = 30.0  # after which a host is taken for gone


class Kind(enum.IntEnum):
    """What a message says."""

    HELLO = 1  # JSON: who a follower is, and what it was started with
    WELCOME = 2  # all are here and agree
    STOPPED = 3  # text: who was told to stop before the service was ready, which ends all
    READY = 4  # JSON: a follower's programs are compiled; what they were compiled for
    LAUNCH = 5  # commands, as `glmjax.runner.commands` encodes them
    BEAT = 6  # nothing: its sender is alive
    STOP = 7  # from a follower: please stop; from the leader: all is done, exit
    RESET = 8  # forget all sequences
    FAILED = 9  # text: why the service ends, or does not begin


class ChannelError(GlmjaxError):
    """A host that is gone, or bytes that are none of its messages."""


class Channel:
    """A connection to another host. Any thread may send; one receives.

    Args:
        sock: connected; the channel owns it.
        address: of the other host, for people.
    """

    def __init__(self, sock: socket.socket, address: str):
        self.address = address
        self._sock = sock
        self._sending = threading.Lock()
        self._unsent = ""  # why a message could not be sent whole
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _keepalive().items():
            sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, kind: Kind, payload: bytes = b"") -> None:
        """Send a message whole.

        Raises:
            ChannelError: the other host is gone, or reads nothing. The channel is closed then, for
                what follows a part of a message would be no message.
        """
        head = FRAME.pack(MAGIC, kind, len(payload))
        try:
            with self._sending:
                if len(payload) < ONE_SEND_BYTES:
                    self._sock.sendall(head + payload)
                else:
                    self._sock.sendall(head)
                    self._sock.sendall(payload)
        except OSError as error:
            self._unsent = self._unsent or _words(error, "it read nothing", self._sock.gettimeout())
            self.close()
            raise ChannelError(self._unsent) from error

    def receive(
        self, timeout_s: float = SILENCE_S, most: int = MAX_BYTES, whole: bool = False
    ) -> tuple[Kind, bytes]:
        """The next message, `(kind, bytes)`.

        Args:
            timeout_s: how long the other may be silent.
            most: bytes that a message may have.
            whole: `timeout_s` is for all of the message, however its bytes drop in.

        Raises:
            ChannelError: it is gone or silent, or sends what is no message.
        """
        deadline = time.monotonic() + timeout_s if whole else math.inf
        try:
            self._sock.settimeout(timeout_s)
            magic, kind, size = FRAME.unpack(self._read(FRAME.size, deadline))
            if magic != MAGIC or kind not in iter(Kind) or size > most:
                raise ChannelError("it sent what is no message of this glmjax")
            return Kind(kind), self._read(size, deadline)
        except OSError as error:
            silence = "no whole message" if whole else "silent"
            raise ChannelError(self._unsent or _words(error, silence, timeout_s)) from error

    def heard(self) -> bool:
        """Whether the other end has sent something or closed; nothing is read."""
        return bool(select.select([self._sock], [], [], 0)[0])

    def close(self) -> None:
        """Close it; who waits for a message is woken."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            if deadline < math.inf:
                self._sock.settimeout(_left_s(deadline))
            count = self._sock.recv_into(view)
            if not count:
                raise ChannelError(self._unsent or "it closed the connection")
            view = view[count:]
        return bytes(data)


def _left_s(deadline: float) -> float:
    """Seconds until then. Raises TimeoutError when it has passed."""
    if (left_s := deadline - time.monotonic()) <= 0:
        raise TimeoutError
    return left_s


def _words(error: OSError, silence: str, timeout_s: float | None) -> str:
    return f"{silence} for {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)


def _keepalive() -> dict[int, int]:
    """Options that end a connection to a machine that is off, as far as this system has them."""
    seconds = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5}
    options = seconds | {"TCP_USER_TIMEOUT": int(SILENCE_S * 1000)}
    return {getattr(socket, n): value for n, value in options.items() if hasattr(socket, n)}
