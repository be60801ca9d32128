"""How far a long job is: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

from tqdm import tqdm

Advance = Callable[[int], Any]
# (label, bytes in all) -> a context that gives the function to tell bytes done
Progress = Callable[[str, int], AbstractContextManager[Advance]]


@contextmanager
def silent(label: str, total_bytes: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done_bytes: None


@contextmanager
def shown(label: str, total_bytes: int) -> Iterator[Advance]:
    """Show bytes, rate and time left on stderr."""
    if sys.stderr.isatty():
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "dynamic_ncols": True}
        with tqdm(total=total_bytes, desc=label, **options) as bar:
            yield bar.update
    else:
        yield _line_writer(label, total_bytes, sys.stderr)


def _line_writer(label: str, total_bytes: int, stream: TextIO, every_s: float = 10.0) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(done_bytes: int) -> None:
        nonlocal last, done
        done += done_bytes
        now = time.monotonic()
        if now - last >= every_s or done == total_bytes:
            last = now
            elapsed = now - start
            meter = tqdm.format_meter(
                done, total_bytes, elapsed, ncols=0, prefix=label, unit="B", unit_scale=True
            )
            print(meter, file=stream, flush=True)

    return advance
