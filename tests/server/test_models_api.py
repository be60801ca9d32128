"""The names of the model, and what stands at the server's root."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import anthropic
import httpx
import pytest
from live import Live, live

from glmjax.server.served import ServedModel

HI: dict = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
NAMES = ["tiny-glm", "claude-small", "org/model"]


@pytest.fixture(scope="module")
def named(served: ServedModel) -> Iterator[Live]:
    with live(replace(served, aliases=tuple(NAMES[1:]))) as server:
        yield server


@pytest.fixture(scope="module")
def http(named: Live) -> Iterator[httpx.Client]:
    with named.http as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_every_name_is_served_and_told_as_the_first(http: httpx.Client, path: str, name: str):
    answer = http.post(path, json=HI | {"model": name}).json()
    assert answer["model"] == NAMES[0]


def test_other_names_are_refused(http: httpx.Client):
    answer = http.post("/v1/chat/completions", json=HI | {"model": "tiny"})
    assert answer.status_code == 404
    assert "the model 'tiny' is not served here; 'tiny-glm' is" in answer.text
    assert http.get("/v1/models/tiny").status_code == 404


def test_openais_client_lists_all(named: Live):
    with named.openai as client:
        assert [model.id for model in client.models.list()] == NAMES
        for name in NAMES:
            model = client.models.retrieve(name)
            assert (model.id, model.object, model.owned_by) == (name, "model", "glmjax")


def test_anthropics_client_lists_all(named: Live):
    with anthropic.Anthropic(base_url=named.url, api_key="none", max_retries=0) as client:
        page = client.models.list()
        assert [(m.id, m.display_name, m.type) for m in page] == [(n, n, "model") for n in NAMES]
        assert (page.first_id, page.last_id, page.has_more) == (NAMES[0], NAMES[-1], False)
        model = client.models.retrieve(NAMES[1])
        assert abs(model.created_at.timestamp() - named.frontend.started) <= 1


def test_who_looks_at_the_root_finds_the_way(http: httpx.Client):
    said = http.get("/").json()
    assert said == {"server": "glmjax", "model": NAMES[0], "description": "/openapi.json"}
    assert http.get(said["description"]).json()["openapi"].startswith("3.1")
    assert http.head("/").status_code == 200
