"""The bundled glm-nano in transformers: it loads the folder, and agrees."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import transformers

import glmjax
from glmjax.bundled import ASSET, converted
from glmjax.config import MeshConfig
from glmjax.runner.weights import load
from glmjax.sharding import make_mesh
from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data.encode import render_prompt
from glmjax.train.data.mixture import draw
from harness import Forward
from torch_models import greedy

pytestmark = pytest.mark.parity

NEW_TOKENS = 48


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(ASSET, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield converted()


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rng, template = random.Random(7), ChatTemplate.from_folder(ASSET)
    return [render_prompt(draw(rng, "held_out"), template) for _ in range(12)]


def test_the_folder_loads_whole():
    _, report = transformers.AutoModelForCausalLM.from_pretrained(ASSET, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tokenizer_and_template_agree(prompts):
    theirs = transformers.AutoTokenizer.from_pretrained(ASSET)
    problem = draw(random.Random(3), "held_out", "tool_call")
    rendered = theirs.apply_chat_template(
        list(problem.messages[:-1]),
        tools=list(problem.tools),
        enable_thinking=problem.thinking,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert rendered == render_prompt(problem, ChatTemplate.from_folder(ASSET))
    ours = Tokenizer.from_folder(ASSET)
    for prompt in prompts:
        assert theirs(prompt, add_special_tokens=False).input_ids == ours.encode(prompt)


def test_logits_agree(model, prompts, folder):
    mesh = make_mesh(MeshConfig())
    config, params = load(folder, mesh, "float32")
    ids = np.array(Tokenizer.from_folder(folder).encode(prompts[0])[:80], np.int32)
    logits, _ = Forward(config, mesh, params).main(ids)
    with torch.no_grad():
        expected = model(torch.tensor(ids[None])).logits[0].numpy()
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()


def test_greedy_tokens_agree(model, prompts, folder):
    llm = glmjax.LLM(folder, dtype="float32")
    ids = [llm.served.tokenizer.encode(prompt) for prompt in prompts]
    answers = llm.generate(ids, max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    assert [list(a.token_ids) for a in answers] == [greedy(model, i, NEW_TOKENS) for i in ids]
