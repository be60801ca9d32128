"""A real gateway in front of the gRPC server."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from live import live, oracle
from smg_grpc_proto.generated import common_pb2

from gateway import gateway
from glmjax.runner.fake import token_logprob
from glmjax.server.served import ServedModel

HI: list[Any] = [{"role": "user", "content": "hi"}]


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

    def chat(**options: Any) -> Any:
        options = {"max_tokens": 10, "temperature": 0} | options
        return client.chat.completions.create(model="tiny-glm", messages=HI, **options)

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
    assert chat(frequency_penalty=0.5, presence_penalty=0.5).choices[0].message.content
    content = chat(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    seen = [served.chat_prompt(HI) + ids[:n] for n in range(10)]
    own = [token_logprob(np.array(s), i) for s, i in zip(seen, ids, strict=True)]
    assert [c.logprob for c in content] == pytest.approx(own, abs=1e-4)
    assert [len(c.top_logprobs) for c in content] == [2] * 10
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}}
    schema |= {"required": ["a"], "additionalProperties": False}
    asked: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"chat_template_kwargs": {"enable_thinking": False}}
    whole = chat(response_format=asked, max_tokens=300, extra_body=body)
    assert json.loads(whole.choices[0].message.content)["a"] in (True, False)
    with pytest.raises(openai.BadRequestError, match="regex must be"):
        chat(extra_body={"regex": "("})
