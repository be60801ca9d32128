"""What /openapi.json says of requests beyond their types: limits, fields that ask for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glmjax.server import unserved
from glmjax.server.anthropic import requests as anthropic
from glmjax.server.choice import MAX_CHOICES
from glmjax.server.openai.answers import ChatTool, ChatTurn
from glmjax.server.responses import requests as responses
from glmjax.server.sglang.admin_api import PAUSES
from glmjax.server.sglang.reading_api import PARSERS
from glmjax.types import MAX_LOGPROBS

Schema = dict[str, Any]

REF = "#/components/schemas/{model}"
TEXT = {"type": "string"}


def ref(model: type) -> Schema:
    """A reference to a model's schema."""
    return {"$ref": REF.format(model=model.__name__)}


STRINGS = {"anyOf": [TEXT, {"type": "array", "items": TEXT}, {"type": "null"}]}
SHARE = {"minimum": 0, "maximum": 1}
PENALTY = {"minimum": -2, "maximum": 2}
# Fields of requests: what their types do not say.
SAMPLING: dict[str, Schema] = {
    "temperature": {"minimum": 0},
    "top_p": {"exclusiveMinimum": 0, "maximum": 1},
    "top_k": {"minimum": -1},
    "min_p": SHARE,
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "repetition_penalty": {"exclusiveMinimum": 0, "maximum": 10},
    "n": {"minimum": 1, "maximum": MAX_CHOICES},
    "stop": STRINGS,
    "max_tokens": {"minimum": 1},
    "max_completion_tokens": {"minimum": 1},
    "max_thinking_tokens": {"minimum": 0},
    "top_logprobs": {"minimum": 0, "maximum": MAX_LOGPROBS},
    "timeout": {"exclusiveMinimum": 0},
}
CONVERSATION: dict[str, Schema] = {
    "messages": {"minItems": 1, "items": ref(ChatTurn)},
    "tools": {"items": ref(ChatTool)},
}
BLOCKS = {"messages": {"minItems": 1}}
PARSER = {"enum": [*PARSERS, None]}
FIELDS: dict[str, dict[str, Schema]] = {
    "ChatRequest": SAMPLING | CONVERSATION,
    "CompletionRequest": SAMPLING | {"max_tokens": {"minimum": 0}},
    "NativeSampling": SAMPLING | {"max_new_tokens": {"minimum": 0}},
    "ResponsesRequest": SAMPLING | {"max_output_tokens": {"minimum": 1}, "n": {"enum": [1, None]}},
    "MessagesRequest": SAMPLING | BLOCKS,
    "PromptRequest": BLOCKS,
    "TokenizeRequest": CONVERSATION,
    "ParseFunctionCallRequest": {"tools": CONVERSATION["tools"], "tool_call_parser": PARSER},
    "SeparateReasoningRequest": {"reasoning_parser": PARSER},
    "PauseRequest": {"mode": {"enum": [*PAUSES]}},
}
# Who names a model names the one that is served.
OF_MODEL = (
    "ChatRequest",
    "CompletionRequest",
    "ResponsesRequest",
    "MessagesRequest",
    "PromptRequest",
    "GenerateRequest",
    "TokenizeRequest",
    "DetokenizeRequest",
)
# Of two fields one must be given.
EITHER = {"GenerateRequest": ("text", "input_ids"), "TokenizeRequest": ("prompt", "messages")}
# Fields that models take beyond their own.
EXTRA = {
    "ChatRequest": unserved.CHAT,
    "CompletionRequest": unserved.COMPLETION,
    "GenerateRequest": unserved.GENERATE,
    "NativeSampling": unserved.SAMPLING,
    "ResponsesRequest": responses.NEUTRAL,
    "ReasoningOptions": responses.REASONING,
    "MessagesRequest": anthropic.UNSERVED,
    "PromptRequest": anthropic.UNSERVED,
}


def narrow(components: dict[str, Schema], model: str) -> None:
    """Make the schemas of requests as narrow as what is accepted.

    Args:
        components: schemas by name, changed in place.
        model: the name of the one model.
    """
    for name, schema in components.items():
        if name in FIELDS:
            _narrow_fields(schema["properties"], FIELDS[name])
        if name in OF_MODEL:
            left_out = [] if "model" in schema.get("required", ()) else [None]
            schema["properties"]["model"] = {"enum": [model, *left_out]}
        if name in EXTRA:
            extra = {field: _neutral(values) for field, values in EXTRA[name].items()}
            schema["properties"] = schema["properties"] | extra | schema["properties"]
            schema["additionalProperties"] = unserved.NOTHING
        if name in EITHER:
            schema["oneOf"] = [_given(field) for field in EITHER[name]]


def _narrow_fields(properties: dict[str, Schema], fields: Mapping[str, Schema]) -> None:
    for name in fields.keys() & properties.keys():
        whole = fields[name].keys() & {"anyOf", "enum"}  # all that there is to say
        properties[name] = fields[name] if whole else properties[name] | fields[name]


def _neutral(values: tuple[Any, ...]) -> Schema:
    """The schema of a field that may only ask for nothing."""
    return {} if ... in values else {"anyOf": [*map(_only, values), {"type": "null"}]}


def _only(value: Any) -> Schema:
    """The schema of one value, in words that makers of clients understand."""
    if value == []:
        return {"type": "array", "items": {"type": "null"}}
    if isinstance(value, list):
        size = len(value)
        return {"type": "array", "items": {"enum": value}, "minItems": size, "maxItems": size}
    if isinstance(value, dict):
        return {"type": "object", "maxProperties": 0}
    return {"const": value}


def _given(field: str) -> Schema:
    """The field is there, and not null."""
    return {"required": [field], "properties": {field: {"not": {"type": "null"}}}}
