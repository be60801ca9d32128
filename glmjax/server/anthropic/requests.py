"""Requests of Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from glmjax.errors import InvalidRequestError
from glmjax.server.anthropic.blocks import Message, TextOnly, only
from glmjax.server.anthropic.edits import ContextManagement
from glmjax.server.anthropic.messages import ChatMessage, Origins, conversation
from glmjax.server.choice import ChoiceSpec
from glmjax.server.openai.requests import ChatRequest, Thinking
from glmjax.server.served import ServedModel
from glmjax.server.unserved import Exact, Neutral

# Fields that are not served, and the values with which they ask for nothing.
UNSERVED: Neutral = {
    "speed": ("standard",),
    "container": (),
    "mcp_servers": ([],),
    "compaction": (),
    "fallbacks": ([],),
    "fallback_credit_token": (),
    # these change nothing that is generated
    "metadata": (...,),
    "cache_control": (...,),
    "service_tier": (...,),
    "inference_geo": (...,),
    "diagnostics": (...,),
    "user_profile_id": (...,),
    "workspace_id": (...,),
    "billing_policy": (...,),
}
# The client's names of what errors may be about.
SPELLING = {
    "stop": "stop_sequences",
    "max_thinking_tokens": "thinking.budget_tokens",
    "continue_final_message": "messages",
    "reasoning_content": "a thinking block",
}
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class ThreadError(InvalidRequestError):
    """A request wants the server to hold its conversation. HTTP 400.

    Attributes:
        details: by these Anthropic's client knows that it has to send all of it, and does.
    """

    details = MappingProxyType({"error_code": "thread_unsupported_request"})


class ThinkingConfig(Exact):
    """Whether the model thinks; `adaptive` leaves it to the model, and GLM models do.

    Thoughts that are not omitted are shown as they come, which is what `updates` asks for.
    """

    type: Literal["enabled", "adaptive", "disabled", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted", "updates"] | None = None

    @property
    def on(self) -> bool:
        """Whether the model may think."""
        return self.type in ("enabled", "adaptive")


class Format(Exact):
    """The answer is JSON of this schema."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Exact):
    """How hard to think, which the chat template may read, and the form of the answer."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: Format | None = None


class Tool(Exact):
    """A tool that the client runs.

    One with `defer_loading` may be called, but the model is told of it only where a result refers
    to it, so that what comes before stays in the cache.
    """

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    input_examples: list[dict[str, Any]] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    cache_control: Any = None
    defer_loading: bool | None = None
    eager_input_streaming: bool | None = None

    def function(self) -> dict[str, Any]:
        """In OpenAI's form; examples become JSON schema's own."""
        examples = {"examples": self.input_examples} if self.input_examples else {}
        words = {"description": self.description} if self.description else {}
        strict = {"strict": True} if self.strict else {}
        parameters = {"parameters": self.input_schema | examples}
        return {"type": "function", "function": {"name": self.name} | words | parameters | strict}


class ToolChoice(Exact):
    """Which tools are called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None

    def spoken(self) -> Any:
        """In OpenAI's form. Raises InvalidRequestError where the tool is not named."""
        if self.type != "tool":
            return CHOICES[self.type]
        if self.name is None:
            raise InvalidRequestError(
                'tool_choice.name is missing; name the tool, or use {"type": "any"}', "tool_choice"
            )
        return {"type": "function", "function": {"name": self.name}}


