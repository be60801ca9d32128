"""Keys and origins: who is let in, by which header, and what others are told."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import anthropic
import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from live import HOST, Live, live
from smg_grpc_proto import sglang_scheduler_pb2 as pb

import serve
from glmjax.errors import ConfigError
from glmjax.server.access import EVERYONE, Access
from glmjax.server.http.endpoints import ENDPOINTS
from glmjax.server.http.keys import OPEN
from glmjax.server.served import ServedModel

KEYS = ("sk-one", "sk-two")
PAGE, OTHER = "https://chat.example.com", "https://evil.example.com"
HI = [{"role": "user", "content": "Hi"}]
ASCII = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def guarded(served: ServedModel) -> Iterator[Live]:
    with live(served, Access(KEYS, (PAGE,))) as server:
        yield server


@pytest.fixture(scope="module")
def http(guarded: Live) -> Iterator[httpx.Client]:
    with guarded.http as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@given(st.lists(ASCII, min_size=1, max_size=3), ASCII)
def test_only_a_whole_key_is_one(keys: list[str], offered: str):
    access = Access(tuple(keys))
    refused = offered not in keys
    assert (access.refusal(f"Bearer {offered}", None) is not None) == refused
    assert (access.refusal(None, offered) is not None) == refused


@pytest.mark.parametrize("bearer", ["", "Bearer", "Bearer ", "Basic sk-one", "sk-one", "Bearer é"])
def test_what_is_no_key_is_refused(bearer: str):
    assert Access(KEYS).refusal(bearer, None)
    assert EVERYONE.refusal(bearer, None) is None


def test_either_header_will_do():
    access = Access(KEYS)
    assert access.refusal("bearer sk-two", "none") is None  # a client's own default beside it
    assert access.refusal("Bearer none", "sk-one") is None
    assert "not known" in str(access.refusal("Bearer none", None))
    assert "no API key was given" in str(access.refusal(None, None))


@pytest.mark.parametrize("key", ["", " ", "two words", "tab\t", "schlüssel", "line\n"])
def test_keys_that_no_header_carries(key: str):
    with pytest.raises(ConfigError, match="an API key is empty, or has spaces") as caught:
        Access((key,))
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize("origin", ["", "chat.example.com", f"{PAGE}/", f"{PAGE}/chat", "https://"])
def test_what_is_no_origin(origin: str):
    with pytest.raises(ConfigError, match="is no origin of web pages, expected scheme://host"):
        Access(origins=(origin,))


def test_keys_are_not_printed():
    assert "sk-one" not in repr(Access(KEYS))


def test_keys_of_the_command_line_or_else_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    said = serve.parser().parse_args(["--api-key", *KEYS, "--allowed-origins", PAGE])
    unsaid = serve.parser().parse_args([])
    assert serve.access_of(unsaid) == EVERYONE
    monkeypatch.setenv("GLMJAX_API_KEY", "sk-three  sk-four")
    assert serve.access_of(said) == Access(KEYS, (PAGE,))
    assert serve.access_of(unsaid).keys == ("sk-three", "sk-four")


def test_keys_are_not_sent_to_other_hosts():
    assert "sk-one" not in repr(serve.shared(serve.parser().parse_args(["--api-key", "sk-one"])))


@pytest.mark.parametrize("path", ENDPOINTS)
def test_every_path_but_the_open_ones_needs_a_key(http: httpx.Client, path: str):
    for method in ("get", "post"):
        answer = http.request(method, path)
        assert (answer.status_code == 401) == (path not in OPEN), (method, answer.text)


@pytest.mark.parametrize("path", ["/openapi.json", "/no/such/path", "/health/", "//health", "/x"])
def test_nothing_else_is_told_without_a_key(http: httpx.Client, path: str):
    answer = http.get(path)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert http.get(path, headers=bearer("sk-two")).status_code != 401


def test_a_refused_body_is_not_read(http: httpx.Client):
    answer = http.post("/v1/chat/completions", content=b"{" * 5_000_000)
    assert answer.status_code == 401


def openai_of(server: Live, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def anthropic_of(server: Live, **key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, max_retries=0, **key)


@pytest.mark.parametrize("key", KEYS)
def test_clients_with_a_key(guarded: Live, key: str):
    with openai_of(guarded, key) as client:
        assert client.chat.completions.create(
            model=guarded.model, messages=HI, max_tokens=2
        ).choices
    for given_as in ("api_key", "auth_token"):
        with anthropic_of(guarded, **{given_as: key}) as client:
            said = client.messages.create(model=guarded.model, messages=HI, max_tokens=2)
            assert said.usage.output_tokens == 2


def test_clients_with_another_key(guarded: Live, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    wrong, unknown = "sk-three", "this API key is not known"
    with openai_of(guarded, wrong) as one, pytest.raises(openai.AuthenticationError, match=unknown):
        one.models.list()
    error = anthropic.AuthenticationError
    with anthropic_of(guarded, api_key=wrong) as other, pytest.raises(error, match=unknown) as told:
        other.messages.create(model=guarded.model, messages=HI, max_tokens=2)
    assert told.value.type == "authentication_error"
    assert len([line for line in caplog.messages if f"401, {unknown}" in line]) == 2
    assert not any(wrong in line for line in caplog.messages)


@contextlib.contextmanager
def channel(server: Live) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"{HOST}:{server.grpc_port}") as made:
        yield made


CALLS = [
    ("HealthCheck", pb.HealthCheckRequest(), False),
    ("GetModelInfo", pb.GetModelInfoRequest(), False),
    ("Generate", pb.GenerateRequest(), True),
]


@pytest.mark.parametrize(("name", "request_", "streams"), CALLS, ids=[c[0] for c in CALLS])
def test_grpc_needs_a_key_too(guarded: Live, name: str, request_, streams: bool):
    with guarded.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        list(stub.Generate(request_)) if streams else getattr(stub, name)(request_)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "no API key was given" in caught.value.details()


def test_grpc_with_a_key(guarded: Live):
    metadata = [("authorization", "Bearer sk-one")]
    request = pb.GenerateRequest(request_id="keyed")
    request.tokenized.input_ids.extend([1, 2, 3])
    request.sampling_params.max_new_tokens = 2
    with guarded.stub() as stub:
        assert stub.GetModelInfo(pb.GetModelInfoRequest(), metadata=metadata).is_generation
        (answer,) = stub.Generate(request, metadata=metadata)
    assert len(answer.complete.output_ids) == 2


def test_grpc_probes_need_none(guarded: Live):
    with channel(guarded) as made:
        answer = health_pb2_grpc.HealthStub(made).Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def preflight(client: httpx.Client, origin: str) -> httpx.Response:
    asked = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    return client.options("/v1/chat/completions", headers=asked)


def test_a_page_of_an_allowed_origin_may_ask(http: httpx.Client):
    asked = preflight(http, PAGE)  # which browsers send without the key
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for headers in (bearer("sk-one"), {}):  # errors too, else a page sees none
        answer = http.get("/v1/models", headers={"origin": PAGE} | headers)
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert answer.status_code == (200 if headers else 401)


def test_other_pages_may_not(http: httpx.Client, server: Live):
    with server.http as without:
        for client in (http, without):
            assert preflight(client, OTHER).status_code >= 400
            answer = client.get("/v1/models", headers={"origin": OTHER} | bearer("sk-one"))
            assert answer.status_code == 200
            assert "access-control-allow-origin" not in answer.headers


def test_the_description_tells_of_keys(http: httpx.Client, server: Live):
    told = http.get("/openapi.json", headers=bearer("sk-one")).json()
    needed = [{name: []} for name in told["components"]["securitySchemes"]]
    assert len(needed) == 2
    for path, methods in told["paths"].items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) == (path not in OPEN), path
            said = operation.get("security", told["security"])
            assert said == ([] if path in OPEN else needed), path
    with server.http as without:
        assert "security" not in without.get("/openapi.json").json()
