"""Keys and origins: who is let in, by which header, and what others are told."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import anthropic
import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub
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
ORIGINS = ("*", PAGE, "http://localhost:3000", "http://[::1]:8080", "app://obsidian.md")
ORIGINS += ("https://a:80", "http://a:443", "chrome-extension://abcdef")
NO_ORIGINS = ("", "null", "https://", "chat.example.com", f"{PAGE}/", f"{PAGE}/chat", "https://[")
NO_ORIGINS += ("https://Chat.example.com", "https://bücher.de", "https://*.example.com")
NO_ORIGINS += (f"{PAGE}:443", "http://a:80", "https://h:a", "https://u:p@h", "https://a.com,b.com")
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


def refusal(access: Access, *headers: tuple[str, str]) -> str:
    return access.refusal(headers) or ""


@given(st.lists(ASCII, min_size=1, max_size=3), ASCII)
def test_only_a_whole_key_is_one(keys: list[str], offered: str):
    access = Access(tuple(keys))
    for header in (("authorization", f"Bearer {offered}"), ("x-api-key", offered)):
        assert bool(refusal(access, header)) == (offered not in keys)


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer ", "Basic sk-one", "sk-one", "Bearer é"])
def test_what_is_no_key_is_refused(value: str):
    assert refusal(Access(KEYS), ("authorization", value))
    assert not refusal(EVERYONE, ("authorization", value))


def test_any_header_will_do():
    access = Access(KEYS)
    none = ("x-api-key", "none")  # a client's own default
    assert not refusal(access, ("Authorization", "bearer\tsk-two"), none)
    assert not refusal(access, none, ("x-api-key", " sk-one"))
    assert "not known" in refusal(access, none)
    assert "no API key was given" in refusal(access)
    assert "no API key was given" in refusal(access, ("x-api-keys", "sk-one"))


@pytest.mark.parametrize("key", ["", " ", "two words", "tab\t", "schlüssel", "line\n"])
def test_keys_that_no_header_carries(key: str):
    with pytest.raises(ConfigError, match="an API key is empty, or has spaces") as caught:
        Access((key,))
    assert not key.strip() or key not in str(caught.value)


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_what_is_no_origin(origin: str):
    with pytest.raises(ConfigError, match="is no origin of web pages, expected scheme://host"):
        Access(origins=(origin,))


@pytest.mark.parametrize("origin", ORIGINS)
def test_what_is_an_origin(origin: str):
    assert Access(origins=(origin,)).origins == (origin,)


def test_keys_are_not_printed():
    assert "sk-one" not in repr(Access(KEYS))


def test_keys_of_the_command_line_or_else_of_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLMJAX_API_KEY", raising=False)
    said = serve.parser().parse_args(["--api-key", *KEYS, "--allowed-origins", PAGE])
    unsaid = serve.parser().parse_args([])
    assert serve.access_of(unsaid) == EVERYONE
    monkeypatch.setenv("GLMJAX_API_KEY", "sk-three  sk-four")
    assert serve.access_of(said) == Access(KEYS, (PAGE,))
    assert serve.access_of(unsaid).keys == ("sk-three", "sk-four")
    monkeypatch.setenv("GLMJAX_API_KEY", " ")  # a secret that was meant to be there
    with pytest.raises(ConfigError, match="GLMJAX_API_KEY is set, but holds no API key"):
        serve.access_of(unsaid)


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


def test_grpc_waits_for_no_message_without_a_key(guarded: Live):
    never = threading.Event()

    def silent() -> Iterator[ServerReflectionRequest]:
        never.wait(30)
        yield ServerReflectionRequest()

    with channel(guarded) as made:
        asked = ServerReflectionStub(made).ServerReflectionInfo(silent(), timeout=20)
        with pytest.raises(grpc.RpcError) as caught:
            next(asked)
    never.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


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


def test_a_page_is_told_of_bugs_too(
    guarded: Live, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(guarded.frontend, "served", None)
    answer = http.get("/v1/models", headers={"origin": PAGE} | bearer("sk-one"))
    assert answer.status_code == 500
    assert answer.headers["access-control-allow-origin"] == PAGE


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