class Conversation(ChatRequest):
    """A chat whose answer ends where the context does, if `max_tokens` would reach beyond it.

    Attributes:
        shown: how many of its tools, from the first, the model sees before the conversation.
    """

    shown: int = 0

    def prompt(self, served: ServedModel) -> list[int]:
        """Token ids of the conversation. Raises InvalidRequestError as the chat template does."""
        tools = self.toolset(served).tools[: self.shown]
        return served.chat_prompt(self.messages, tools=tools or None, **self.template_variables())

    def choices(self, prompts: list[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate. Raises InvalidRequestError also where a prompt is too long."""
        size, most = max(map(len, prompts)), served.max_seq_len - 1
        if size > most:  # agents look for these words, and then make it shorter
            raise InvalidRequestError(
                f"prompt is too long: {size} tokens > {most} maximum; shorten the conversation",
                "messages",
            )
        room = served.max_seq_len - size
        fits = self.max_tokens is None or self.max_tokens <= room
        body = self if fits else self.model_copy(update={"max_tokens": None})
        return ChatRequest.choices(body, prompts, served)


class PromptRequest(BaseModel):
    """POST /v1/messages/count_tokens, and what makes the prompt of any request.

    Without `thinking` the model does not think, as with Anthropic.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message]
    system: str | list[TextOnly] | None = None
    tools: list[Annotated[Tool, only("type", "custom", None)]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    output_format: Format | None = None
    context_management: ContextManagement | None = None
    thread: Any = None

    def chat(self) -> tuple[Conversation, Origins]:
        """The same in OpenAI's form, and where its messages come from.

        Raises:
            InvalidRequestError: fields that contradict each other, or as `conversation` does.
            ThreadError: it asks for a thread.
        """
        if self.thread is not None:
            raise ThreadError(
                "thread is not served: no conversation is kept here; send all of it in messages",
                "thread",
            )
        tools, places, shown = self._functions()
        named = {tool["function"]["name"]: tool for tool in tools}
        messages, origins = conversation(self.messages, self.system, named)
        begun, form = _is_begun(messages), self._format()
        if begun and form:
            name = self.spelling["response_format"]
            raise InvalidRequestError(
                f"{name} does not go with a final message of the assistant, which would not be "
                "part of the JSON; leave one of the two out",
                name,
            )
        chat = Conversation(
            model=self.model,
            messages=messages,
            tools=tools or None,
            shown=shown,
            **self._calls(),
            **self._thought(),
            response_format=form,
            continue_final_message=begun or None,
            **self._sampling(),
        )
        return chat, origins | places

    def with_messages(self, messages: Sequence[Message]) -> PromptRequest:
        """The same with another conversation."""
        return self.model_copy(update={"messages": [*messages]})

    @property
    def spelling(self) -> dict[str, str]:
        """The client's names of what errors may be about."""
        form = "output_format" if self.output_format else "output_config.format"
        return SPELLING | {"response_format": form}

    @property
    def shows_thoughts(self) -> bool:
        """Whether the client wants to read them."""
        return self.thinking is None or self.thinking.display != "omitted"

    def _functions(self) -> tuple[list[dict[str, Any]], Origins, int]:
        """Tools in OpenAI's form, where they come from, and how many are not deferred: the first.

        Raises:
            InvalidRequestError: all are deferred, as with Anthropic: how to call any would not be
                shown either.
        """
        tools = self.tools or []
        order = sorted(range(len(tools)), key=lambda i: tools[i].defer_loading is True)
        shown = sum(tool.defer_loading is not True for tool in tools)
        if tools and not shown:
            raise InvalidRequestError(
                "all tools have defer_loading, so that the model would see none; leave it out of "
                "one, such as the one that finds the others",
                "tools",
            )
        origins = {f"tools[{i}]": f"tools[{place}]" for i, place in enumerate(order)}
        return [tools[place].function() for place in order], origins, shown

    def _calls(self) -> dict[str, Any]:
        if self.tool_choice is None:
            return {}
        parallel = False if self.tool_choice.disable_parallel_tool_use else None
        return {"tool_choice": self.tool_choice.spoken(), "parallel_tool_calls": parallel}

    def _thought(self) -> dict[str, Any]:
        thinking, management = self.thinking, self.context_management
        on = thinking is not None and thinking.on
        return {
            "enable_thinking": on,
            "max_thinking_tokens": thinking.budget_tokens if thinking and on else None,
            "thinking": Thinking(clear_thinking=management and management.clear_thinking),
            "reasoning_effort": self.output_config and self.output_config.effort,
        }

    def _format(self) -> dict[str, Any] | None:
        """Newer clients have it in output_config."""
        newer = self.output_config and self.output_config.format
        if newer and self.output_format:
            raise InvalidRequestError(
                "output_format and output_config.format are both given; leave one out",
                "output_format",
            )
        asked = newer or self.output_format
        schema = asked and {"name": "answer", "schema": asked.schema_, "strict": True}
        return schema and {"type": "json_schema", "json_schema": schema}

    def _sampling(self) -> dict[str, Any]:
        return {}


class MessagesRequest(PromptRequest):
    """POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def _sampling(self) -> dict[str, Any]:
        budget = self.thinking and self.thinking.on and self.thinking.budget_tokens
        if budget and budget >= self.max_tokens:
            raise InvalidRequestError(
                f"thinking.budget_tokens is {budget}, but must be below max_tokens, which is "
                f"{self.max_tokens}",
                "thinking.budget_tokens",
            )
        for i, stop in enumerate(self.stop_sequences or ()):
            if any("\ud800" <= char <= "\udfff" for char in stop):
                raise InvalidRequestError(
                    f"stop_sequences[{i}] is not valid Unicode: it holds half of a surrogate pair",
                    "stop_sequences",
                )
        return {
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def _is_begun(messages: list[ChatMessage]) -> bool:
    """Whether the conversation ends in the assistant's turn, which is to be gone on with.

    Raises:
        InvalidRequestError: its text ends in white space, as with Anthropic: tokens of words begin
            with theirs, so that the model would go on badly.
    """
    role, content = messages[-1]["role"], messages[-1]["content"]
    if role == "assistant" and content != content.rstrip():
        raise InvalidRequestError(
            "messages: final assistant content cannot end with trailing whitespace", "messages"
        )
    return role == "assistant"
