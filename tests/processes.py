"""Fixtures that run the project's own programs as processes, the server among them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from ports import free_ports

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 600


@dataclass
class Server:
    """A server that answers."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self, kind: signal.Signals = signal.SIGTERM) -> int:
        """Signal it and wait for its end; the exit status."""
        self.process.send_signal(kind)
        return self.process.wait(60)


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Of processes that tests start: a cache of their own, so that runs do not meet."""
    inherited = {name: value for name, value in os.environ.items() if name != "GLMJAX_API_KEY"}
    return inherited | {
        "GLMJAX_CACHE": str(tmp_path_factory.mktemp("cache")),
        "PYTHONWARNINGS": "error::DeprecationWarning:glmjax",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture(scope="session")
def run_command(environment):
    """Run one of the project's programs to its end."""

    def run(*arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
        )

    return run


@pytest.fixture(scope="session")
def start_hosts(environment, tmp_path_factory):
    """Start serve.py on several hosts of one service; gives their `Server`s, host 0 first.

    `options` are of all hosts, `own` more of each. Only host 0 answers requests.
    """

    @contextmanager
    def start(hosts: int, *options: str | Path, own: tuple[tuple[str, ...], ...] = (), ready=True):
        coordinator = f"127.0.0.1:{free_ports(2)[0]}"
        servers = []
        try:
            for index in range(hosts):
                place = ("--hosts", hosts, "--host-index", index, "--coordinator", coordinator)
                arguments = (*options, *map(str, place), *(own[index] if own else ()))
                folder = tmp_path_factory.mktemp(f"host{index}")
                servers.append(_spawn(arguments, environment, folder / "serve.log"))
            if ready:
                wait_until_ready(servers[0])
            yield servers
        finally:
            for server in servers:
                server.process.kill()
                server.process.wait()

    return start


def _spawn(arguments: Iterable[str | Path], environment: dict[str, str], log: Path) -> Server:
    port, grpc_port = free_ports(2)
    ports = ("--port", str(port), "--grpc-port", str(grpc_port))
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "serve.py", *map(str, arguments), *ports],
            cwd=ROOT,
            env=environment,
            stderr=file,
            text=True,
        )
    return Server(process, port, grpc_port, log)


@pytest.fixture(scope="session")
def start_server(environment, tmp_path_factory):
    """Start serve.py with arguments; a context manager that gives the `Server`."""

    @contextmanager
    def start(*arguments: str | Path, **more: str) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("log") / "serve.log"
        server = _spawn(arguments, environment | more, log)
        try:
            wait_until_ready(server)
            yield server
        finally:
            server.process.kill()
            server.process.wait()

    return start


def wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()}")
