"""Answers of OpenAI's API, as /openapi.json describes them; no code makes them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from glmjax.server.sglang.answers import Acceptance, Answer

# Chat completions and completions


class PromptDetails(Answer):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int


class CompletionDetails(Answer):
    """Of the answer's tokens, those of thoughts; and drafts that were verified."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Drafts(Answer):
    """What became of drafts: by place in the chain, the share of verifications that took it."""

    verifications: int
    mean_accepted_length: float
    acceptance: Acceptance


class Usage(Answer):
    """Tokens counted; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails
    speculative_decoding: Drafts | None = None


class Function(Answer):
    """What is called: arguments are the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: Function


class SaidMessage(Answer):
    """What the model said. It may be sent back as it is, as a turn of the conversation."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None
    tool_calls: list[ToolCall] | None = None


class TokenLogprob(Answer):
    """A token and its log probability; `bytes` are those it adds to the text."""

    token: str
    logprob: float
    bytes: list[int]


class PlaceLogprob(TokenLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    """One for each token."""

    content: list[PlaceLogprob]
    refusal: None


ChatEnd = Literal["stop", "length", "tool_calls", "abort"]


class ChatChoice(Answer):
    """One of `n` answers; `matched_stop` is the stop string or the token id that ended it."""

    index: int
    message: SaidMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None
    matched_stop: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    """A whole answer."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class FunctionDelta(Answer):
    """More of a call: the first has the name, the others more of the arguments' text."""

    name: str | None = None
    arguments: str


class ToolCallDelta(Answer):
    """More of the call with this index; the first has the id."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(Answer):
    """More of the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Answer):
    """More of one of `n` answers."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None
    matched_stop: str | int | None = None
    token_ids: list[int] | None = None


class ChatCompletionChunk(Answer):
    """An event of a streamed answer; the last one before [DONE] has the usage, if asked for."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = None


class CompletionLogprobs(Answer):
    """Four lists with an entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One continuation, or more of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length", "abort"] | None
    matched_stop: str | int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class Completion(Answer):
    """Continuations; events of a stream have more of them each."""

    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(Answer):
    """A model that is served, in the words of OpenAI, of Anthropic and of vLLM."""

    id: str
    object: Literal["model"]
    type: Literal["model"]
    display_name: str
    created: int
    created_at: str
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Answer):
    """All models that are served."""

    object: Literal["list"]
    data: list[Model]
    first_id: str
    last_id: str
    has_more: Literal[False]


# Responses


class SaidPart(Answer):
    """A piece of an item: of the text, or of a thought."""

    type: Literal["output_text", "reasoning_text", "summary_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[PlaceLogprob] | None = None


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class ReasoningOutput(Answer):
    """A thought: its content, or its summary where one was asked for."""

    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[SaidPart]
    content: list[SaidPart]
    encrypted_content: str | None = None


class MessageOutput(Answer):
    """Text for the user."""

    id: str
    type: Literal["message"]
    status: ItemStatus
    role: Literal["assistant"]
    content: list[SaidPart]


class CustomToolCallOutput(Answer):
    """A call of a custom tool, whose input is any text."""

    id: str
    type: Literal["custom_tool_call"]
    status: ItemStatus
    call_id: str
    namespace: str | None = None
    name: str
    input: str


class FunctionCallOutput(Answer):
    """A call of a tool; its arguments are the text of a JSON object."""

    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    namespace: str | None = None
    name: str
    arguments: str


class InputDetails(Answer):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Answer):
    """Of the answer's tokens, those of thoughts."""

    reasoning_tokens: int


class ResponseUsage(Answer):
    """Tokens counted."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(Answer):
    """Why it was cut off."""

    reason: Literal["max_output_tokens"]


class ResponseError(Answer):
    """Why it failed."""

    code: str
    message: str


class ResponseObject(Answer):
    """A whole answer: what was said in order, and what the request asked for."""

    id: str
    object: Literal["response"]
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    created_at: int
    completed_at: int | None
    model: str
    output: list[ReasoningOutput | MessageOutput | FunctionCallOutput | CustomToolCallOutput]
    usage: ResponseUsage | None
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    previous_response_id: None
    background: Literal[False]
    store: Literal[False]
    service_tier: str
    truncation: Literal["disabled"]
    temperature: float
    top_p: float
    top_logprobs: int
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    prompt_cache_key: str | None
    safety_identifier: str | None
    user: str | None
    reasoning: dict[str, Any]
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]


class ResponseEvent(BaseModel):
    """An event of a streamed answer, in OpenAI's words; the last holds the whole answer."""

    type: str
    sequence_number: int
    response: ResponseObject | None = None


# Requests, where their own models leave it to the chat template to be exact


ToolName = Annotated[
    str, Field(min_length=1, max_length=256, pattern=r'^[^\x00-\x20\x7f"<>{}\[\]]+$')
]


class ChatToolFunction(BaseModel):
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(BaseModel):
    """A tool that the model may call."""

    type: Literal["function"]
    function: ChatToolFunction


class ChatContentPart(BaseModel):
    """A piece of a message's text."""

    type: Literal["text"]
    text: str


class ChatTurn(BaseModel):
    """A turn of a conversation. Content null is empty; `reasoning_content` is its thought."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ChatContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
