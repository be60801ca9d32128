"""Tile sizes of the kernels: tiles.json, by device, operation and shape. The tuner writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("tiles.json")
DEFAULT_DEVICE = "h100"

Tile = Mapping[str, Any]


@cache
def table(file: Path = FILE) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """{device: {operation: [{"when": {...}, "tile": {...}}, ...]}}."""
    return json.loads(file.read_text("utf-8"))


def find(device: str, operation: str, **key: Any) -> Tile | None:
    """The tile of the first entry whose conditions all hold; None where there is none.

    A condition is a value, or [least, most] for a number, of one of the names in `key`. A device
    without a table of its own uses that of the H100.
    """
    devices = table()
    entries = devices.get(device, devices[DEFAULT_DEVICE]).get(operation, [])
    for entry in entries:
        if all(_holds(condition, key[name]) for name, condition in entry["when"].items()):
            return entry["tile"]
    return None


def _holds(condition: Any, value: Any) -> bool:
    if isinstance(condition, list):
        least, most = condition
        return least <= value <= most
    return condition == value
