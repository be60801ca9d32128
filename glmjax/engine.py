"""The engine: where host and device meet. Schedules, launches, reads back."""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any, NamedTuple

from glmjax.config import SchedulerConfig
from glmjax.errors import EngineStoppedError
from glmjax.plans import Limits, Runner, StepHandle
from glmjax.scheduler.scheduler import Scheduler
from glmjax.types import EngineCounters, EngineLoad, Request, RequestOutput

log = logging.getLogger(__name__)


class InFlight(NamedTuple):
    """A launched step, and when it was."""

    handle: StepHandle
    launched_s: float


class Engine:
    """Continuous batching over a runner. Owned by one thread; nothing here blocks but `step`.

    Each step launches the next plan before it reads the one before, so the device works while the
    host does: at most two steps are in flight, and decoded tokens never pass through the host on
    their way into the next step.

    Args:
        runner: the device side.
        config: queue bounds.
        eos_token_ids: the model's own end tokens.
    """

    def __init__(
        self,
        runner: Runner,
        config: SchedulerConfig | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ):
        self._runner = runner
        self._scheduler = Scheduler(runner.limits, config, eos_token_ids)
        self._launched: deque[InFlight] = deque()
        self._failure: Exception | None = None
        self._paused = False
        self._updates = 0
        self._last_read_s = 0.0

    @property
    def limits(self) -> Limits:
        """What the runner offers."""
        return self._runner.limits

    @property
    def paused(self) -> bool:
        """Whether nothing is launched until `resume`."""
        return self._paused

    @property
    def weight_version(self) -> str:
        """Of the weights that the next launched step uses."""
        return self._scheduler.version

    def add(self, request: Request) -> None:
        """Queue a request; outputs come from later steps.

        Raises:
            InvalidRequestError: it can never be served.
            QueueFullError: too many are waiting.
            EngineStoppedError: the engine cannot go on.
        """
        self._check_alive()
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request early; its last output comes from a later step. Unknown ids are ignored."""
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether a request is alive or an output not taken; never once the engine cannot go on."""
        return self._failure is None and self._scheduler.has_work()

    def load(self) -> EngineLoad:
        """How busy it is."""
        return self._scheduler.load()

    def counters(self) -> EngineCounters:
        """What it has done so far."""
        return self._scheduler.counters()

    def pause(self) -> None:
        """Launch nothing until `resume`; steps in flight are still read, requests queue up."""
        self._paused = True

    def retract(self) -> None:
        """`pause`, and take all requests off the device; they are computed again."""
        self._paused = True
        self._scheduler.retract()

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False

    def flush_cache(self) -> None:
        """Forget the prefixes that were computed; requests that run keep what they have."""
        self._scheduler.flush_cache()

    def step(self) -> list[RequestOutput]:
        """Launch the next step, then read the one launched before it.

        Interrupted (Ctrl-C) while it waits for the device, it can be called again and loses
        nothing. A step that fails ends the requests that had a part in it, each with an error in
        its output; all others are computed again from their tokens, and the engine goes on.

        Returns:
            What became known: new tokens and ends of requests; often empty.

        Raises:
            EngineStoppedError: the device could not be brought back after a step that failed.
        """
        self._check_alive()
        launched = self._launch()
        if self._launched and (not launched or len(self._launched) > 1):
            self._read()
        return self._scheduler.take_outputs()

    def update_params(self, params: Any, version: str | None = None) -> None:
        """Serve other weights of the same model, from the next launched step on.

        Nothing is compiled, and requests that run go on: a step in flight ends with the old
        weights, the next starts with the new. What was computed so far for requests that run is
        kept as the old weights made it; nothing of it is found by requests that start later.

        Args:
            params: what the runner takes; a `DeviceRunner` the parameter tree, on any devices.
            version: stamped on the outputs that the new weights compute; None: counted, "1", "2".

        Raises:
            ConfigError: they do not fit the model that runs; it goes on as it is.
            EngineStoppedError: the engine cannot go on.
        """
        self._check_alive()
        self._runner.update_params(params)
        self._updates += 1
        self._scheduler.version = str(self._updates) if version is None else version
        self._scheduler.flush_cache()

    def _launch(self) -> bool:
        """Plan and launch a step; whether there was one."""
        if self._paused:
            self._scheduler.expire()
            return False
        plan = self._scheduler.schedule()
        if plan is None:
            return False
        try:
            handle = self._runner.launch(plan)
        except BaseException as error:
            self._recover(error, launching=True)
            if not isinstance(error, Exception):
                raise  # Ctrl-C: the step is given up, the engine goes on
            return False
        self._launched.append(InFlight(handle, time.perf_counter()))
        return True

    def _read(self) -> None:
        """Commit the oldest launched step; until its result is here nothing changes."""
        try:
            result = self._launched[0].handle.result()
        except Exception as error:
            self._recover(error, launching=False)
            return
        step, now = self._launched.popleft(), time.perf_counter()
        seconds = now - max(self._last_read_s, step.launched_s)
        self._last_read_s = now
        self._scheduler.commit(result, seconds)

    def _recover(self, error: BaseException, launching: bool) -> None:
        """End the requests of the step that failed, and start afresh with the others."""
        log.exception("a step failed; its requests end with an error, the others are recomputed")
        words = f"a step of the engine failed: {type(error).__name__}: {error}"
        also_failed = launching and not self._salvage()
        self._launched.clear()
        self._scheduler.fail(words, launched=1 + also_failed)
        try:
            self._runner.reset()
        except Exception as second:
            self._failure = second
            words += f"; and the device cannot be reset: {second}"
            raise EngineStoppedError(words) from error

    def _salvage(self) -> bool:
        """Read the step in flight, if any, that does not depend on one that failed to launch."""
        if not self._launched:
            return True
        try:
            result = self._launched[0].handle.result()
        except Exception:
            log.exception("the step before it failed too")
            return False
        self._scheduler.commit(result)
        return True

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(
                f"the engine failed earlier ({type(self._failure).__name__}: {self._failure}); "
                "make a new one"
            )
