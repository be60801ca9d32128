"""An evaluation harness runs to its end against a server: choices by likelihood, and answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glmjax.bundled import ASSET

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval (make slow installs it)"
    ),
]

SUMS = [
    {"question": f"What is {a} + {b}?", "answer": str(a + b)}
    for a, b in [(4821, 397), (112, 206), (905, 44), (3000, 17), (781, 1200), (64, 65)]
]
CAPITALS = {"Zorba": "Mipol", "Tarno": "Kelis", "Velia": "Dorun", "Kolba": "Senra"}
FACTS = " ".join(f"The capital of {land} is {city}." for land, city in CAPITALS.items())
CHOICES = [
    {"facts": FACTS, "land": land, "cities": list(CAPITALS.values()), "answer": i}
    for i, land in enumerate(CAPITALS)
]


def task(folder: Path, name: str, rows: list[dict[str, Any]], metric: str, **fields: Any) -> None:
    """Write a task and its data."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(common | fields))  # JSON is YAML


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    task(
        folder,
        "capitals_chosen",
        CHOICES,
        "acc",
        output_type="multiple_choice",
        doc_to_text="[gMASK]<sop><|system|>\n{{facts}}<|user|>\nWhat is the capital of {{land}}?"
        "/nothink<|assistant|>\n<think></think>",
        doc_to_choice="{{cities}}",
        doc_to_target="{{answer}}",
        target_delimiter="\n",
    )
    task(
        folder,
        "sums_written",
        SUMS,
        "exact_match",
        output_type="generate_until",
        doc_to_text="{{question}}",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["\n\n"], "max_gen_toks": 256, "temperature": 0},
    )
    return folder


def evaluated(tasks: Path, name: str, model: str, url: str, *more: str) -> dict[str, float]:
    """What the harness finds."""
    output = tasks / f"{name}.json"
    arguments = f"model=glm-nano,base_url={url},num_concurrent=2,max_retries=1"
    local = f",tokenizer={ASSET},tokenizer_backend=huggingface"
    options = {
        "--model": model,
        "--tasks": name,
        "--include_path": tasks,
        "--model_args": arguments + local,
        "--output_path": output,
    }
    words = [str(word) for option in options.items() for word in option]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *words, *more],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = tasks.rglob(f"{name}_*.json")
    return json.loads(file.read_text())["results"][name]


def test_choices_by_likelihood(tasks: Path, nano):
    url = f"{nano.url}/v1/completions"
    found = evaluated(tasks, "capitals_chosen", "local-completions", url)
    assert found["acc,none"] >= 0.75


def test_written_answers(tasks: Path, nano):
    url = f"{nano.url}/v1/chat/completions"
    chat = ("--apply_chat_template",)
    found = evaluated(tasks, "sums_written", "local-chat-completions", url, *chat)
    assert found["exact_match,none"] >= 0.8
