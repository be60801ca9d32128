"""A checkpoint goes in, text comes out: real processes, real clients, transformers' own tokens."""

from __future__ import annotations

import json
import signal
import threading

import httpx
import numpy as np
import openai
import pytest

import glmjax
from cases import GOLDENS, served_prompts
from clients import ask_all
from gateway import gateway
from glmjax.bench.synthetic import default_config
from glmjax.text.tokenizer import Tokenizer

PROMPTS = served_prompts(default_config())
# Few, since each is a program: decoding of 1 and 8 rows, one chunk, and both together.
SHAPES = ("--max-running-requests", "8", "--chunked-prefill-size", "16")


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    """What transformers generated."""
    return np.load(GOLDENS / "served.npz")["greedy"].tolist()


@pytest.fixture(scope="module")
def server(start_server, converted):
    names = ("--served-model-name", "tiny", "other")
    with start_server("--model", converted, "--mesh", "8", *SHAPES, *names) as server:
        yield server


def test_all_clients_at_once_get_what_transformers_generates(server, greedy, converted):
    token_ids, texts = ask_all(server.port, server.grpc_port, PROMPTS)
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


def test_a_parameter_beyond_int32_is_refused_and_harms_nobody(server, greedy):
    for name in ("top_k", "max_new_tokens"):
        params = {"temperature": 1, name: 2**33}
        body = {"input_ids": PROMPTS[0], "sampling_params": params}
        assert httpx.post(f"{server.url}/generate", json=body).status_code == 400
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
    assert answer["output_ids"] == greedy[0]


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
    assert [model.id for model in client.models.list()] == ["tiny", "other"]
    client.close()


def test_a_gateway_in_front_answers_the_same(server, tmp_path):
    answers = []
    with gateway(server.grpc_port, "tiny", tmp_path / "smg.log") as url:
        for base_url in (url, f"{server.url}/v1"):
            with openai.OpenAI(base_url=base_url, api_key="none") as client:
                answer = client.chat.completions.create(
                    model="tiny",
                    messages=[{"role": "user", "content": "Hello there"}],
                    max_tokens=20,
                    temperature=0,
                )
                # cut off within a character, the gateway drops what we show as U+FFFD
                answers.append(answer.choices[0].message.content.rstrip("\ufffd"))
    assert answers[0] == answers[1] != ""


def test_sigterm_lets_requests_finish_and_refuses_new_ones(start_server, converted, greedy):
    small = ("--max-running-requests", "1", "--chunked-prefill-size", "16")
    with start_server("--model", converted, *small, GLMJAX_API_KEY="sk-one") as server:
        client = httpx.Client(base_url=server.url, headers={"x-api-key": "sk-one"}, timeout=60)
        chunks: list[dict] = []

        def read() -> None:
            body = {
                "input_ids": PROMPTS[0],
                "stream": True,
                "sampling_params": {"max_new_tokens": 400, "temperature": 0, "ignore_eos": True},
            }
            with client.stream("POST", "/generate", json=body) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        chunks.append(json.loads(line[6:]))
                        started.set()

        started = threading.Event()
        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(60)
        server.process.send_signal(signal.SIGTERM)
        stranger = httpx.post(f"{server.url}/generate", json={"input_ids": [1]})
        refused = client.post("/generate", json={"input_ids": [1]})
        reader.join(60)
        client.close()
        assert chunks[-1]["meta_info"]["completion_tokens"] == 400
        assert chunks[-1]["output_ids"][:64] == greedy[0]
        assert (stranger.status_code, refused.status_code) == (401, 503)
        assert server.process.wait(60) == 0
        log = server.log.read_text()
        assert "stopped" in log
        assert "API keys: 1" in log
        assert "sk-one" not in log


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1", "2", "4", "8", "2x4"])
def test_every_mesh_gives_the_same_tokens(mesh, converted, greedy):
    scheduler = glmjax.SchedulerConfig(max_running_requests=16, chunked_prefill_size=64)
    model = glmjax.LLM(converted, mesh=mesh, scheduler=scheduler)
    done = model.generate(PROMPTS, temperature=0, max_new_tokens=64, ignore_eos=True)
    assert [list(completion.token_ids) for completion in done] == greedy
