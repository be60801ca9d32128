"""Requests of OpenAI's Responses API, which sends a conversation as a list of items."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from glmjax.errors import InvalidRequestError
from glmjax.server import unserved
from glmjax.server.openai.requests import Thinking
from glmjax.server.responses.tools import custom_arguments
from glmjax.server.sampling_fields import SamplingFields
from glmjax.server.unserved import Exact, Neutral

NO_STATE = "this server keeps no responses"
RESEND = "send the whole conversation in input"
SEALED = "reasoning.encrypted_content"
SEAL = "thought:"  # how what stands there begins
LOGPROBS = "message.output_text.logprobs"
Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    # of tools that OpenAI runs and of images: there is nothing to include
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "web_search_call.action.sources",
    "web_search_call.results",
]
# What would need something kept, and what to do instead.
STATEFUL = {
    "background": "wait for the answer, or stream it",
    "conversation": RESEND,
    "previous_response_id": RESEND,
    "prompt": "send its text as instructions and input",
}
NEUTRAL: Neutral = {
    **unserved.SAMPLING,
    **unserved.HINTS,
    **dict.fromkeys(STATEFUL, (False,)),
    "access_programs": (),
    "background_options": (),
    "context_management": ([],),
    "lora_path": (),
    "moderation": (),
    "personality": (),
    "return_hidden_states": (False,),
    # these change nothing that is generated
    "client_metadata": (...,),
    "image": (...,),
    "max_tool_calls": (...,),  # of tools that OpenAI runs
    "prompt_cache_options": (...,),
    "prompt_cache_retention": (...,),
    "service_tier": (...,),
    "store": (True, False),  # the answer says that it is not
}
REASONING: Neutral = {"context": ("auto", "current_turn"), "mode": ("standard",)}

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Text, or parts of text as the chat template takes them.
Text = str | list[dict[str, Any]]


class MessageItem(BaseModel):
    """What somebody says; without `type` too."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Text


class ThoughtText(BaseModel):
    """A piece of a thought."""

    text: str


class ReasoningItem(BaseModel):
    """What the assistant thought. Where it has content, its summary says nothing more.

    Agents such as Codex send back no content, but what they call encrypted, as they got it.
    """

    type: Literal["reasoning"]
    summary: list[ThoughtText] | None = None
    content: list[ThoughtText] | None = None
    encrypted_content: str | None = None

    @property
    def text(self) -> str:
        """The thought; "" where it is not there, or encrypted by another server."""
        sealed = self.encrypted_content or ""
        if not self.content and sealed.startswith(SEAL):
            return sealed.removeprefix(SEAL)
        return "\n".join(piece.text for piece in self.content or self.summary or ())


class CallItem(BaseModel):
    """A tool that the assistant called, in a namespace or in none."""

    type: Literal["function_call"]
    call_id: str
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(BaseModel):
    """A custom tool that the assistant called, in a namespace or in none."""

    type: Literal["custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None
    input: str

    @property
    def arguments(self) -> str:
        """As the model gave them."""
        return custom_arguments(self.input)


class ResultItem(BaseModel):
    """What a tool answered."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str | None = None
    output: Text


class ReferenceItem(Exact):
    """An item of an earlier answer, by its id; without `type` too."""

    type: Literal["item_reference"] | None = None
    id: str


REFERENCE = "item_reference"
KINDS = (
    "message",
    "reasoning",
    "function_call",
    "function_call_output",
    "custom_tool_call",
    "custom_tool_call_output",
    REFERENCE,
)
UNKNOWN_ITEM = "is of type {kind}, but must be of " + ", ".join(KINDS[:-1]) + " or " + KINDS[-1]


def _kind(item: Any) -> Any:
    if isinstance(item, dict) and item.get("type") is None:
        return REFERENCE if "id" in item and item.keys() <= {"id", "type"} else "message"
    return item["type"] if isinstance(item, dict) else getattr(item, "type", "message")


def _known(item: Any) -> Any:
    kind = _kind(item)
    if kind not in KINDS:
        raise PydanticCustomError("item_type", UNKNOWN_ITEM, {"kind": ascii(kind)[:60]})  # type: ignore[arg-type]
    return item


Item = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[ResultItem, Tag("function_call_output")]
    | Annotated[CustomCallItem, Tag("custom_tool_call")]
    | Annotated[ResultItem, Tag("custom_tool_call_output")]
    | Annotated[ReferenceItem, Tag(REFERENCE)],
    Discriminator(_kind),
    BeforeValidator(_known),
]


class ReasoningOptions(BaseModel):
    """How the model thinks. There are no summaries: who asks for one gets the thought as one."""

    model_config = ConfigDict(extra="allow")

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None  # its old name


class TextFormat(Exact):
    """What the answer's text must be."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Exact):
    """How the answer is worded; the model has no switch for verbosity."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(Exact):
    """Nothing is ever obfuscated."""

    include_obfuscation: bool | None = None


class ResponsesRequest(SamplingFields):
    """POST /v1/responses: OpenAI's fields, and those of chat completions that it does not have."""

    model: str | None = None
    input: str | list[Item]
    instructions: str | None = None
    max_output_tokens: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Include] | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["auto", "disabled"] | None = None  # nothing is ever cut
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None

    min_tokens: int | None = None
    priority: int | None = None
    timeout: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    max_thinking_tokens: int | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None

    @property
    def seals(self) -> bool:
        """Whether thoughts also come as `encrypted_content`."""
        return SEALED in (self.include or ())

    @property
    def logprobs(self) -> bool:
        """Whether log probabilities of the text are wanted."""
        return bool(self.top_logprobs) or LOGPROBS in (self.include or ())

    @property
    def summarises(self) -> bool:
        """Whether thoughts come as summaries of themselves."""
        asked = self.reasoning or ReasoningOptions()
        return bool(asked.summary or asked.generate_summary)

    @property
    def stores(self) -> bool:
        """Whether later requests may refer to what is answered."""
        return (self.model_extra or {}).get("store") is not False

    def check_served(self) -> None:
        """Raise InvalidRequestError when something is asked for that is not served."""
        extra = self.model_extra or {}
        for name, instead in STATEFUL.items():
            if extra.get(name) not in (None, False):
                raise InvalidRequestError(f"{name} is not served: {NO_STATE}; {instead}", name)
        unserved.check_extra(self, NEUTRAL)
        if self.reasoning is not None:
            unserved.check_extra(self.reasoning, REASONING, "reasoning.")
        if self.n not in (None, 1):
            raise InvalidRequestError(f"n is {self.n}, but a response has one answer", "n")
