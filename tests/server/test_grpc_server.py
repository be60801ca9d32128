"""SglangScheduler through its own stubs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import zipfile
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from live import DRAFTS, HOST, Live, live, oracle
from smg_grpc_proto import sglang_scheduler_pb2 as pb
from smg_grpc_proto.generated import common_pb2

from glmjax.runner.fake import token_logprob
from glmjax.scheduler.drafting import Drafting
from glmjax.server.grpc.server import SERVICE
from glmjax.server.served import ServedModel

PROMPT = [5, 6, 7]


def ask(stream: bool = False, fields: dict[str, Any] | None = None, **sampling: Any) -> Any:
    params = {"max_new_tokens": 12, "ignore_eos": True, "skip_special_tokens": True} | sampling
    return pb.GenerateRequest(
        tokenized=pb.TokenizedInput(input_ids=PROMPT),
        sampling_params=pb.SamplingParams(**params),
        stream=stream,
        **(fields or {}),
    )


def generate(server: Live, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
    with server.stub() as stub:
        return list(stub.Generate(request))


@contextlib.contextmanager
def refused(code: grpc.StatusCode, words: str) -> Iterator[None]:
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is code
    assert words in (caught.value.details() or "")


def test_all_at_once(server: Live):
    (response,) = generate(server, ask(fields={"request_id": "mine"}))
    assert response.request_id == "mine"
    assert list(response.complete.output_ids) == oracle(PROMPT, 12)
    assert response.complete.finish_reason == "length"
    assert response.complete.WhichOneof("matched_stop") is None
    assert (response.complete.prompt_tokens, response.complete.completion_tokens) == (3, 12)


def test_chunks_add_up_to_the_whole(server: Live):
    *chunks, last = generate(server, ask(stream=True))
    ids: list[int] = []
    for response in chunks:
        assert response.WhichOneof("response") == "chunk"
        ids += response.chunk.token_ids
        assert response.chunk.completion_tokens == len(ids)
    assert list(last.complete.output_ids) == ids == oracle(PROMPT, 12)


@pytest.mark.parametrize("stream", [False, True])
def test_one_complete_for_each_choice(server: Live, stream: bool):
    responses = generate(server, ask(stream=stream, n=4, temperature=1.0))
    completes = [r.complete for r in responses if r.HasField("complete")]
    assert sorted(complete.index for complete in completes) == [0, 1, 2, 3]
    assert len({tuple(complete.output_ids) for complete in completes}) == 4
    for complete in completes if stream else []:
        chunks = [r.chunk for r in responses if r.HasField("chunk")]
        own = [t for chunk in chunks if chunk.index == complete.index for t in chunk.token_ids]
        assert own == list(complete.output_ids)


def test_stop_tokens(server: Live):
    ids = oracle(PROMPT, 12)
    (response,) = generate(server, ask(stop_token_ids=[ids[4]]))
    end = ids.index(ids[4]) + 1
    assert list(response.complete.output_ids) == ids[:end]
    assert response.complete.finish_reason == "stop"
    assert response.complete.matched_token_id == ids[4]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(server: Live, stream: bool):
    ids, decode = oracle(PROMPT, 12), server.frontend.served.tokenizer.decode
    stop = decode(ids)[3:6]
    *chunks, last = generate(server, ask(stream=stream, stop=[stop]))
    got = list(last.complete.output_ids)
    assert got == ids[: len(got)]
    assert stop in decode(got)
    assert stop not in decode(got[:-1])
    assert (last.complete.finish_reason, last.complete.matched_stop_str) == ("stop", stop)
    assert last.complete.completion_tokens == len(got)
    assert [t for r in chunks for t in r.chunk.token_ids] == (got if stream else [])
    server.wait_idle()


def test_zeros_mean_unset(server: Live):
    zeros = ask(top_p=0.0, top_k=0, repetition_penalty=0.0, n=0, min_p=0.0, regex="")
    (response,) = generate(server, zeros)
    assert list(response.complete.output_ids) == oracle(PROMPT, 12)
    (response,) = generate(server, ask(top_p=1.0, top_k=-1, repetition_penalty=1.0, n=1))
    assert list(response.complete.output_ids) == oracle(PROMPT, 12)


def expected_logprobs(ids: list[int]) -> list[float]:
    """Of every token but the first."""
    return [token_logprob(np.array(ids[:n]), ids[n]) for n in range(1, len(ids))]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Live, stream: bool):
    fields = {"return_logprob": True, "logprob_start_len": 1, "top_logprobs_num": 2}
    *chunks, last = generate(server, ask(stream=stream, fields=fields))
    ids = list(last.complete.output_ids)
    own = pytest.approx(expected_logprobs(PROMPT + ids), abs=1e-5)
    prompt, output = last.complete.input_logprobs, last.complete.output_logprobs
    assert list(prompt.token_ids) + list(output.token_ids) == PROMPT[1:] + ids
    assert [p.value for p in prompt.token_logprobs] + list(output.token_logprobs) == own
    tops = [*prompt.top_logprobs, *output.top_logprobs]
    assert [list(top.token_ids) for top in tops] == [[0, 1]] * (len(ids) + 2)
    first = [token_logprob(np.array(PROMPT[:1]), other) for other in (0, 1)]
    assert list(tops[0].values) == pytest.approx(first, abs=1e-5)
    pieces = [value for r in chunks for value in r.chunk.output_logprobs.token_logprobs]
    assert pieces == (list(output.token_logprobs) if stream else [])
    with_prompt = [r.chunk.HasField("input_logprobs") for r in chunks]
    assert with_prompt == [n == 0 for n in range(len(chunks))]


def test_logprobs_of_the_whole_prompt_and_of_none(server: Live):
    (whole,) = generate(server, ask(fields={"return_logprob": True}, max_new_tokens=0))
    assert list(whole.complete.output_ids) == []
    first, *others = whole.complete.input_logprobs.token_logprobs
    assert not first.HasField("value")
    assert [o.value for o in others] == pytest.approx(expected_logprobs(PROMPT), abs=1e-5)
    fields = {"return_logprob": True, "logprob_start_len": -1}
    (none,) = generate(server, ask(fields=fields))
    assert not none.complete.HasField("input_logprobs")
    assert len(none.complete.output_logprobs.token_logprobs) == 12
    assert list(none.complete.output_logprobs.top_logprobs) == []
    (bare,) = generate(server, ask())
    assert not bare.complete.HasField("output_logprobs")
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "logprob_start_len is 4"):
        generate(server, ask(fields={"return_logprob": True, "logprob_start_len": 4}))


def test_drafts_are_counted(server: Live, monkeypatch):
    monkeypatch.setattr(Drafting, "pays", lambda *_: True)  # however busy this machine is
    server.wait_idle()
    before = server.frontend.engine.snapshot().counters
    (response,) = generate(server, ask(max_new_tokens=200))
    server.wait_idle()
    after = server.frontend.engine.snapshot().counters
    drafted, accepted = response.complete.spec_draft_tokens, response.complete.spec_accepted_tokens
    # what a step in flight drafted is counted there after its request has ended
    assert 0 <= sum(after.drafted) - sum(before.drafted) - drafted <= DRAFTS
    assert 0 < accepted <= drafted


def test_flush_cache(server: Live):
    prompt = list(range(100, 164))

    def cached() -> int:
        request = ask(max_new_tokens=1)
        request.tokenized.input_ids[:] = prompt
        return generate(server, request)[0].complete.cached_tokens

    cached()
    assert cached() > 0
    with server.stub() as stub:
        assert stub.FlushCache(common_pb2.FlushCacheRequest()).success
    assert cached() == 0


def test_a_step_that_fails(served: ServedModel):
    with live(served, step_s=0.002) as server:
        request = ask(stream=True, max_new_tokens=4000)
        with (
            server.stub() as stub,
            refused(grpc.StatusCode.INTERNAL, "the device is on fire"),
        ):
            for _ in stub.Generate(request):
                server.runner.broken = True
        server.runner.broken = False
        (response,) = generate(server, ask())
        assert list(response.complete.output_ids) == oracle(PROMPT, 12)


def test_no_sampling_params_is_greedy_to_the_models_end(server: Live):
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=PROMPT))
    (response,) = generate(server, request)
    ends = server.frontend.served.eos_token_ids
    assert list(response.complete.output_ids) == oracle(PROMPT, 4096, ends=ends)
    assert response.complete.matched_token_id in ends


def struct(**values: Any) -> Struct:
    made = Struct()
    made.update(values)
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("structural_tag", "{}"),
        ("stream_interval", 8),
        ("custom_params", struct(a=1)),
    ],
)
def test_sampling_that_is_not_served(server: Live, name: str, value: Any):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: not served yet"):
        generate(server, ask(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_ids_logprob", [1]),
        ("return_hidden_states", True),
        ("custom_logit_processor", "x"),
        ("input_embeds", [0.5]),
        ("lora_id", "x"),
        ("data_parallel_rank", 0),
        ("mm_inputs", pb.MultimodalInputs(image_urls=["x"])),
        ("disaggregated_params", pb.DisaggregatedParams(bootstrap_host="x")),
    ],
)
def test_requests_that_are_not_served(server: Live, name: str, value: Any):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, f"{name}: not served yet"):
        generate(server, ask(fields={name: value}))


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 5000}, "ask for at most 4093"),
        ({"stop": [""]}, "empty string"),
        ({"frequency_penalty": 2.5}, "frequency_penalty is 2.5"),
        ({"min_p": -0.5}, "min_p is -0.5"),
        ({"min_new_tokens": 13}, "min_new_tokens 13 is above max_new_tokens 12"),
        ({"logit_bias": {"512": 1.0}}, "0 to 511"),
        ({"n": 1000}, "n is 1000"),
    ],
)
def test_values_out_of_range(server: Live, sampling: dict, words: str):
    with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
        generate(server, ask(**sampling))


@pytest.mark.parametrize(
    ("ids", "words"),
    [([], "prompt is empty"), ([512], "token id 512"), ([1] * 5000, "5000 tokens")],
)
def test_bad_prompts(server: Live, ids: list[int], words: str):
    request = pb.GenerateRequest(tokenized=pb.TokenizedInput(input_ids=ids))
    with refused(grpc.StatusCode.INVALID_ARGUMENT, words):
        generate(server, request)


def test_other_calls_are_not_served(server: Live):
    calls = {
        "Embed": pb.EmbedRequest(),
        "StartProfile": common_pb2.StartProfileRequest(),
        "SubscribeKvEvents": common_pb2.SubscribeKvEventsRequest(),
        "LoadLoRAAdapter": pb.LoadLoRAAdapterRequest(),
    }
    with server.stub() as stub:
        for name, request in calls.items():
            with refused(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not served yet"):
                answer = getattr(stub, name)(request)
                list(answer)


def test_information(server: Live):
    served = server.frontend.served
    with server.stub() as stub:
        model = stub.GetModelInfo(pb.GetModelInfoRequest())
        assert model.served_model_name == "tiny-glm"
        assert model.tokenizer_path == str(served.folder)
        assert (model.max_context_length, model.vocab_size) == (4096, 512)
        assert tuple(model.eos_token_ids) == served.eos_token_ids
        assert list(model.architectures) == ["Glm4MoeForCausalLM"]
        assert model.is_generation
        assert model.weight_version == "default"
        info = stub.GetServerInfo(pb.GetServerInfoRequest())
        assert info.server_args["served_model_name"] == "tiny-glm"
        assert not info.is_paused
        assert info.max_total_num_tokens == server.frontend.engine.load().max_total_tokens
        (load,) = stub.GetLoads(pb.GetLoadsRequest()).loads
        assert (load.num_running_reqs, load.max_running_requests) == (0, 8)
        health = stub.HealthCheck(pb.HealthCheckRequest())
        assert (health.healthy, health.message) == (True, "running")


def test_the_tokenizer_travels(server: Live):
    folder = server.frontend.served.folder
    with server.stub() as stub:
        first = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
        assert first == list(stub.GetTokenizer(common_pb2.GetTokenizerRequest()))
    data = b"".join(chunk.data for chunk in first)
    assert [chunk.sha256 for chunk in first[:-1]] == [""] * (len(first) - 1)
    assert first[-1].sha256 == hashlib.sha256(data).hexdigest()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= set(archive.namelist())
        for name in archive.namelist():
            assert archive.read(name) == (folder / name).read_bytes()
        assert not any("safetensors" in name for name in archive.namelist())


def test_standard_health_and_reflection(server: Live):
    with grpc.insecure_channel(f"{HOST}:{server.grpc_port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICE in ProtoReflectionDescriptorDatabase(channel).get_services()
