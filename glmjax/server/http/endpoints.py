"""Every endpoint as /openapi.json describes it: what it answers, with which statuses, examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from glmjax.server.anthropic import answers as anthropic
from glmjax.server.http.welcome import Welcome
from glmjax.server.openai import answers as openai
from glmjax.server.responses import answers as responses
from glmjax.server.sglang import answers as sglang
from glmjax.server.sglang.admin_api import PAUSES

Example = Mapping[str, Any]

TAGS = {
    "OpenAI": "OpenAI's API, with the fields that SGLang's and vLLM's clients add.",
    "Anthropic": "Anthropic's API.",
    "SGLang": "SGLang's own API.",
    "Operation": "For whoever runs the server.",
}
STATUSES = {
    400: "The request is malformed, asks for what is not served, or can never be served.",
    401: "The API key is missing or not known.",
    404: "There is no such model or object.",
    413: "The request is too large.",
    429: "Too many requests are waiting; try again.",
    500: "The engine failed, or the server has a bug; its log says more.",
    503: "The server is starting or stopping; try again, or elsewhere.",
    504: "The request was not done within its timeout.",
}
# Kind of endpoint -> statuses of its errors. Of a model: the request may name it.
KINDS: dict[str, tuple[int, ...]] = {
    "plain": (500,),  # reads what the server knows
    "object": (404, 500),  # of a name
    "computed": (400, 413, 500),  # from a body alone
    "computed of a model": (400, 404, 413, 500),
    "engine": (500, 503),  # has the engine do something
    "engine and body": (400, 413, 500, 503),
    "generation of a model": (400, 404, 413, 429, 500, 503, 504),
    "probe": (429, 500, 503),
}


@dataclass(frozen=True)
class Endpoint:
    """What is not in a handler's signature.

    Attributes:
        tag: one of `TAGS`.
        kind: one of `KINDS`.
        answer: the body of status 200; None: text.
        event: of a streamed answer's events; None: it does not stream.
        examples: bodies of requests that succeed, by what they show.
        answers: bodies of other statuses that are no errors.
        last: the data of a stream's last event, where that is no JSON.
    """

    tag: str
    kind: str
    answer: type[BaseModel] | None
    event: type[BaseModel] | None = None
    examples: Mapping[str, Example] = field(default_factory=dict)
    answers: Mapping[int, type[BaseModel]] = field(default_factory=dict)
    last: str | None = "[DONE]"


CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "The weather of a place."}
WEATHER = {"type": "function", "function": FUNCTION | {"parameters": CITY}}
HI = [{"role": "user", "content": "Hi"}]
CALL = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"

ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": Endpoint(
        "OpenAI",
        "generation of a model",
        openai.ChatCompletion,
        openai.ChatCompletionChunk,
        {
            "short": {"messages": HI, "max_tokens": 16},
            "without thinking": {"messages": HI, "max_tokens": 16, "enable_thinking": False},
            "streamed": {"messages": HI, "max_tokens": 16, "stream": True},
            "with tools": {"messages": HI, "max_tokens": 16, "tools": [WEATHER]},
            "with log probabilities": {"messages": HI, "max_tokens": 4, "logprobs": True},
        },
    ),
    "/v1/completions": Endpoint(
        "OpenAI",
        "generation of a model",
        openai.Completion,
        openai.Completion,
        {
            "text": {"prompt": "Once upon a time", "max_tokens": 16},
            "token ids": {"prompt": [1, 2, 3], "max_tokens": 4},
            "streamed": {"prompt": ["One", "Two"], "max_tokens": 4, "stream": True},
            "scored": {"prompt": "Hello", "max_tokens": 1, "echo": True, "logprobs": 2},
        },
    ),
    "/v1/responses": Endpoint(
        "OpenAI",
        "generation of a model",
        openai.ResponseObject,
        openai.ResponseEvent,
        {
            "text": {"input": "Hi", "max_output_tokens": 16},
            "conversation": {"input": HI, "instructions": "Be brief.", "max_output_tokens": 16},
            "streamed": {"input": "Hi", "max_output_tokens": 16, "stream": True},
            "with tools": {
                "input": "Hi",
                "max_output_tokens": 16,
                "tools": [{"type": "function"} | FUNCTION | {"parameters": CITY}],
            },
        },
        last=None,
    ),
    "/v1/responses/input_tokens": Endpoint(
        "OpenAI",
        "computed of a model",
        responses.InputTokens,
        examples={"short": {"input": "Hi"}},
    ),
    "/v1/messages": Endpoint(
        "Anthropic",
        "generation of a model",
        anthropic.MessageAnswer,
        anthropic.MessageEvent,
        {
            "short": {"messages": HI, "max_tokens": 16},
            "with thinking": {
                "messages": HI,
                "max_tokens": 16,
                "thinking": {"type": "enabled", "budget_tokens": 8},
            },
            "streamed": {"messages": HI, "max_tokens": 16, "stream": True},
            "with tools": {
                "messages": HI,
                "max_tokens": 16,
                "tools": [FUNCTION | {"input_schema": CITY}],
            },
        },
        last=None,
    ),
    "/v1/messages/count_tokens": Endpoint(
        "Anthropic",
        "computed of a model",
        anthropic.TokenCount,
        examples={"short": {"messages": HI}},
    ),
    "/v1/models": Endpoint("OpenAI", "plain", openai.ModelList),
    "/v1/models/{name}": Endpoint("OpenAI", "object", openai.Model),
    "/generate": Endpoint(
        "SGLang",
        "generation of a model",
        sglang.GenerateAnswers,
        sglang.GenerateAnswer,
        {
            "text": {"text": "Once upon a time", "sampling_params": {"max_new_tokens": 16}},
            "token ids": {"input_ids": [[1, 2], [3]], "sampling_params": {"max_new_tokens": 4}},
            "streamed": {"text": "Hi", "sampling_params": {"max_new_tokens": 4}, "stream": True},
            "scored": {
                "text": "Hello",
                "return_logprob": True,
                "logprob_start_len": 0,
                "sampling_params": {"max_new_tokens": 0},
            },
        },
    ),
    "/abort_request": Endpoint(
        "SGLang",
        "computed",
        sglang.Aborted,
        examples={"by id": {"rid": "my-request"}, "all": {"abort_all": True}},
    ),
    "/tokenize": Endpoint(
        "SGLang",
        "computed of a model",
        sglang.Tokens,
        examples={
            "text": {"prompt": "Hello"},
            "texts": {"prompt": ["Hello", "world"]},
            "conversation": {"messages": HI, "tools": [WEATHER]},
        },
    ),
    "/detokenize": Endpoint(
        "SGLang",
        "computed of a model",
        sglang.Texts,
        examples={"one": {"tokens": [1, 2, 3]}, "many": {"tokens": [[1, 2], [3]]}},
    ),
    "/parse_function_call": Endpoint(
        "SGLang",
        "computed",
        sglang.FunctionCalls,
        examples={"a call": {"text": CALL, "tools": [WEATHER], "tool_call_parser": "glm45"}},
    ),
    "/separate_reasoning": Endpoint(
        "SGLang",
        "computed",
        sglang.SeparatedReasoning,
        examples={"a thought": {"text": "<think>Rome?</think>\nRome.", "reasoning_parser": "glm"}},
    ),
    "/health": Endpoint("Operation", "engine", sglang.Status, answers={503: sglang.Status}),
    "/health_generate": Endpoint("Operation", "probe", sglang.Status),
    "/get_model_info": Endpoint("Operation", "plain", sglang.ModelInfo),
    "/v1/loads": Endpoint("Operation", "plain", sglang.Loads),
    "/get_load": Endpoint("Operation", "plain", sglang.OldLoads),
    "/get_server_info": Endpoint("Operation", "plain", sglang.ServerInfo),
    "/metrics": Endpoint("Operation", "plain", None),
    "/flush_cache": Endpoint("Operation", "engine", sglang.Done),
    "/pause_generation": Endpoint(
        "Operation",
        "engine and body",
        sglang.Done,
        examples={mode: {"mode": mode} for mode in PAUSES},
    ),
    "/continue_generation": Endpoint("Operation", "engine", sglang.Done),
    "/": Endpoint("Operation", "plain", Welcome),
}
