"""All that is wrong with a checkpoint, in one readable report."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import NamedTuple

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Kind(Enum):
    """Sections of the report, in its order."""

    MISSING = "missing"
    UNUSED = "unused (no place in this model)"
    SHAPE = "mis-shaped"
    DTYPE = "of another dtype"
    QUANTIZATION = "in conflict over quantisation"


class Fault(NamedTuple):
    """One thing wrong with one tensor."""

    kind: Kind
    name: str
    detail: str = ""


def report(folder: Path, faults: Iterable[Fault]) -> str:
    """The faults by kind; names that differ only in layer and expert numbers share a line."""
    sections: dict[Kind, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for fault in faults:
        sections[fault.kind][fault.detail].append(fault.name)
    lines = [f"{folder} does not hold the tensors that its config.json describes:"]
    for kind in Kind:
        if kind in sections:
            lines += _section(kind, sections[kind])
    return "\n".join(lines)


def _section(kind: Kind, names_by_detail: dict[str, list[str]]) -> list[str]:
    count = sum(map(len, names_by_detail.values()))
    lines = [f"{count} tensor{'s' * (count > 1)} {kind.value}:"]
    for detail, names in names_by_detail.items():
        lines += [f"  {line}{': ' * bool(detail)}{detail}" for line in collapse(names)]
    return lines


def collapse(names: Iterable[str]) -> Iterator[str]:
    """Join names that differ only in numbers, where every combination of the numbers is there.

    "layers.{0..1}.experts.{0..7}.up_proj" stands for exactly those 16 names.
    """
    patterns: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        numbers = tuple(int(match) for match in _NUMBER.findall(name))
        patterns[_NUMBER.sub("{}", name)].append(numbers)
    for pattern, rows in patterns.items():
        columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
        if len(set(rows)) == math.prod(map(len, columns)):
            yield pattern.format(*map(_numbers, columns))
        else:
            yield from (pattern.format(*row) for row in rows)


def _numbers(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"
