"""The model that is served when none is named. A random one stands in for the one that ships."""

from __future__ import annotations

import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import glmjax
import serve
from glmjax import bundled
from glmjax.bench.synthetic import default_config, write_checkpoint
from glmjax.checkpoint import open_converted
from glmjax.errors import CheckpointError

ROOT = Path(__file__).parents[1]
CONFIG = replace(
    default_config(),
    hidden_size=16,
    intermediate_size=16,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    n_routed_experts=4,
    num_experts_per_tok=2,
    max_position_embeddings=128,
)
CONVERT = """
import sys
from pathlib import Path
from glmjax import bundled
bundled.ASSET = Path(sys.argv[1])
print("ready", flush=True)
input()
print(bundled.converted())
"""


@pytest.fixture
def asset(tmp_path, monkeypatch) -> Path:
    """What stands in for the asset, beside an empty cache."""
    folder = tmp_path / "assets" / "glm-nano"
    write_checkpoint(folder, CONFIG)
    monkeypatch.setattr(bundled, "ASSET", folder)
    monkeypatch.setenv("GLMJAX_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def test_it_is_converted_once(asset, cache, monkeypatch):
    folder = bundled.converted()
    assert folder.name == "glm-nano"
    assert open_converted(folder).config.hidden_size == CONFIG.hidden_size
    monkeypatch.setattr(bundled, "convert", None)
    assert bundled.converted() == folder
    assert list(cache.iterdir()) == [folder.parent]


def test_another_asset_is_another_conversion(asset):
    first = bundled.converted()
    write_checkpoint(asset, CONFIG, seed=1)
    assert bundled.converted() != first


def test_a_conversion_that_fails_leaves_nothing(asset, cache):
    (asset / "mtp.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"mtp\.safetensors"):
        bundled.converted()
    assert list(cache.iterdir()) == []


def test_processes_that_start_at_once_all_serve_it(asset, cache):
    command = [sys.executable, "-c", CONVERT, str(asset)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers == [str(bundled.converted())] * 2
    assert len(list(cache.iterdir())) == 1


def test_who_comes_second_keeps_what_the_first_one_made(asset, cache, monkeypatch):
    convert, folders = bundled.convert, []

    def overtaken(source, target):
        monkeypatch.setattr(bundled, "convert", convert)
        folders.append(bundled.converted())
        (folders[0] / "first").touch()
        return convert(source, target)

    monkeypatch.setattr(bundled, "convert", overtaken)
    assert bundled.converted() == folders[0]
    assert (folders[0] / "first").exists()
    assert list(cache.iterdir()) == [folders[0].parent]


def test_a_package_without_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "ASSET", tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"bundled glm-nano is not there: .*none.*--model"):
        glmjax.LLM()


def test_a_cache_that_cannot_be_written(asset, cache):
    cache.write_text("a file")
    with pytest.raises(CheckpointError, match="Set GLMJAX_CACHE"):
        bundled.converted()


def test_python_serves_it_by_default(asset):
    sizes = glmjax.SchedulerConfig(max_running_requests=1, chunked_prefill_size=16, max_seq_len=64)
    llm = glmjax.LLM(scheduler=sizes)
    assert llm.served.name == "glm-nano"
    done = llm.generate("Hello", max_new_tokens=3, ignore_eos=True)
    assert isinstance(done, glmjax.Completion)
    assert len(done.token_ids) == 3


@pytest.mark.parametrize("model", [None, "other"])
def test_serve_py_serves_it_unless_a_model_is_named(asset, monkeypatch, caplog, model):
    class BuiltError(Exception):
        """Ends serve.py where the weights would be loaded."""

    def build(folder, *_, **__):
        raise BuiltError(folder)

    monkeypatch.setattr(serve, "build", build)
    named = ["--model", model] if model else []
    arguments = serve.parser().parse_args([*named, "--port", "0", "--grpc-port", "0"])
    with caplog.at_level(logging.INFO, "glmjax"), pytest.raises(BuiltError) as built:
        serve.run(arguments)
    assert Path(built.value.args[0]).name == (model or "glm-nano")
    lines = [record.getMessage() for record in caplog.records if "bundled" in record.getMessage()]
    assert len(lines) == (0 if model else 1)
    assert all("give --model for a real one" in line for line in lines)
