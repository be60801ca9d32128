"""Requests through an engine, and what came of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from glmjax.engine import Engine
from glmjax.plans import Limits, Runner
from glmjax.types import FinishReason, Request, RequestOutput, TokenLogprobs


@dataclass
class Answer:
    """All outputs of a request, joined; and the last one."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    last: RequestOutput | None = None

    def add(self, output: RequestOutput) -> None:
        """Take in one more output."""
        self.tokens += output.token_ids
        self.logprobs += output.logprobs
        self.prompt_logprobs += output.prompt_logprobs
        self.versions += [output.weight_version] * len(output.token_ids)
        self.last = output

    @property
    def end(self) -> RequestOutput:
        """The last output; there is one once the request has ended."""
        assert self.last is not None
        return self.last

    @property
    def reason(self) -> FinishReason | None:
        """Why it ended."""
        return self.end.finish_reason

    @property
    def matched_stop(self) -> int | None:
        """The stop token that ended it."""
        return self.end.matched_stop

    @property
    def error(self) -> str | None:
        """What went wrong."""
        return self.end.error

    @property
    def cached(self) -> int:
        """Prompt tokens found in the cache."""
        return self.end.cached_tokens

    @property
    def drafted(self) -> int:
        """Drafts that were verified."""
        return self.end.drafted_tokens

    @property
    def accepted(self) -> int:
        """Of those, accepted ones."""
        return self.end.accepted_tokens


def ask(engine: Engine, requests: Iterable[Request]) -> dict[str, Answer]:
    """Run requests together to their ends; answers by id."""
    answers: dict[str, Answer] = {}
    for request in requests:
        engine.add(request)
        answers[request.id] = Answer()
    while engine.has_work():
        for output in engine.step():
            answers[output.request_id].add(output)
    return answers


def tokens_of(answers: dict[str, Answer]) -> dict[str, list[int]]:
    """The tokens of each answer."""
    return {id: answer.tokens for id, answer in answers.items()}


class Limited:
    """A runner of which the scheduler sees less: fewer pages, say. Nothing is compiled."""

    def __init__(self, runner: Runner, **limits):
        self._runner, self._limits = runner, replace(runner.limits, **limits)

    @property
    def limits(self) -> Limits:
        return self._limits

    def __getattr__(self, name: str):
        return getattr(self._runner, name)
