"""How far a run is: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Progress:
    """Shown from entering to leaving it.

    Args:
        first: steps done by an earlier run.
        steps: of the whole run.
    """

    def __init__(self, first: int, steps: int):
        self._first, self._steps = first, steps
        self._began = self._said = time.monotonic()
        self._bar = tqdm(None, "training", steps, initial=first, unit="step", disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bar.close()

    def elapsed_s(self) -> float:
        """Since this process began to train."""
        return round(time.monotonic() - self._began, 2)

    def show(self, done: int, row: Mapping[str, float]) -> None:
        """Say that `done` steps are done, and the metrics of the last one."""
        self._bar.set_postfix(
            loss=f"{row['loss']:.3f}", right=f"{row['accuracy']:.1%}", refresh=False
        )
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._said > LOG_EVERY_S:
            self._said = time.monotonic()
            left_min = (self._steps - done) * self.elapsed_s() / (done - self._first) / 60
            shown = done, self._steps, row["loss"], 100 * row["accuracy"], left_min
            log.info("step %d of %d, loss %.3f, %.1f %% right, %.0f min left", *shown)
