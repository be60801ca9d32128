"""The engine: where host and device meet. Schedules, launches, reads back."""

from __future__ import annotations

from collections import deque

from glmjax.config import SchedulerConfig
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

    @property
    def limits(self) -> Limits:
        """What the runner offers."""
        return self._runner.limits

    def add(self, request: Request) -> None:
        """Queue a request; outputs come from later steps.

        Raises:
            InvalidRequestError: it can never be served.
            QueueFullError: too many are waiting.
        """
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """End a request early; its last output comes from a later step. Unknown ids are ignored."""
        self._scheduler.abort(request_id)

    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._scheduler.has_work()

    def load(self) -> EngineLoad:
        """How busy it is."""
        return self._scheduler.load()

    def step(self) -> list[RequestOutput]:
        """Launch the next step, then read the one launched before it.

        Returns:
            What became known: new tokens and ends of requests; often empty.
        """
        plan = self._scheduler.schedule()
        if plan is not None:
            self._launched.append(self._runner.launch(plan))
        outputs = self._scheduler.take_aborted()
        if self._launched and (plan is None or len(self._launched) > 1):
            outputs += self._scheduler.commit(self._launched.popleft().result())
        return outputs
