"""A relay to JAX's coordinator that outlives it.

JAX aborts a process, with a page of C++, in the moment that its coordinator closes a connection. By
way of this relay it does not see it: the service ends by our own channels, with one line.
"""

from __future__ import annotations

import contextlib
import socket
import threading

CHUNK_BYTES = 1 << 16


def start_relay(host: str, port: int) -> int:
    """Relay connections to `host`:`port` from a free port of this machine, which is returned.

    A client's connection stays open when that of the other side ends. Daemon threads do the work.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(
        target=_serve, args=(listener, (host, port)), name="relay", daemon=True
    ).start()
    return listener.getsockname()[1]


def _serve(listener: socket.socket, target: tuple[str, int]) -> None:
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(target)
        except OSError:
            client.close()  # JAX tries again
            continue
        for source, sink, last in ((client, server, True), (server, client, False)):
            threading.Thread(target=_pump, args=(source, sink, last), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket, closes: bool) -> None:
    """Copy bytes until there are no more; then end `sink` if it `closes` with its source."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK_BYTES):
            sink.sendall(data)
    if closes:
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)
