"""What was measured, as text tables for people and markdown, and where."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("glmjax", "jax", "jaxlib", "numpy")
TEXT_COLUMNS = 100
CPU_INFO, CPU_NAME = Path("/proc/cpuinfo"), "model name"


class Table(NamedTuple):
    """Figures of one kind.

    Attributes:
        title: of what.
        columns: their names, with units.
        rows: str, int and float values, one a column; None where there is none.
        note: what was done to get them, in a sentence or two.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    note: str = ""

    def text(self) -> str:
        """A markdown table, aligned for a terminal."""
        shown = [list(self.columns), *([show(value) for value in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [_line(cells, widths) for cells in (shown[0], rule, *shown[1:])]
        note = [textwrap.fill(self.note, TEXT_COLUMNS), ""] if self.note else []
        return "\n".join([f"### {self.title}", "", *note, *lines])


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    aligned = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return f"| {' | '.join(aligned)} |"


def show(value: Any) -> str:
    """A value of a table: numbers with three digits that mean something."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> dict[str, str]:
    """Where and with what the figures come from, by name."""
    return {
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %z}",
        "CPU": f"{_cpu()}, {_cores()} cores",
        "memory": f"{_memory_bytes() / 2**30:.0f} GiB",
        "load average": load_average(),
        "versions": ", ".join(_versions()),
    }


def load_average() -> str:
    """Processes that wanted to run in the last 1, 5 and 15 minutes."""
    return ", ".join(f"{load:.2f}" for load in os.getloadavg())


def _cpu() -> str:
    lines = CPU_INFO.read_text("utf-8").splitlines() if CPU_INFO.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith(CPU_NAME))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _versions() -> Iterator[str]:
    yield f"python {platform.python_version()}"
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"{name} from its source"
