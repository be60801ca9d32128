"""A real gateway in front of the gRPC server."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from live import HOST, Live, live, oracle, wait_until
from smg_grpc_proto.generated import common_pb2

from glmjax.server.served import ServedModel

HI = [{"role": "user", "content": "hi"}]


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in taken]


def is_ready(url: str) -> bool:
    """Whether it takes requests: it lists the model before it has the model's tokenizer."""
    body = {"model": "tiny-glm", "messages": HI, "max_tokens": 1}
    with contextlib.suppress(httpx.TransportError):
        return httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 200
    return False


@contextlib.contextmanager
def gateway(server: Live, log: Path) -> Iterator[str]:
    """`smg` as a user would start it; killed whatever happens."""
    port, metrics_port = free_ports(2)
    command = [str(Path(sys.executable).with_name("smg")), "launch", "--log-level", "warn"]
    command += ["--worker-urls", f"grpc://{HOST}:{server.grpc_port}", "--host", HOST]
    command += ["--port", str(port), "--prometheus-port", str(metrics_port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            wait_until(lambda: process.poll() is not None or is_ready(f"http://{HOST}:{port}"))
            assert process.poll() is None, log.read_text()
            yield f"http://{HOST}:{port}/v1"
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("remote", [False, True], ids=["same machine", "another machine"])
def test_chat_through_the_gateway(model_folder: Path, tmp_path: Path, remote: bool):
    folder = Path(shutil.copytree(model_folder, tmp_path / "tiny-glm"))
    served = ServedModel.load(folder)
    with live(served) as server:
        if remote:  # the gateway does not see the folder: it must fetch the tokenizer
            with server.stub() as stub:
                list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
            shutil.rmtree(folder)
        with (
            gateway(server, tmp_path / "smg.log") as url,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            check(client, served)


def check(client: openai.OpenAI, served: ServedModel) -> None:
    ids = oracle(served.chat_prompt(HI), 10)
    text = served.tokenizer.decode(ids)

    def chat(**options):
        return client.chat.completions.create(
            model="tiny-glm", messages=HI, temperature=0, max_tokens=10, **options
        )

    answer = chat()
    assert answer.choices[0].message.content == text
    assert answer.usage.completion_tokens == 10
    streamed = [c.choices[0].delta.content or "" for c in chat(stream=True) if c.choices]
    assert "".join(streamed) == text
    assert len(chat(n=2).choices) == 2
    stopped = chat(stop=text[3:5]).choices[0]
    assert (stopped.message.content, stopped.finish_reason) == (
        text[: text.index(text[3:5])],
        "stop",
    )
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: not served yet"):
        chat(frequency_penalty=0.5)
