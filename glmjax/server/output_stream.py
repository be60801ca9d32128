"""The outputs of requests, as an asynchronous iterator on the event loop of whoever waits."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from glmjax.types import FinishReason, RequestOutput


class OutputStream:
    """Outputs of requests that were submitted together, in the order they became known.

    Belongs to the event loop it was made on. Ends when all its requests have ended; closing it
    early, or cancelling whoever waits for it, aborts them.

    Args:
        request_ids: whose outputs.
        leave: ends a request in the engine; told whether it STOPped, as far as its client is
            concerned, or was ABORTed.
    """

    def __init__(self, request_ids: Iterable[str], leave: Callable[[str, FinishReason], None]):
        self.loop = asyncio.get_running_loop()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self._open = set(request_ids)
        self._leave = leave
        self._outputs: deque[RequestOutput] = deque()
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next output. Raises EngineStoppedError when the engine ended before the requests."""
        try:
            while self._open and not self._outputs and self._error is None:
                self._news.clear()
                await self._news.wait()
        except asyncio.CancelledError:
            self.close()
            raise
        if self._outputs:
            return self._take()
        if self._open and self._error is not None:
            raise self._error
        raise StopAsyncIteration

    def drop(self, request_id: str, reason: FinishReason = FinishReason.STOP) -> None:
        """End one request, whose client has all it wanted, and forget what it still puts out."""
        if request_id in self._open:
            self._open.discard(request_id)
            self._outputs = deque(o for o in self._outputs if o.request_id != request_id)
            self._news.set()
            self._leave(request_id, reason)

    def close(self) -> None:
        """Abort what has not ended."""
        for request_id in list(self._open):
            self.drop(request_id, FinishReason.ABORT)

    def put(self, output: RequestOutput) -> None:
        """Hand over an output; on the stream's loop."""
        if output.request_id in self._open:
            self._outputs.append(output)
            self._news.set()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, after what it already holds; on the stream's loop."""
        self._error = error
        self._news.set()
        if not self.accepted.done():
            self.accepted.set_exception(error)

    def accept(self) -> None:
        """Say that the engine has taken the requests; on the stream's loop."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    def _take(self) -> RequestOutput:
        output = self._outputs.popleft()
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        return output
