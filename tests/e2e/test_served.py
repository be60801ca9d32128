"""A checkpoint goes in, text comes out: real processes, real clients, transformers' own tokens."""

from __future__ import annotations

import asyncio
import json
import signal
import threading

import grpc
import httpx
import numpy as np
import openai
import pytest
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated import sglang_scheduler_pb2_grpc as rpc

import glmjax
from cases import GOLDENS, served_prompts
from glmjax.bench.synthetic import default_config
from glmjax.text.tokenizer import Tokenizer

PROMPTS = served_prompts(default_config())
SHAPES = ("--max-running-requests", "16", "--chunked-prefill-size", "64")


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    """What transformers generated."""
    return np.load(GOLDENS / "served.npz")["greedy"].tolist()


@pytest.fixture(scope="module")
def server(start_server, converted):
    with start_server("--model", converted, "--mesh", "8", *SHAPES) as server:
        yield server


async def through_grpc(port: int, ids: list[int]) -> list[int]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        params = pb.SamplingParams(temperature=0, max_new_tokens=64, ignore_eos=True)
        request = pb.GenerateRequest(
            request_id=str(ids),
            tokenized=pb.TokenizedInput(input_ids=ids),
            sampling_params=params,
            stream=True,
        )
        chunks, complete = [], None
        async for response in rpc.SglangSchedulerStub(channel).Generate(request):
            chunks += response.chunk.token_ids
            complete = response.complete
        assert complete is not None
        assert list(complete.output_ids) == chunks
        assert complete.finish_reason == "length"
        return chunks


async def through_openai(client: openai.AsyncOpenAI, ids: list[int]) -> str:
    answer = await client.completions.create(
        model="tiny",
        prompt=ids,
        max_tokens=64,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 64
    return answer.choices[0].text


def test_all_clients_at_once_get_what_transformers_generates(server, greedy, converted):
    async def ask() -> tuple[list[list[int]], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            ids = [through_grpc(server.grpc_port, p) for p in PROMPTS]
            texts = [through_openai(client, p) for p in PROMPTS]
            done = await asyncio.gather(*ids, *texts)
        return done[: len(PROMPTS)], done[len(PROMPTS) :]

    token_ids, texts = asyncio.run(ask())
    assert token_ids == greedy
    tokenizer = Tokenizer.from_folder(converted)
    assert texts == [tokenizer.decode(tokens) for tokens in greedy]


def test_generate_speaks_token_ids(server, greedy):
    body = {
        "input_ids": PROMPTS[:3],
        "sampling_params": {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True},
    }
    answers = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert [answer["output_ids"] for answer in answers] == greedy[:3]


def test_a_chat_streams_what_it_returns_in_one_piece(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    ask = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello there"}],
        "max_tokens": 30,
        "seed": 5,
    }
    whole = client.chat.completions.create(**ask)
    parts = list(client.chat.completions.create(**ask, stream=True))
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed == whole.choices[0].message.content
    assert [model.id for model in client.models.list()] == ["tiny"]
    client.close()


def test_sigterm_lets_requests_finish_and_refuses_new_ones(start_server, converted):
    with start_server("--model", converted, *SHAPES) as server:
        chunks: list[dict] = []

        def read() -> None:
            body = {
                "input_ids": PROMPTS[0],
                "stream": True,
                "sampling_params": {"max_new_tokens": 400, "ignore_eos": True},
            }
            with httpx.stream("POST", f"{server.url}/generate", json=body, timeout=60) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        chunks.append(json.loads(line[6:]))
                        started.set()

        started = threading.Event()
        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(60)
        server.process.send_signal(signal.SIGTERM)
        refused = httpx.post(f"{server.url}/generate", json={"input_ids": [1]})
        reader.join(60)
        assert chunks[-1]["meta_info"]["completion_tokens"] == 400
        assert refused.status_code == 503
        assert server.process.wait(60) == 0
        assert "stopped" in server.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1", "2", "4", "8", "2x4"])
def test_every_mesh_gives_the_same_tokens(mesh, converted, greedy):
    scheduler = glmjax.SchedulerConfig(max_running_requests=16, chunked_prefill_size=64)
    model = glmjax.LLM(converted, mesh=mesh, scheduler=scheduler)
    done = model.generate(PROMPTS, temperature=0, max_new_tokens=64, ignore_eos=True)
    assert [list(completion.token_ids) for completion in done] == greedy
