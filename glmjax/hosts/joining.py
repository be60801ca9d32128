"""How hosts find each other, before anything else."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import json
import logging
import socket
import time
from dataclasses import dataclass

from glmjax.errors import ConfigError, GlmjaxError
from glmjax.hosts.agreement import Options, difference
from glmjax.hosts.channel import Channel, ChannelError, Kind
from glmjax.hosts.stopping import StoppedError, told_to_stop

log = logging.getLogger(__name__)

JOIN_S = 600.0  # for all hosts to come
TELL_S = 10.0  # how often who is missing is told
HELLO_S = 5.0  # for a connection to say who it is
HELLO_BYTES = 1 << 16
RETRY_S = 0.5
# What a stranger's bytes may be wrong with: an index of Infinity, brackets without end, ...
NOT_A_HELLO = (ChannelError, ValueError, KeyError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Place:
    """Which of several hosts this is.

    Attributes:
        hosts: how many there are.
        index: of this one; 0 leads.
        coordinator: "HOST:PORT" of host 0, where JAX meets; plans go by the port after it.
    """

    hosts: int = 1
    index: int = 0
    coordinator: str = ""

    def __post_init__(self) -> None:
        if self.hosts == 1:
            return
        if not 0 <= self.index < self.hosts:
            raise ConfigError(
                f"--host-index is {self.index}, but with --hosts {self.hosts} it is one of "
                f"0 to {self.hosts - 1}"
            )
        name, _, port = self.coordinator.rpartition(":")
        if not name or not port.isdecimal() or not 0 < int(port) < 65535:
            raise ConfigError(
                f"--coordinator is {self.coordinator!r}, expected HOST:PORT of host 0, such as "
                "10.0.0.1:9000, with the port after it free too"
            )

    @property
    def host(self) -> str:
        """The name or address of host 0."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Where JAX meets on it."""
        return int(self.coordinator.rpartition(":")[2])


def place_of(hosts: int, index: int | None, coordinator: str) -> Place:
    """The place that a command line names. Raises ConfigError where it says too little."""
    if hosts > 1 and index is None:
        raise ConfigError(
            f"--hosts is {hosts}, so each needs its --host-index, from 0 to {hosts - 1}"
        )
    if hosts == 1 and (index or coordinator):
        raise ConfigError(
            "--host-index and --coordinator are for several hosts: say how many with --hosts"
        )
    return Place(hosts, index or 0, coordinator)


def gather(place: Place, ours: Options, timeout_s: float = JOIN_S) -> dict[int, Channel]:
    """On host 0: wait for all others, and welcome them.

    Returns:
        The channel of each host, by its index.

    Raises:
        ConfigError: one was started otherwise, did not come or left; those that came were told.
        StoppedError: a host was told to stop, as all were told.
    """
    channels: dict[int, Channel] = {}
    try:
        with _listen(place) as listener:
            _accept_all(place, listener, channels, ours, timeout_s)
        for index, channel in channels.items():
            _welcome(index, channel)
    except GlmjaxError as error:
        kind = Kind.STOPPED if isinstance(error, StoppedError) else Kind.FAILED
        for channel in channels.values():
            with contextlib.suppress(ChannelError):
                channel.send(kind, str(error).encode())
            channel.close()
        raise
    return channels


def enter(place: Place, ours: Options, timeout_s: float = JOIN_S) -> Channel:
    """On another host: find host 0 and be welcomed.

    Raises:
        ConfigError: it was not found, or refuses.
        StoppedError: a host was told to stop; this one tells host 0.
    """
    deadline = time.monotonic() + timeout_s
    channel = _connect(place, deadline)
    try:
        _ask(place, channel, ours, max(deadline - time.monotonic(), HELLO_S))
    except GlmjaxError:
        channel.close()
        raise
    return channel


def _ask(place: Place, channel: Channel, ours: Options, timeout_s: float) -> None:
    """Be welcomed. Raises as `enter` does."""
    try:
        channel.send(Kind.HELLO, json.dumps({"index": place.index, "options": ours}).encode())
        kind, payload = channel.receive(timeout_s)
    except ChannelError as error:
        raise ConfigError(
            f"host 0 at {channel.address} did not answer ({error}); see its log"
        ) from error
    except StoppedError:
        with contextlib.suppress(ChannelError):
            channel.send(Kind.STOP)
        raise
    words = payload.decode(errors="replace")
    if kind is Kind.STOPPED:
        raise StoppedError(words)
    if kind is not Kind.WELCOME:
        raise ConfigError(f"host 0 refused this host: {words}")


@functools.cache  # what it finds is logged once
def bind_host(place: Place) -> str:
    """Where host 0 listens: at the coordinator's address if it is its own, else on all it has.

    A machine may know its own name as a loopback address, at which no other finds it.
    """
    try:
        found = socket.getaddrinfo(place.host, None, type=socket.SOCK_STREAM)
        with socket.socket(found[0][0]) as probe:
            probe.bind(found[0][4])
        address = str(found[0][4][0])
    except OSError:
        log.warning("%s is no address of this machine: listening on all it has", place.host)
        return ""
    if ipaddress.ip_address(address).is_loopback and place.host not in (address, "localhost"):
        log.info("%s is %s on this machine: listening on all it has", place.host, address)
        return ""
    return address


