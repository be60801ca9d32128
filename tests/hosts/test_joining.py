"""How hosts find each other and agree, over real sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from glmjax.errors import ConfigError
from glmjax.hosts import agreement as agreeing
from glmjax.hosts import joining
from glmjax.hosts.agreement import agreement, difference
from glmjax.hosts.channel import FRAME, MAGIC, Channel, Kind
from glmjax.hosts.joining import Place, bind_host, dial, enter, gather, place_of
from glmjax.hosts.relay import start_relay

OPTIONS = {"--mesh": "2", "--dtype": "None"}
SOON_S = 20.0


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
    assert (kind, words in told.decode()) == (Kind.FAILED, True)
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


def hello(payload: bytes) -> bytes:
    return FRAME.pack(MAGIC, Kind.HELLO, len(payload)) + payload


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        FRAME.pack(MAGIC, Kind.HELLO, 1 << 29),
        FRAME.pack(MAGIC, Kind.HELLO, 2) + b"[]",
        FRAME.pack(MAGIC, Kind.BEAT, 0),
        FRAME.pack(MAGIC, 77, 0),
        hello(b'{"index": Infinity, "options": {}}'),
        hello(b'{"index": 1}'),
        hello(b'{"index": [], "options": {}}'),
        hello(b"[" * 60_000),
        hello(b"\xff"),
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


def test_a_stranger_that_drops_its_bytes_holds_up_nobody_for_long(run, coordinator, monkeypatch):
    monkeypatch.setattr(joining, "HELLO_S", 0.3)
    place, away = Place(2, 0, coordinator), threading.Event()
    leader = run(gather, place, OPTIONS)
    with connect(place) as stranger:

        def drop() -> None:
            with contextlib.suppress(OSError):
                stranger.sendall(FRAME.pack(MAGIC, Kind.HELLO, 60_000))
                while not away.wait(0.05):
                    stranger.sendall(b" ")

        dropping = threading.Thread(target=drop)
        dropping.start()
        other = run(enter, Place(2, 1, coordinator), OPTIONS)
        try:
            assert leader.result().keys() == {1}
            assert other.result()
        finally:
            away.set()
            dropping.join()


def test_a_host_that_goes_before_it_is_welcomed_is_named(run, coordinator, monkeypatch):
    """The last one comes; by then the first, which nobody looked at since, is gone."""
    place, welcome = Place(3, 0, coordinator), joining._welcome

    def late(index: int, channel: Channel) -> None:
        if index == 1:
            channel.close()
        welcome(index, channel)

    monkeypatch.setattr(joining, "_welcome", late)
    leader = run(gather, place, OPTIONS)
    others = [run(enter, Place(3, i, coordinator), OPTIONS) for i in (1, 2)]
    with pytest.raises(ConfigError, match=r"host 1 at 127\.0\.0\.1 came and is gone"):
        leader.result()
    with pytest.raises(ConfigError, match=r"did not answer \(it closed"):
        others[0].result()
    with contextlib.suppress(ConfigError):  # told so, unless it was welcomed before
        assert others[1].result().receive()[0] is Kind.FAILED


def test_who_is_missing_is_told(coordinator):
    with pytest.raises(ConfigError, match="there is no host 1, 2"):
        gather(Place(3, 0, coordinator), OPTIONS, 0.1)
    with pytest.raises(ConfigError, match=r"host 0 is not at 127\.0\.0\.1"):
        enter(Place(3, 1, coordinator), OPTIONS, 0.1)


@pytest.mark.parametrize(("after", "whose"), [(0, "the coordinator's"), (1, "the one after")])
def test_a_port_that_is_taken_is_told(coordinator, after, whose):
    """JAX's service shares its port with whom it may, as another JAX lets it."""
    place = Place(2, 0, coordinator)
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind((place.host, place.port + after))
        taken.listen()
        with pytest.raises(ConfigError, match=f"port {place.port + after}, {whose}"):
            gather(place, OPTIONS, 0.1)


@pytest.mark.parametrize(
    ("host", "address", "listens", "says"),
    [
        ("localhost", "127.0.0.1", "127.0.0.1", ""),
        ("127.0.0.1", "127.0.0.1", "127.0.0.1", ""),
        ("127.0.1.1", "127.0.1.1", "127.0.1.1", ""),
        ("node-0", "127.0.1.1", "", "node-0 is 127.0.1.1 on this machine: listening on all"),
        ("node-0", "0.0.0.0", "0.0.0.0", ""),  # stands for one that it has and others reach
        ("node-0", "192.0.2.1", "", "node-0 is no address of this machine"),
    ],
)
def test_where_host_0_listens(monkeypatch, caplog, host, address, listens, says):
    """Debian's /etc/hosts has 127.0.1.1 for a machine's own name."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    caplog.set_level("INFO", "glmjax")
    place = Place(2, 0, f"{host}:9000")
    bind_host.cache_clear()
    assert [bind_host(place), bind_host(place)] == [listens, listens]
    assert [says in r.getMessage() for r in caplog.records] == [True] * bool(says)
    bind_host.cache_clear()


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


@pytest.mark.parametrize(
    ("package", "words"),
    [("jax", "the version of JAX is 9"), ("jaxlib", "the version of jaxlib is 9")],
)
def test_another_version_is_a_difference(tmp_path, monkeypatch, package, words):
    ours = agreement(OPTIONS, tmp_path)
    of = agreeing.version
    monkeypatch.setattr(agreeing, "version", lambda name: "9" if name == package else of(name))
    assert words in str(difference(1, agreement(OPTIONS, tmp_path), ours))


def test_another_source_is_a_difference(tmp_path, monkeypatch):
    installed = agreement(OPTIONS, tmp_path)
    monkeypatch.setattr(agreeing, "INSTALLED", tmp_path)
    files = [tmp_path / name for name in ("glmjax/a/b.py", "pallas_kernels/c.py", "glmjax/d.txt")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    ours = agreement(OPTIONS, tmp_path)
    assert "the source of glmjax is" in str(difference(1, installed, ours))
    for file, counts in zip(files, (True, True, False), strict=True):
        file.write_text("pass")
        found = difference(1, agreement(OPTIONS, tmp_path), ours)
        assert (found is not None) is counts
        file.write_text("")
    files[0].rename(tmp_path / "glmjax" / "b.py")
    assert "the source of glmjax is" in str(difference(1, agreement(OPTIONS, tmp_path), ours))


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
