"""Metrics as JSON lines, one a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


class MetricsLog:
    """A file of JSON lines, written through at once so that a killed run keeps them.

    Args:
        file: appended to.
    """

    def __init__(self, file: Path):
        self.file = file

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Append the metrics of a step."""
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"step": step} | row) + "\n")

    def keep_before(self, step: int) -> None:
        """Drop the lines from `step` on: a run that resumes there writes them again."""
        if self.file.exists():
            rows = [row for row in read_metrics(self.file) if row["step"] < step]
            self.file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """All rows; a last line that a killed run left half-written is left out."""
    lines = file.read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summary(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain numbers.

    Of the loads of experts, [layers, E]: the least and the largest, 1 being an even share.
    """
    row: dict[str, float] = {}
    for name, value in metrics.items():
        array = np.asarray(value, np.float64)
        if array.ndim:
            shares = array / np.maximum(array.mean(-1, keepdims=True), 1e-9)
            row |= {f"{name}_min": round(shares.min(), 4), f"{name}_max": round(shares.max(), 4)}
        else:
            row[name] = round(float(array), 6)
    return row
