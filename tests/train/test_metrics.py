"""The log of a run: what is written comes back, also after a kill."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from glmjax.train.metrics import MetricsLog, read_metrics, summary

ROWS = [{"step": step, "loss": 1 / (step + 1), "tokens": 64} for step in range(5)]


@pytest.fixture
def log(tmp_path: Path) -> MetricsLog:
    """A log of `ROWS`."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for row in ROWS:
        log.write(row["step"], {name: row[name] for name in ("loss", "tokens")})
    return log


def test_round_trip(log: MetricsLog):
    assert read_metrics(log.file) == ROWS
    assert len(log.file.read_text().splitlines()) == len(ROWS)


def test_another_log_of_the_file_goes_on(log: MetricsLog):
    MetricsLog(log.file).write(5, {"loss": 0.5})
    assert read_metrics(log.file) == [*ROWS, {"step": 5, "loss": 0.5}]


@pytest.mark.parametrize("step", [0, 3, 5, 9])
def test_keep_before(log: MetricsLog, step: int):
    log.keep_before(step)
    assert read_metrics(log.file) == ROWS[:step]
    log.write(step, {"loss": 0.0})
    assert read_metrics(log.file) == [*ROWS[:step], {"step": step, "loss": 0.0}]


def test_keep_before_of_no_file(tmp_path: Path):
    MetricsLog(tmp_path / "metrics.jsonl").keep_before(3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written", ['{"step": 5, "lo', '{"step": 5, "loss": 0.1}', ""])
def test_a_half_written_last_line_is_ignored_and_cleared(log: MetricsLog, written: str):
    with log.file.open("a") as out:
        out.write(written)
    assert read_metrics(log.file) == ROWS
    log.keep_before(5)
    log.write(5, {"loss": 0.2})
    assert read_metrics(log.file) == [*ROWS, {"step": 5, "loss": 0.2}]


def test_summary_shows_the_least_and_the_most_loaded_expert_of_all_layers():
    metrics = {"loss": np.float32(0.25), "load": np.float32([[2, 2, 2, 2], [1, 3, 6, 2]])}
    assert summary(metrics) == {"loss": 0.25, "load_min": 0.3333, "load_max": 2.0}


def test_summary_of_a_batch_without_tokens():
    assert summary({"load": np.zeros((1, 4))}) == {"load_min": 0.0, "load_max": 0.0}
