"""What JAX is told of where host 0 is, and where to listen."""

from __future__ import annotations

import logging
import socket

import jax
import pytest

from glmjax.config import MeshConfig
from glmjax.hosts import connect as connecting
from glmjax.hosts.connect import connect
from glmjax.hosts.joining import Place, bind_host

AWAY = "192.0.2.1:9000"  # an address that no machine has


@pytest.fixture
def told(monkeypatch) -> dict:
    """What `jax.distributed.initialize` is given; this process's JAX stays as it is."""
    found: dict = {}

    def initialize(coordinator, hosts, index, **options) -> None:
        found.update(options, coordinator=coordinator, hosts=hosts, index=index)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(connecting, "_configure", lambda *_: None)
    bind_host.cache_clear()
    return found


def test_a_follower_goes_by_its_relay_and_listens_nowhere(told, caplog):
    caplog.set_level(logging.INFO, "glmjax")
    connect(Place(2, 1, AWAY), MeshConfig())
    host, _, port = told["coordinator"].partition(":")
    assert host == "127.0.0.1"
    assert port != "9000"
    socket.create_connection((host, int(port))).close()
    assert told["coordinator_bind_address"] is None
    assert "listening" not in caplog.text


@pytest.mark.parametrize(
    ("coordinator", "listens"),
    [("127.0.0.1:9000", "127.0.0.1:9000"), ("[::1]:9000", "[::1]:9000"), (AWAY, "[::]:9000")],
)
def test_host_0_listens_where_followers_find_it(told, coordinator, listens):
    if "::1" in coordinator and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    connect(Place(2, 0, coordinator), MeshConfig())
    assert (told["coordinator"], told["coordinator_bind_address"]) == (coordinator, listens)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_alone_jax_is_told_nothing(told):
    connect(Place(), MeshConfig())
    assert not told
