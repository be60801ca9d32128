"""How deep a JSON value is nested, found without recursion. No jax."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

MAX_NESTING = 100  # of a call's arguments; far below what Python's JSON can write


def levels(value: Any) -> Iterator[list[Any]]:
    """`value` itself, then all that stands in it, then all that stands in that, to the deepest."""
    level = [value]
    while level:
        yield level
        level = [child for parent in level for child in _children(parent)]


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()
