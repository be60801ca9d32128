"""Requests of OpenAI's API, with the fields that SGLang's and vLLM's clients add."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from glmjax.errors import InvalidRequestError, ModelNotFoundError
from glmjax.server.choice import ChoiceSpec
from glmjax.server.grammar_fields import response_format
from glmjax.server.sampling_fields import SamplingFields, deadline
from glmjax.server.served import ServedModel
from glmjax.text.grammar import GrammarSpec

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions only


class StreamOptions(BaseModel):
    """What a stream says besides its text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None


class SamplingRequest(SamplingFields):
    """What chat and plain completions share."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    priority: int | None = None
    timeout: float | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def spelling(self) -> dict[str, str]:
        """The client's names of what errors may be about."""
        limit = "max_tokens"
        return {"max_new_tokens": limit, limit: limit, "min_new_tokens": "min_tokens"}

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the answer."""
        return False

    def choices(self, prompts: list[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate. Raises InvalidRequestError when a value is out of its range."""
        raise NotImplementedError

    def check_model(self, served: ServedModel) -> None:
        """Raise ModelNotFoundError when another model is asked for."""
        if self.model not in (None, served.name):
            raise ModelNotFoundError(
                f"the model {self.model!r} is not served here; {served.name!r} is", "model"
            )

    def grammars(self) -> list[GrammarSpec]:
        """Every grammar that is asked for."""
        return super().grammars() + response_format(self.response_format)

    def terms(self) -> dict[str, Any]:
        """The fields of ChoiceSpec that say when it is served."""
        return {"priority": self.priority or 0, "deadline_s": deadline(self.timeout)}


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None

    @property
    def spelling(self) -> dict[str, str]:
        """The client's names of what errors may be about."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {"max_new_tokens": limit, "max_tokens": limit, "logprobs": "top_logprobs"}
        return super().spelling | names

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

    def choices(self, prompts: list[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate; the model thinks first unless the prompt says that it has."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs needs logprobs; send logprobs: true with it", "top_logprobs"
            )
        limit = self.max_completion_tokens
        sampling = {
            "max_new_tokens": self.max_tokens if limit is None else limit,
            "min_new_tokens": self.min_tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }
        return self.specs(prompts, served, sampling, thinks=True, **self.terms())


class CompletionRequest(SamplingRequest):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the answer."""
        return bool(self.echo)

    def choices(self, prompts: list[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate; with `echo` nothing but the prompt where `max_tokens` is 0."""
        limit = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        hidden = self.echoes and limit == 0  # the engine generates one token at least
        scored = self.echoes and self.logprobs is not None
        sampling = {
            "max_new_tokens": 1 if hidden else limit,
            "min_new_tokens": self.min_tokens,
            "logprobs": self.logprobs,
            "prompt_logprobs_start": 0 if scored else None,
        }
        return self.specs(prompts, served, sampling, hidden=hidden, **self.terms())