def _listen(place: Place) -> socket.socket:
    """For followers; where JAX will, it only makes sure that nobody does: JAX would not notice."""
    _bind(place, place.port, "the coordinator's").close()
    return _bind(place, place.port + 1, "the one after the coordinator's")


def _bind(place: Place, port: int, whose: str) -> socket.socket:
    host = bind_host(place)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=place.hosts)
    except OSError as error:
        raise ConfigError(
            f"host 0 cannot listen on port {port}, {whose}: {error.strerror}; choose another "
            "--coordinator port on every host"
        ) from error


def _accept_all(
    place: Place,
    listener: socket.socket,
    channels: dict[int, Channel],
    ours: Options,
    timeout_s: float,
) -> None:
    deadline, told = time.monotonic() + timeout_s, 0.0
    while missing := _missing(place, channels):
        now = time.monotonic()
        if now > deadline:
            raise ConfigError(f"after {timeout_s:g} s there is no host {_list(missing)}")
        if now - told > TELL_S:
            told = now
            log.info("waiting for host %s at port %d", _list(missing), place.port + 1)
        listener.settimeout(1.0)
        try:
            sock, address = listener.accept()
        except TimeoutError:
            continue
        _meet(place, Channel(sock, str(address[0])), channels, ours)


def _missing(place: Place, channels: dict[int, Channel]) -> list[int]:
    """Who is not there; who came and went may come again."""
    for index in [index for index, channel in channels.items() if _left(index, channel)]:
        channels.pop(index).close()
    return [index for index in range(1, place.hosts) if index not in channels]


def _left(index: int, channel: Channel) -> bool:
    """Whether a follower is gone. Raises StoppedError if it was told to stop."""
    if not channel.heard():
        return False
    try:
        kind, _ = channel.receive(HELLO_S, 0, whole=True)
    except ChannelError:
        return True
    if kind is Kind.STOP:
        raise StoppedError(told_to_stop(index))
    return False


def _welcome(index: int, channel: Channel) -> None:
    try:
        channel.send(Kind.WELCOME)
    except ChannelError as error:
        raise ConfigError(
            f"host {index} at {channel.address} came and is gone ({error}); see its log, then "
            "start all hosts again"
        ) from error


def _meet(place: Place, channel: Channel, channels: dict[int, Channel], ours: Options) -> None:
    """Take a follower in. Raises ConfigError for one that cannot be; strangers are sent away."""
    try:
        kind, payload = channel.receive(HELLO_S, HELLO_BYTES, whole=True)
        if kind is not Kind.HELLO:
            raise ChannelError(f"it began with {kind.name}")
        hello = json.loads(payload)
        index, theirs = int(hello["index"]), dict(hello["options"])
    except NOT_A_HELLO as error:
        log.warning("%s connected and is no host of this service: %s", channel.address, error)
        channel.close()
        return
    _missing(place, channels)
    taken = channels.get(index)
    channels[-1 if taken else index] = channel  # to be told what is wrong, too
    if problem := _problem(place, index, taken, theirs, ours):
        raise ConfigError(problem)
    log.info("host %d of %d came, from %s", index, place.hosts, channel.address)


def _problem(
    place: Place, index: int, taken: Channel | None, theirs: Options, ours: Options
) -> str | None:
    if problem := difference(index, theirs, ours):
        return problem
    if not 0 < index < place.hosts:
        return f"a host came as --host-index {index}, expected 1 to {place.hosts - 1}"
    if taken:
        return f"two hosts came as --host-index {index}, from {taken.address} the first"
    return None


def _connect(place: Place, deadline: float) -> Channel:
    told, where = 0.0, f"{place.host}:{place.port + 1}"
    while True:
        try:
            return Channel(dial(place.host, place.port + 1), where)
        except OSError as error:
            now = time.monotonic()
            if now > deadline:
                raise ConfigError(
                    f"host 0 is not at {where}: {error}; is it running, and --coordinator its "
                    "address?"
                ) from error
            if now - told > TELL_S:
                told = now
                log.info("waiting for host 0 at %s: %s", where, error)
            time.sleep(RETRY_S)


def dial(host: str, port: int) -> socket.socket:
    """Connect to another process.

    Raises:
        OSError: nobody listens there; also where the system then connects a socket to itself, as
            it may on the machine that `port` is of.
    """
    sock = socket.create_connection((host, port), timeout=HELLO_S)
    if sock.getsockname() == sock.getpeername():
        sock.close()
        raise ConnectionRefusedError("nobody listens there")
    return sock


def _list(hosts: list[int]) -> str:
    return ", ".join(map(str, hosts))
