"""The curves of a run as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from glmjax.train.metrics import read_metrics

matplotlib.use("agg")

# Panel -> (metrics, whether its axis is logarithmic).
PANELS = {
    "loss": (("loss", "mtp_loss", "held_out_loss", "held_out_mtp_loss"), True),
    "tokens guessed right": (
        ("accuracy", "mtp_accuracy", "held_out_accuracy", "held_out_mtp_accuracy"),
        False,
    ),
    "load of experts, of an even share": (
        ("load_min", "load_max", "mtp_load_min", "mtp_load_max"),
        False,
    ),
    "gradient norm": (("grad_norm",), True),
}


def draw_curves(metrics_file: Path, picture: Path) -> None:
    """Draw metrics.jsonl as a PNG of four panels over the steps."""
    rows = read_metrics(metrics_file)
    figure = Figure(figsize=(12, 8), layout="constrained")
    for axes, (title, (names, log_scale)) in zip(
        figure.subplots(2, 2).flat, PANELS.items(), strict=True
    ):
        for name in names:
            _draw(axes, rows, name)
        axes.set(title=title, xlabel="step", yscale="log" if log_scale else "linear")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(picture, dpi=80)


def _draw(axes: Any, rows: list[dict[str, Any]], name: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
