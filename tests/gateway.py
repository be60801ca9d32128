"""`smg`, a gateway that speaks SGLang's gRPC to workers, started as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
from ports import HOST, free_ports

SMG = Path(sys.executable).with_name("smg")
START_TIMEOUT_S = 60


@contextmanager
def gateway(grpc_ports: int | Sequence[int], model: str, log: Path, *options: str) -> Iterator[str]:
    """A gateway before one worker or several; gives the URL of its OpenAI API."""
    ports = [grpc_ports] if isinstance(grpc_ports, int) else grpc_ports
    workers = (f"grpc://{HOST}:{port}" for port in ports)
    with launched([*options, "--worker-urls", *workers], model, log) as url:
        yield url


@contextmanager
def launched(
    options: Sequence[str], model: str, log: Path, key: str = "none", **environment: str
) -> Iterator[str]:
    """A gateway with options; gives the URL of its OpenAI API.

    It is given once it answers, and killed whatever happens.
    """
    port, metrics_port = free_ports(2)
    command = [str(SMG), "launch", *options, "--log-level", "warn", "--host", HOST]
    command += ["--port", str(port), "--prometheus-port", str(metrics_port)]
    url = f"http://{HOST}:{port}/v1"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(url, model, key):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def is_ready(url: str, model: str, key: str = "none") -> bool:
    """Whether it takes requests: it lists the model before it has the model's tokenizer."""
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": model, "messages": messages, "max_tokens": 1}
    headers = {"Authorization": f"Bearer {key}"}
    try:
        answer = httpx.post(f"{url}/chat/completions", json=body, headers=headers)
        return answer.status_code == 200
    except httpx.TransportError:
        return False
