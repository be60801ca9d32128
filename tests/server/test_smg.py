"""A real gateway in front of the gRPC server."""

from __future__ import annotations

import shutil
from pathlib import Path

import openai
import pytest
from live import live, oracle
from smg_grpc_proto.generated import common_pb2

from gateway import gateway
from glmjax.server.served import ServedModel

HI = [{"role": "user", "content": "hi"}]


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
            gateway(server.grpc_port, "tiny-glm", tmp_path / "smg.log") as url,
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
