"""Answers of SGLang's API, and errors, as /openapi.json describes them; no code makes them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, RootModel

LogprobTriple = tuple[float | None, int, str | None]
Acceptance = list[float]


class Answer(BaseModel):
    """An object that has no other fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetails(Answer):
    """What was wrong: in words, of which kind, in which field, and a code for programs."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str | None


class Error(Answer):
    """OpenAI's shape of an error."""

    error: ErrorDetails


class AnthropicErrorCode(Answer):
    """A code for programs."""

    error_code: str


class AnthropicErrorDetails(Answer):
    """What was wrong: of which kind, in words, and sometimes more."""

    type: str
    message: str
    details: AnthropicErrorCode | None = None


class AnthropicError(Answer):
    """Anthropic's shape of an error."""

    type: Literal["error"]
    error: AnthropicErrorDetails
    request_id: str | None = None


class FinishReason(Answer):
    """Why an answer ended: what `matched` is a stop string or a token id."""

    type: Literal["stop", "length", "abort"]
    matched: str | int | None = None
    length: int | None = None
    message: str | None = None


class MetaInfo(Answer):
    """About an answer; log probabilities as [log probability, token id, text].

    Seconds from the request's arrival, and how many tokens are a thought's, come at the end.
    """

    id: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    weight_version: str
    spec_accept_token_num: int
    spec_draft_token_num: int
    e2e_latency: float | None = None
    reasoning_tokens: int | None = None
    spec_verify_ct: int | None = None
    spec_accept_length: float | None = None
    spec_acceptance: Acceptance | None = None
    input_token_logprobs: list[LogprobTriple] | None = None
    input_top_logprobs: list[list[LogprobTriple] | None] | None = None
    output_token_logprobs: list[LogprobTriple] | None = None
    output_top_logprobs: list[list[LogprobTriple] | None] | None = None


class GenerateAnswer(Answer):
    """What was generated; an event of a stream has all that is known so far."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | None = None


class GenerateAnswers(RootModel[GenerateAnswer | list[GenerateAnswer]]):
    """One answer, or a list of them where several prompts or choices were asked for."""


class Tokens(Answer):
    """Token ids and how many, or lists of them where several texts were sent."""

    tokens: list[int] | list[list[int]]
    count: int | list[int]
    max_model_len: int
    token_strs: list[str] | list[list[str]] | None = None


class Texts(Answer):
    """A text, or a list of them where several lists of token ids were sent."""

    text: str | list[str]


class FunctionCall(Answer):
    """A call; its parameters are the text of a JSON object."""

    tool_index: int
    name: str
    parameters: str


class FunctionCalls(Answer):
    """The calls in a text, and the rest of it."""

    normal_text: str
    calls: list[FunctionCall]


class SeparatedReasoning(Answer):
    """The thought in a text, and the rest of it."""

    reasoning_text: str
    text: str


class Status(Answer):
    """Whether requests are taken."""

    status: Literal["starting", "running", "draining", "failed", "stopped"]


class Aborted(Answer):
    """Whether there was such a request."""

    aborted: bool


class Done(Answer):
    """It was done."""

    success: Literal[True]
    message: str


class Load(Answer):
    """How busy the engine is."""

    num_running_reqs: int
    num_waiting_reqs: int
    num_total_reqs: int
    num_used_tokens: int
    max_total_num_tokens: int
    token_usage: float
    utilization: float
    max_running_requests: int


class State(Load):
    """The same with tokens generated a second, and what prefix cache and drafts have brought."""

    last_gen_throughput: float
    num_cached_tokens: int
    cache_hit_rate: float
    avg_spec_accept_length: float


class RankLoad(Load):
    """How busy a rank is."""

    dp_rank: int


class Loads(Answer):
    """How busy the server is, which is one rank."""

    timestamp: str
    version: str
    loads: list[RankLoad]


class OldLoad(Answer):
    """How busy a rank is, in the words of older clients."""

    dp_rank: int
    num_reqs: int
    num_waiting_reqs: int
    num_tokens: int


class OldLoads(RootModel[list[OldLoad]]):
    """How busy the server is, in the words of older clients; it is one rank."""


class ModelInfo(Answer):
    """What is served. Its requests have no sampling parameters of their own that are preferred."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    is_generation: bool
    preferred_sampling_params: None
    weight_version: str
    has_image_understanding: bool
    has_audio_understanding: bool
    model_type: str
    architectures: list[str]


class ServerInfo(Answer):
    """What is served, within which limits, and how busy it is."""

    model_path: str
    tokenizer_path: str
    served_model_name: str
    context_length: int
    max_total_tokens: int
    max_running_requests: int
    vocab_size: int
    status: Literal["starting", "running", "draining", "failed", "stopped"]
    paused: bool
    weight_version: str
    uptime_seconds: float
    internal_states: list[State]
    version: str
