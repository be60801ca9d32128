"""What the command lines of this room share."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """A count on a command line."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is no count, expected 1 or more")
    return value
