"""Which items are kept out of training: one in ten, by a hash of what identifies the item."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TypeVar

from glmjax.train.data.problem import Split

T = TypeVar("T")
HELD_OUT_IN = 10


def split_of(key: str) -> Split:
    """The split that an item belongs to, for ever."""
    return "held_out" if zlib.crc32(key.encode()) % HELD_OUT_IN == 0 else "train"


def redraw(split: Split, draw: Callable[[], T], key: Callable[[T], str]) -> T:
    """Draw until an item of `split` comes."""
    while True:
        item = draw()
        if split_of(key(item)) == split:
            return item
