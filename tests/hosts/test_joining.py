"""How hosts find each other and agree, over real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from glmjax.errors import ConfigError
from glmjax.hosts.channel import FRAME, MAGIC, Channel, ChannelError, Kind
from glmjax.hosts.joining import Place, agreement, dial, difference, enter, gather, place_of
from glmjax.hosts.relay import start_relay

OPTIONS = {"--mesh": "2", "--dtype": "None"}
SOON_S = 20.0


@pytest.fixture
def coordinator() -> str:
    """With two free ports, one after another."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return f"127.0.0.1:{port}"


@pytest.fixture
def run():
    """Run functions beside one another; channels that they return are closed in the end."""
    running: list[Future] = []
    with ThreadPoolExecutor(8) as pool:

        def start(function, *arguments) -> Future:
            running.append(pool.submit(function, *arguments, SOON_S))
            return running[-1]

        yield start
    for future in running:
        if not future.exception():
            found = future.result()
            for channel in found.values() if isinstance(found, dict) else [found]:
                channel.close()


def meet(run, coordinator: str, followers: list[tuple[int, dict]], hosts: int) -> list[Future]:
    """Host 0, then the others, all at once; what each returned or raised."""
    others = [
        run(enter, Place(max(hosts, index + 1), index, coordinator), options)
        for index, options in followers
    ]
    return [run(gather, Place(hosts, 0, coordinator), OPTIONS), *others]


def test_hosts_meet_and_talk(run, coordinator):
    leader, *others = meet(run, coordinator, [(2, OPTIONS), (1, OPTIONS)], 3)
    channels = leader.result()
    assert channels.keys() == {1, 2}
    for index, other in zip((2, 1), others, strict=True):
        channels[index].send(Kind.LAUNCH, bytes([index]) * 100_000)
        assert other.result().receive() == (Kind.LAUNCH, bytes([index]) * 100_000)


def test_all_are_told_which_option_differs(run, coordinator):
    place, words = Place(3, 0, coordinator), "--dtype is float32 on host 2 and None on host 0"
    leader = run(gather, place, OPTIONS)
    first = said_hello(place)
    other = run(enter, Place(3, 2, coordinator), OPTIONS | {"--dtype": "float32"})
    kind, told = first.receive()
    assert (kind, words in told.decode()) == (Kind.REFUSED, True)
    first.close()
    for future in (leader, other):
        with pytest.raises(ConfigError, match=words):
            future.result()


def test_two_hosts_of_one_index_are_refused(run, coordinator):
    for place in meet(run, coordinator, [(1, OPTIONS), (1, OPTIONS)], 3):
        with pytest.raises(ConfigError, match="two hosts came as --host-index 1"):
            place.result()


def test_a_host_beyond_the_last_is_refused(run, coordinator):
    for place in meet(run, coordinator, [(5, OPTIONS)], 2):
        with pytest.raises(ConfigError, match="--host-index 5, expected 1 to 1"):
            place.result()


def test_a_host_that_came_and_went_may_come_again(run, coordinator):
    place = Place(3, 0, coordinator)
    leader = run(gather, place, OPTIONS)
    said_hello(place).close()
    others = [run(enter, Place(3, i, coordinator), OPTIONS) for i in (1, 2)]
    assert leader.result().keys() == {1, 2}
    assert all(other.result() for other in others)


def said_hello(place: Place) -> Channel:
    """As host 1, which waits for an answer."""
    channel = Channel(connect(place), "")
    channel.send(Kind.HELLO, json.dumps({"index": 1, "options": OPTIONS}).encode())
    return channel


