"""Messages over real sockets: whole, or the connection ends."""

from __future__ import annotations

import socket
import threading

import pytest

from glmjax.hosts.channel import FRAME, MAGIC, Channel, ChannelError, Kind

LARGE = bytes(64 << 20)  # more than sockets hold for who reads nothing


def test_what_is_no_message_is_noticed():
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0], "")
    with sender:
        with pytest.raises(ChannelError, match=r"^silent for 0\.05 s$"):
            channel.receive(0.05)
        assert not channel.heard()
        sender.sendall(FRAME.pack(b"glm0", Kind.BEAT, 0))
        with pytest.raises(ChannelError, match="no message"):
            channel.receive()
        sender.sendall(FRAME.pack(MAGIC, Kind.LAUNCH, 5))
        with pytest.raises(ChannelError, match="no message"):
            channel.receive(most=4)
        sender.sendall(FRAME.pack(MAGIC, Kind.LAUNCH, 9) + b"half")
    with pytest.raises(ChannelError, match="closed"):
        channel.receive()
    assert channel.heard()
    channel.close()


def test_a_message_that_drops_in_is_waited_for_only_so_long():
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0], "")
    done = threading.Event()

    def drop() -> None:
        for byte in FRAME.pack(MAGIC, Kind.HELLO, 60) + bytes(60):
            sender.send(bytes([byte]))
            if done.wait(0.03):
                return

    dropping = threading.Thread(target=drop)
    dropping.start()
    with pytest.raises(ChannelError, match=r"no whole message for 0\.3 s"):
        channel.receive(0.3, whole=True)
    done.set()
    dropping.join()
    sender.close()
    channel.close()


def test_who_could_not_be_sent_a_whole_message_is_sent_no_more(pair):
    ours, theirs = pair()
    with pytest.raises(ChannelError, match="silent"):
        ours.receive(0.1)
    with pytest.raises(ChannelError, match=r"it read nothing for 0\.1 s"):
        ours.send(Kind.LAUNCH, LARGE)
    for use in (lambda: ours.send(Kind.BEAT), ours.receive):
        with pytest.raises(ChannelError, match=r"it read nothing for 0\.1 s"):
            use()
    with pytest.raises(ChannelError, match="closed the connection"):
        theirs.receive()
