"""Requests of OpenAI's API, with the fields that SGLang's clients add."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from glmjax.errors import InvalidRequestError, ModelNotFoundError
from glmjax.server.frontend import ChoiceSpec, choices
from glmjax.server.served import ServedModel

MAX_TOTAL_CHOICES = 1024


class StreamOptions(BaseModel):
    """What a stream says besides its text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """What chat and plain completions share. Null is the same as left out."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_model(self, served: ServedModel) -> None:
        """Raise ModelNotFoundError when another model is asked for."""
        if self.model not in (None, served.name):
            raise ModelNotFoundError(
                f"the model {self.model!r} is not served here; {served.name!r} is", "model"
            )

    def specs(
        self, prompts: list[list[int]], served: ServedModel, max_tokens: int | None
    ) -> list[ChoiceSpec]:
        """What to generate: `n` choices of each prompt, those of a prompt side by side.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        sampling = served.sampling(
            max_new_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )
        stops = stop_strings(self.stop)
        skip = self.skip_special_tokens is not False
        n = 1 if self.n is None else self.n
        if n * len(prompts) > MAX_TOTAL_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts)} prompts x n {n} is above {MAX_TOTAL_CHOICES} choices a request; "
                "send several requests",
                "prompt",
            )
        specs = [ChoiceSpec(tuple(prompt), sampling, stops, skip) for prompt in prompts]
        return [choice for spec in specs for choice in choices(spec, n, self.seed)]


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None

    def template_variables(self) -> dict[str, Any]:
        """What the chat template may read; the effort "none" switches thinking off."""
        effort = self.reasoning_effort
        thinking = False if effort == "none" else None
        named = {
            "reasoning_effort": effort,
            "enable_thinking": thinking if self.enable_thinking is None else self.enable_thinking,
            "add_generation_prompt": self.add_generation_prompt,
        }
        given = {name: value for name, value in named.items() if value is not None}
        return given | (self.chat_template_kwargs or {})


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]


def stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    """Normalise a stop field."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())
