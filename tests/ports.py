"""Ports for programs that tests start."""

from __future__ import annotations

import contextlib
import secrets
import socket

HOST = "127.0.0.1"
# Below those that systems give to whoever names none: nobody takes one of these by chance.
PORTS = range(20_000, 30_000)


def free_ports(count: int) -> list[int]:
    """Ports that follow one another, on which nobody listens."""
    while True:
        first = secrets.choice(PORTS)
        ports = [*range(first, first + count)]
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in ports:
                held.enter_context(socket.create_server((HOST, port)))
            return ports
