"""A real run, killed and resumed: the same bytes; and what it made serves."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import matplotlib.image
import numpy as np
import orbax.checkpoint as ocp
import pytest

import glmjax
from convert.hf_to_orbax import convert
from glmjax.config import ModelConfig
from glmjax.train.export import export_hf
from glmjax.train.metrics import read_metrics
from glmjax.train.recipe import read_recipe
from glmjax.train.run import Run
from processes import ROOT, START_TIMEOUT_S

TINY = Path(__file__).with_name("tiny.toml")
CPU = {"JAX_PLATFORMS": "cpu"}
STEPS, SAVED = 6, 3
SHORT_STAGE = "[[stages]]\nsteps = 2\nrows = 2\nseq_len = 64\n"
SAMPLING = {"temperature": 1.0, "seed": 5, "max_new_tokens": 12, "ignore_eos": True}
# Ids, as runs of different seeds have different tokenizers.
PROMPTS = [[72, 300, 15, 399, 261], [*range(40, 90)]]
SIZES = glmjax.SchedulerConfig(max_running_requests=1, chunked_prefill_size=64, max_seq_len=128)


@pytest.fixture(scope="module")
def train(run_command):
    """Train in a folder to the end, or until it is refused."""

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return run_command("-m", "glmjax.train", *arguments, **CPU)

    return run


@pytest.fixture(scope="module")
def resumed(environment, train, tmp_path_factory) -> Path:
    """The folder of the same run, killed behind its first checkpoint, and then resumed.

    It is killed while it makes ready for its second stage, which takes longer than steps do.
    """
    folder = tmp_path_factory.mktemp("resumed") / "run"
    command = [sys.executable, "-m", "glmjax.train", str(TINY), "--out", str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment | CPU)
    try:
        wait_for(
            lambda: (folder / f"checkpoints/{SAVED}").exists() and steps(folder) > SAVED, process
        )
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    assert SAVED < steps(folder) < STEPS
    done = train(TINY, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {SAVED}" in done.stderr
    return folder


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps(folder: Path) -> int:
    """How many steps a run has logged."""
    file = folder / "metrics.jsonl"
    return len(read_metrics(file)) if file.exists() else 0


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = train(TINY, "--out", folder)
    assert done.returncode == 0, done.stderr
    assert "resuming" not in done.stderr
    assert done.stdout.strip() == str(folder / "tiny")
    return folder


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_bytes(resumed, whole):
    names = sorted(file.name for file in (whole / "tiny").iterdir())
    assert {"config.json", "model.safetensors", "mtp.safetensors", "tokenizer.json"} <= {*names}
    assert sorted(file.name for file in (resumed / "tiny").iterdir()) == names
    for name in names:
        assert (resumed / "tiny" / name).read_bytes() == (whole / "tiny" / name).read_bytes(), name


@pytest.mark.slow
def test_a_killed_run_ends_in_the_same_float32_state(resumed, whole):
    states = [last_checkpoint(folder) for folder in (resumed, whole)]
    assert states[0]["step"] == STEPS
    assert states[0]["params"]["model"]["embed_tokens"].dtype == np.float32
    for one, two in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(two).tobytes()


def last_checkpoint(folder: Path) -> dict:
    """The state that a run ended in: parameters, and what the optimiser carries."""
    with ocp.CheckpointManager(folder / "checkpoints") as checkpoints:
        return checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())


@pytest.mark.slow
def test_a_killed_run_has_the_same_metrics(resumed, whole):
    assert metrics(resumed) == metrics(whole)


def metrics(folder: Path) -> list[dict]:
    """The rows, but for what the clock says."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [{name: row[name] for name in row if name != "elapsed_s"} for row in rows]


def test_metrics_have_a_line_a_step_and_fall(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(STEPS)]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0]["loss"] == pytest.approx(math.log(400), abs=1)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[-1]["mtp_loss"] < rows[0]["mtp_loss"] - 0.3
    assert [row["tokens"] for row in rows] == [4 * 128] * STEPS
    assert [row["step"] for row in rows if "held_out_loss" in row] == [4, 5]


def test_the_folder_of_a_run(whole):
    assert (whole / "recipe.toml").read_bytes() == TINY.read_bytes()
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    picture = matplotlib.image.imread(whole / "curves.png")
    assert min(picture.shape[:2]) > 400
    assert picture[..., :3].std() > 0.01
    tokenizer = (whole / "tiny" / "tokenizer.json").read_text("utf-8")
    assert (whole / "tokenizer.json").read_text("utf-8") == tokenizer


def test_another_recipe_in_the_same_folder_is_refused(whole, train, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in whole.rglob("*")}
    other = tmp_path / "other.toml"
    other.write_text(TINY.read_text("utf-8").replace("seed = 3", "seed = 4"), "utf-8")
    done = train(other, "--out", whole)
    assert done.returncode == 1
    assert f"glmjax.train: {whole} holds a run of another recipe" in done.stderr
    assert "name another folder" in done.stderr
    assert "Traceback" not in done.stderr
    assert {file: file.stat().st_mtime_ns for file in whole.rglob("*")} == before


def test_help_is_worth_reading(train):
    done = train("--help")
    assert done.returncode == 0
    assert "python -m glmjax.train recipes/nano.toml" in done.stdout


@pytest.fixture(scope="module")
def load_llm(tmp_path_factory):
    """An LLM of a checkpoint in HF's format, taken through the converter."""

    def make(checkpoint: Path, dtype: str) -> glmjax.LLM:
        folder = tmp_path_factory.mktemp("converted") / "model"
        convert(checkpoint, folder)
        return glmjax.LLM(folder, dtype=dtype, scheduler=SIZES)

    return make


def generate(llm: glmjax.LLM) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, **SAMPLING)]


def test_what_was_trained_is_exported_whole(whole):
    exported, trained = ModelConfig.from_hf(whole / "tiny"), read_recipe(TINY).model
    assert exported.dtype == "bfloat16"
    assert len(exported.eos_token_ids) == 3
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim", "use_qk_norm")
    assert [getattr(exported, name) for name in sizes] == [getattr(trained, name) for name in sizes]


class LastParams(Run):
    """Keeps the parameters that it exports, as they come from the last step."""

    def _export(self, params):
        self.params = params
        super()._export(params)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> LastParams:
    """A run in this process, of the same model with another seed."""
    folder = tmp_path_factory.mktemp("short")
    head = TINY.read_text("utf-8").split("[[stages]]")[0].replace("seed = 3", "seed = 4")
    file = folder / "short.toml"
    file.write_text(head + SHORT_STAGE, "utf-8")
    run = LastParams(read_recipe(file), file, folder / "run")
    assert run.train() == run.model_folder == folder / "run" / "tiny"
    return run


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_an_engine_takes_the_trainers_parameters_as_they_are(
    whole, trained, load_llm, tmp_path, dtype
):
    running = load_llm(whole / "tiny", dtype)
    before = generate(running)
    assert all(len(ids) == SAMPLING["max_new_tokens"] for ids in before)
    running.update_params(trained.params["model"])
    parts = trained.params["model"], trained.params["mtp"], trained.tokenizer
    export_hf(tmp_path / "hf", trained.recipe.model, *parts, dtype=dtype)
    expected = generate(load_llm(tmp_path / "hf", dtype))
    assert expected != before
    assert generate(running) == expected
