"""`smg`, a gateway that speaks SGLang's gRPC to workers, started as a user would."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from processes import free_ports

HOST = "127.0.0.1"
START_TIMEOUT_S = 60


@contextmanager
def gateway(grpc_port: int, model: str, log: Path) -> Iterator[str]:
    """A gateway before one worker; gives the URL of its OpenAI API. Killed whatever happens."""
    port, metrics_port = free_ports(2)
    command = [str(Path(sys.executable).with_name("smg")), "launch", "--log-level", "warn"]
    command += ["--worker-urls", f"grpc://{HOST}:{grpc_port}", "--host", HOST]
    command += ["--port", str(port), "--prometheus-port", str(metrics_port)]
    url = f"http://{HOST}:{port}/v1"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not is_ready(url, model):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def is_ready(url: str, model: str) -> bool:
    """Whether it takes requests: it lists the model before it has the model's tokenizer."""
    messages = [{"role": "user", "content": "hi"}]
    body = {"model": model, "messages": messages, "max_tokens": 1}
    try:
        return httpx.post(f"{url}/chat/completions", json=body).status_code == 200
    except httpx.TransportError:
        return False