def connect(place: Place) -> socket.socket:
    """As soon as host 0 listens."""
    while True:
        try:
            return dial(place.host, place.port + 1)
        except ConnectionRefusedError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        FRAME.pack(MAGIC, Kind.HELLO, 1 << 29),
        FRAME.pack(MAGIC, Kind.HELLO, 2) + b"[]",
        FRAME.pack(MAGIC, Kind.BEAT, 0),
        FRAME.pack(MAGIC, 77, 0),
    ],
)
def test_strangers_are_sent_away(run, coordinator, data):
    place = Place(2, 0, coordinator)
    leader = run(gather, place, OPTIONS)
    with connect(place) as stranger:
        stranger.sendall(data)
        stranger.settimeout(SOON_S)
        with contextlib.suppress(ConnectionResetError):  # where not all of it was read
            assert stranger.recv(1) == b""
    other = run(enter, Place(2, 1, coordinator), OPTIONS)
    assert leader.result().keys() == {1}
    assert other.result()


def test_who_is_missing_is_told(coordinator):
    with pytest.raises(ConfigError, match="there is no host 1, 2"):
        gather(Place(3, 0, coordinator), OPTIONS, 0.1)
    with pytest.raises(ConfigError, match=r"host 0 is not at 127\.0\.0\.1"):
        enter(Place(3, 1, coordinator), OPTIONS, 0.1)


def test_a_port_that_is_taken_is_told(coordinator):
    place = Place(2, 0, coordinator)
    taken = socket.create_server((place.host, place.port + 1))
    with taken, pytest.raises(ConfigError, match=f"port {place.port + 1}"):
        gather(place, OPTIONS, 0.1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((2, None, "a:1"), "needs its --host-index, from 0 to 1"),
        ((2, 2, "a:1"), "--host-index is 2"),
        ((2, -1, "a:1"), "--host-index is -1"),
        ((2, 1, ""), "expected HOST:PORT"),
        ((2, 1, "a:65535"), "expected HOST:PORT"),
        ((2, 1, ":80"), "expected HOST:PORT"),
        ((1, 1, ""), "say how many with --hosts"),
        ((1, None, "a:1"), "say how many with --hosts"),
    ],
)
def test_options_that_do_not_fit_together(arguments, words):
    with pytest.raises(ConfigError, match=words):
        place_of(*arguments)


def test_places():
    assert place_of(1, None, "") == Place()
    place = place_of(2, 1, "[fd00::1]:90")
    assert (place.host, place.port) == ("fd00::1", 90)


def test_another_model_is_a_difference(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = agreement(OPTIONS, tmp_path)
    assert difference(1, agreement(OPTIONS, tmp_path), before) is None
    (tmp_path / "config.json").write_text("{ }")
    assert "config.json is" in str(difference(1, agreement(OPTIONS, tmp_path), before))


def test_an_option_that_only_one_host_knows_is_a_difference():
    more = OPTIONS | {"--new": "3"}
    assert "--new is 3 on host 1 and unknown on host 0" in str(difference(1, more, OPTIONS))
    assert "--new is unknown on host 1 and 3 on host 0" in str(difference(1, OPTIONS, more))


def test_a_relay_outlives_its_target():
    with socket.create_server(("127.0.0.1", 0)) as target:
        relay = start_relay("127.0.0.1", target.getsockname()[1])
        client = socket.create_connection(("127.0.0.1", relay), timeout=SOON_S)
        served, _ = target.accept()
    with client:
        client.sendall(b"ask")
        assert served.recv(3) == b"ask"
        served.sendall(b"answer")
        assert client.recv(6) == b"answer"
        served.close()
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(1)


def test_a_channel_notices_what_is_no_message():
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        channel = Channel(server.accept()[0], "")
    with sender:
        with pytest.raises(ChannelError, match="silent"):
            channel.receive(0.05)
        sender.sendall(FRAME.pack(b"glm0", Kind.BEAT, 0))
        with pytest.raises(ChannelError, match="no message"):
            channel.receive()
        sender.sendall(FRAME.pack(MAGIC, Kind.LAUNCH, 5))
        with pytest.raises(ChannelError, match="no message"):
            channel.receive(most=4)
        sender.sendall(FRAME.pack(MAGIC, Kind.LAUNCH, 9) + b"half")
    with pytest.raises(ChannelError, match="closed"):
        channel.receive()
    channel.close()
