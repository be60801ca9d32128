"""What the servers read from a model folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from glmjax.bench.synthetic import make_tokenizer
from glmjax.errors import CheckpointError, ConfigError, InvalidRequestError
from glmjax.server.served import ServedModel
from glmjax.text.reader import Opening
from glmjax.text.tokenizer import Tokenizer


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy to change, without weights."""
    ignored = shutil.ignore_patterns("*.safetensors*")
    return Path(shutil.copytree(model_folder, tmp_path / "copy", ignore=ignored))


def generation_config(folder: Path, **values: Any) -> ServedModel:
    (folder / "generation_config.json").write_text(json.dumps(values))
    return ServedModel.load(folder)


def test_names_and_lengths(folder: Path):
    served = ServedModel.load(folder)
    assert (served.name, served.max_seq_len) == ("copy", 4096)
    served = ServedModel.load(folder, name="glm", max_seq_len=100)
    assert (served.name, served.max_seq_len) == ("glm", 100)


def test_end_tokens_come_from_the_generation_config_first(folder: Path):
    assert generation_config(folder, eos_token_id=[7, 8]).eos_token_ids == (7, 8)
    assert generation_config(folder, eos_token_id=9).eos_token_ids == (9,)
    (folder / "generation_config.json").unlink()
    served = ServedModel.load(folder)
    assert served.eos_token_ids == served.config.eos_token_ids != ()


def test_explicit_sampling_wins_over_defaults(folder: Path):
    served = generation_config(folder, temperature=0.6, top_p=0.9, top_k=0)
    sampling = served.sampling(temperature=0.0, top_p=None, max_new_tokens=5)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.0, 0.9, -1)
    assert sampling.max_new_tokens == 5
    assert json.loads(served.default_sampling_json) == {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": -1,
    }


def test_other_defaults_of_a_generation_config(folder: Path):
    sampling = generation_config(folder, min_p=0.1, repetition_penalty=1.05).sampling()
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.05)


def test_do_sample_false_means_greedy_and_a_temperature_asked_for_still_wins(folder: Path):
    served = generation_config(folder, do_sample=False, temperature=0.6)
    assert served.sampling().temperature == 0.0
    assert served.sampling(temperature=0.8).temperature == 0.8
    assert generation_config(folder, do_sample=True, temperature=0.6).sampling().temperature == 0.6
    assert generation_config(folder).sampling().temperature == 1.0


def test_impossible_defaults(folder: Path):
    with pytest.raises(CheckpointError, match=r"generation_config\.json: top_p is 2"):
        generation_config(folder, top_p=2)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_config(folder, temperature="warm")


def test_a_tokenizer_of_another_model(folder: Path):
    make_tokenizer(600).save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"ids up to 599.*vocab_size is 512"):
        ServedModel.load(folder)


def test_missing_files(folder: Path):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        ServedModel.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        ServedModel.load(folder)


def test_without_a_chat_template(folder: Path):
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        ServedModel.load(folder).chat_prompt([{"role": "user", "content": "hi"}])


def without_tags(served: ServedModel) -> Tokenizer:
    """Its tokenizer, to which the marks of a thought are text."""
    words = json.loads(served.tokenizer._backend.to_str())
    words["added_tokens"] = [t for t in words["added_tokens"] if "think>" not in t["content"]]
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(words)))


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize(
    ("prompt", "opening"),
    [
        ("<|user|>\nwhat is <think>?<|assistant|>", Opening()),
        ("<|user|>\nhi<|assistant|>\n<think></think>", Opening()),
        ("<|user|>\nhi<|assistant|>\n<think></think>\n", Opening()),
        ("<|user|>\nhi<|assistant|></think>so", Opening(fresh=False)),
        ("<|user|>\nhi<|assistant|><think>", Opening(in_thought=True)),
        ("<|user|>\nhi<|assistant|><think>hm", Opening(in_thought=True, fresh=False)),
        ("<|assistant|><think>a</think>b<|user|>\nhi<|assistant|>", Opening()),
        ("hi", Opening(fresh=False)),
        ("", Opening()),
    ],
)
def test_where_a_prompt_leaves_the_model(
    served: ServedModel, prompt: str, opening: Opening, spelled: bool
):
    model = replace(served, tokenizer=without_tags(served)) if spelled else served
    assert model.opening(model.tokenizer.encode(prompt)) == opening
