"""Requests of OpenAI's API, with the fields that SGLang's and vLLM's clients add."""

from __future__ import annotations

from typing import Any, Literal

from glmjax.errors import InvalidRequestError
from glmjax.server.choice import ChoiceSpec
from glmjax.server.grammar_fields import response_format
from glmjax.server.sampling_fields import SamplingFields, deadline, logit_bias
from glmjax.server.served import ServedModel
from glmjax.server.tool_fields import Toolset, toolset
from glmjax.server.unserved import Exact
from glmjax.text.grammar import GrammarSpec
from glmjax.text.reader import Reading

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions only


class StreamOptions(Exact):
    """What a stream says besides its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's, SGLang's: every chunk has the usage so far
    include_obfuscation: bool | None = None  # changes nothing here: nothing is padded


class Thinking(Exact):
    """Whether the model thinks, and how much, in the words of z.ai's API and of Anthropic's."""

    type: Literal["enabled", "disabled", "adaptive"] | None = None
    budget_tokens: int | None = None
    clear_thinking: bool | None = None

    @property
    def enabled(self) -> bool | None:
        """None: as the model does by itself."""
        return None if self.type in (None, "adaptive") else self.type == "enabled"


class Effort(Exact):
    """How much the model thinks, in OpenRouter's words."""

    effort: str | None = None
    enabled: bool | None = None
    max_tokens: int | None = None
    exclude: Literal[False] | None = None


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
    return_token_ids: bool | None = None  # vLLM's
    rid: str | None = None  # SGLang's: the answer's id, by which it may be ended

    @property
    def spelling(self) -> dict[str, str]:
        """The client's names of what errors may be about."""
        limit = "max_tokens"
        names = {"min_new_tokens": "min_tokens", "request_id": "rid"}
        return names | {"max_new_tokens": limit, limit: limit}

    @property
    def echoes(self) -> bool:
        """Whether the prompt comes before the answer."""
        return False

    def choices(self, prompts: list[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate. Raises InvalidRequestError when a value is out of its range."""
        raise NotImplementedError

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
    thinking: Thinking | None = None
    reasoning_effort: str | None = None
    reasoning: Effort | None = None
    max_thinking_tokens: int | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None

    @property
    def spelling(self) -> dict[str, str]:
        """The client's names of what errors may be about."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        names = {"max_new_tokens": limit, "max_tokens": limit, "logprobs": "top_logprobs"}
        names["max_thinking_tokens"] = next(iter(self._budgets), "max_thinking_tokens")
        return super().spelling | names

    @property
    def _budgets(self) -> dict[str, int]:
        """How long the thought may be, by the names of the fields that say it; the first counts."""
        thinking, reasoning = self.thinking or Thinking(), self.reasoning or Effort()
        said = {
            "max_thinking_tokens": self.max_thinking_tokens,
            "thinking.budget_tokens": thinking.budget_tokens,
            "reasoning.max_tokens": reasoning.max_tokens,
        }
        return {name: budget for name, budget in said.items() if budget is not None}

    def toolset(self, served: ServedModel) -> Toolset:
        """What it says of tools. Raises InvalidRequestError as `tool_fields.toolset` does."""
        return toolset(self.tools, self.tool_choice, self.parallel_tool_calls, served)

    def template_variables(self) -> dict[str, Any]:
        """What the chat template may read; the effort "none" switches thinking off.

        Raises:
            InvalidRequestError: chat_template_kwargs has what the request itself must say.
        """
        more = self.chat_template_kwargs or {}
        if taken := {"messages", "tools"} & more.keys():
            raise InvalidRequestError(
                f"chat_template_kwargs holds {', '.join(sorted(taken))}, which is not for it",
                "chat_template_kwargs",
            )
        if not isinstance(more.get("enable_thinking"), bool | None):
            raise InvalidRequestError(
                f"chat_template_kwargs.enable_thinking is {more['enable_thinking']!r}, but must be "
                "true or false",
                "chat_template_kwargs",
            )
        thinking, reasoning = self.thinking or Thinking(), self.reasoning or Effort()
        effort = self.reasoning_effort or reasoning.effort
        none = False if effort == "none" else None
        switches = (self.enable_thinking, thinking.enabled, reasoning.enabled, none)
        named = {
            "reasoning_effort": effort,
            "enable_thinking": next((on for on in switches if on is not None), None),
            "clear_thinking": thinking.clear_thinking,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
        }
        return {name: value for name, value in named.items() if value is not None} | more

    def prompt(self, served: ServedModel) -> list[int]:
        """Token ids of the conversation. Raises InvalidRequestError as the chat template does."""
        if not self.messages:
            raise InvalidRequestError("messages is empty; send at least one message", "messages")
        tools = self.toolset(served).tools or None
        return served.chat_prompt(self.messages, tools=tools, **self.template_variables())

    def choices(self, prompts: list[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate; the model thinks first unless the prompt says that it has."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs needs logprobs; send logprobs: true with it", "top_logprobs"
            )
        tools, limit = self.toolset(served), self.max_completion_tokens
        sampling = {
            "max_new_tokens": self.max_tokens if limit is None else limit,
            "min_new_tokens": self.min_tokens,
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
            "logit_bias": logit_bias(self.logit_bias, served) | tools.bias(served),
        }
        return self.specs(
            prompts,
            served,
            sampling,
            grammar=self._answer_grammar(tools, served),
            thinks=True,
            max_thinking_tokens=next(iter(self._budgets.values()), None),
            reading=self._reading(tools, served),
            **self.terms(),
        )

    def _answer_grammar(self, tools: Toolset, served: ServedModel) -> GrammarSpec | None:
        """With the line break that GLM-4.5 puts before an answer, unless it has begun."""
        grammar = tools.grammar(self.grammar(), served)
        lead = "" if self.continue_final_message else served.answer_lead
        return grammar and grammar._replace(lead=lead)

    def _reading(self, tools: Toolset, served: ServedModel) -> Reading:
        separate = served.reasoning_parser != "none"
        return Reading(
            tools=tools.schemas,
            separate_reasoning=separate and self.separate_reasoning is not False,
            stream_reasoning=self.stream_reasoning is not False,
            parallel=tools.choice.most is None,
        )


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
        """What to generate; nothing, or the prompt with `echo`, where `max_tokens` is 0."""
        limit = DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        hidden = limit == 0  # the engine generates one token at least
        scored = self.echoes and self.logprobs is not None
        sampling = {
            "max_new_tokens": 1 if hidden else limit,
            "min_new_tokens": self.min_tokens,
            "logprobs": self.logprobs,
            "prompt_logprobs_start": 0 if scored else None,
        }
        return self.specs(prompts, served, sampling, hidden=hidden, **self.terms())
