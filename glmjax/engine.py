"""The engine: where host and device meet. Schedules, launches, reads back."""

from __future__ import annotations

from collections import deque
from typing import Any

from glmjax.config import SchedulerConfig
from glmjax.errors import EngineStoppedError
from glmjax.scheduler.scheduler import Scheduler
from glmjax.types import EngineLoad, Limits, Request, RequestOutput, Runner, StepHandle


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
        self._launched: deque[StepHandle] = deque()
        self._failure: Exception | None = None

    @property
    def limits(self) -> Limits:
        """What the runner offers."""
        return self._runner.limits

    def add(self, request: Request) -> None:
        """Queue a request; outputs come from later steps.

        Raises:
            InvalidRequestError: it can never be served.
            QueueFullError: too many are waiting.
            EngineStoppedError: an earlier step failed.
        """
        self._check_alive()
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request early; its last output comes from a later step. Unknown ids are ignored."""
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do; never after it failed."""
        return self._failure is None and self._scheduler.has_work()

    def load(self) -> EngineLoad:
        """How busy it is."""
        return self._scheduler.load()

    def step(self) -> list[RequestOutput]:
        """Launch the next step, then read the one launched before it.

        Interrupted (Ctrl-C) while it waits for the device, it can be called again and loses
        nothing. After any other error the engine is of no more use.

        Returns:
            What became known: new tokens and ends of requests; often empty.

        Raises:
            EngineStoppedError: an earlier step failed.
        """
        self._check_alive()
        try:
            launched = self._launch()
            outputs = self._scheduler.take_aborted()
            if self._launched and (not launched or len(self._launched) > 1):
                outputs += self._read()
        except Exception as error:
            self._failure = error
            raise
        return outputs

    def update_params(self, params: Any) -> None:
        """Serve other weights of the same model, from the next launched step on.

        Nothing is compiled, and requests that run go on: a step in flight ends with the old
        weights, the next starts with the new. KV computed so far is kept as the old weights made
        it, so only requests added from here on are wholly the new model's.

        Args:
            params: what the runner takes; a `DeviceRunner` the parameter tree, on any devices.

        Raises:
            ConfigError: they do not fit the model that runs; it goes on as it is.
            EngineStoppedError: an earlier step failed.
        """
        self._check_alive()
        self._runner.update_params(params)

    def _launch(self) -> bool:
        """Plan and launch a step; whether there was one."""
        plan = self._scheduler.schedule()
        if plan is not None:
            self._launched.append(self._runner.launch(plan))
        return plan is not None

    def _read(self) -> list[RequestOutput]:
        """Commit the oldest launched step; until its result is here nothing changes."""
        result = self._launched[0].result()
        self._launched.popleft()
        return self._scheduler.commit(result)

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(
                f"the engine failed earlier ({type(self._failure).__name__}: {self._failure}); "
                "make a new one"
            )
