"""A plan as a picture: memory of each device, and bounds over the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glmjax.errors import ConfigError
from glmjax.planner.fitting import options
from glmjax.planner.memory import GIB
from glmjax.planner.plan import Plan

DOTS_PER_INCH = 150
COLORS = {"weights": "#4c72b0", "KV": "#55a868", "temporaries": "#dd8452", "tables": "#8172b3"}


def save(plan: Plan, file: Path) -> None:
    """Draw a plan into a PNG, SVG or PDF file, by its name.

    Raises:
        ConfigError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'glmjax[plan]'") from None
    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _memory(left, plan)
    _bounds(right, plan)
    verb = "on" if plan.fits else "does not fit"
    mesh = plan.deployment.mesh
    figure.suptitle(f"{plan.name} {verb} {mesh.size} x {plan.gpu.name}, {options(mesh)}")
    try:
        figure.savefig(file, dpi=DOTS_PER_INCH)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be written: {error}") from None


def _memory(axes: Any, plan: Plan) -> None:
    """A bar for each device, in GiB."""
    memory, devices = plan.memory, range(plan.deployment.mesh.size)
    sizes = (memory.weights_bytes, memory.pool_bytes, memory.temp_bytes, memory.tables_bytes)
    below = 0.0
    for (name, color), size_bytes in zip(COLORS.items(), sizes, strict=True):
        size = size_bytes / GIB
        axes.bar(devices, size, bottom=below, color=color, label=f"{name} {size:.1f}")
        below += size
    for name, size_bytes, style in (
        ("XLA may take", memory.usable_bytes, "--"),
        ("device", plan.gpu.memory_bytes, "-"),
    ):
        axes.axhline(size_bytes / GIB, color="black", linestyle=style, label=name)
    axes.set(xlabel="device", ylabel="GiB", title="memory", xticks=list(devices))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)


def _bounds(axes: Any, plan: Plan) -> None:
    """Tokens a second that no kernel can exceed, and where the KV pool is full."""
    context = plan.workload.context_tokens
    axes.set(title=f"bounds of decoding, {context:,} tokens behind each request")
    axes.set(xlabel="requests at once", ylabel="output tokens/s, at most")
    if not plan.fits:
        axes.text(0.5, 0.5, "does not fit", ha="center", transform=axes.transAxes)
        return
    batches = [row.batch for row in plan.decode]
    axes.plot(batches, [row.tokens_per_s for row in plan.decode], "o-", label="without drafts")
    if plan.drafting:
        accepted = plan.workload.accepted_tokens
        rates = [row.batch * accepted / row.verify_s for row in plan.drafting]
        axes.plot(batches, rates, "s-", label=f"with drafts, {accepted:g} accepted a step")
    most = max(plan.running(context + 1), 1)
    axes.axvline(most, color="black", linestyle=":", label=f"no more than {most} run")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
