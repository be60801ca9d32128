"""Figures as text tables, for people at a terminal and for markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

TEXT_COLUMNS = 100


class Table(NamedTuple):
    """Figures of one kind.

    Attributes:
        title: of what.
        columns: their names, with units.
        rows: str, int and float values, one a column; None where there is none.
        note: what they mean or how they were got, in a sentence or two.
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
    """A value of a table: numbers with three digits that mean something, lists with commas."""
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(show, value))
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)
