"""A small model folder, and servers over it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from live import Live, live
from responses_talk import script
from scripted import FORMS, Chat, chatting, with_form

from glmjax.bench.synthetic import default_config, write_checkpoint
from glmjax.server.served import ServedModel


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(
        default_config(),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-glm"
    write_checkpoint(folder, config)
    return folder


@pytest.fixture(scope="session")
def served(model_folder: Path) -> ServedModel:
    return ServedModel.load(model_folder)


@pytest.fixture(scope="module")
def server(served: ServedModel) -> Iterator[Live]:
    """Servers that a module's tests share; tests leave them idle."""
    with live(served) as servers:
        yield servers


@pytest.fixture(scope="module", params=FORMS)
def chat(
    request: pytest.FixtureRequest, served: ServedModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Chat]:
    """A model of each form."""
    folder = tmp_path_factory.mktemp("forms") / "model"
    with chatting(with_form(served, request.param, folder), request.param) as made:
        yield made


@pytest.fixture(scope="module")
def talker(served: ServedModel) -> Iterator[Live]:
    """A server that says what it is told to, by `say`."""
    with live(served, script=script(served, "?")) as server:
        yield server


@pytest.fixture(scope="module")
def client(talker: Live) -> Iterator[openai.OpenAI]:
    """OpenAI's, of `talker`."""
    with talker.openai as made:
        yield made
