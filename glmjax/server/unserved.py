"""Fields of other servers' APIs that are not served here: named in an error, never ignored.

A field that is not known and asks for nothing is no error: clients send all the fields they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from glmjax.errors import InvalidRequestError

# Values besides null with which a field asks for nothing, and `...` for any. A list of nulls is [].
Neutral = Mapping[str, tuple[Any, ...]]

EMPTY = ("", [], {})
# The schema of what asks for nothing in any field: `asks_nothing`.
NOTHING: dict[str, Any] = {
    "anyOf": [
        {"type": "null"},
        {"const": False},
        {"const": ""},
        {"type": "array", "items": {"type": "null"}},
        {"type": "object", "maxProperties": 0},
    ]
}
# These change nothing that is generated: where a request goes, what is counted of it, and how.
HINTS: Neutral = {
    "conversation_id": (...,),
    "custom_labels": (...,),
    "data_parallel_rank": (0,),
    "external_trace_header": (...,),
    "log_metrics": (...,),
    "no_logs": (...,),
    "routed_dp_rank": (0,),
    "routing_key": (...,),
    "session_id": (...,),
    # these go with others, which are refused
    "return_flat_raw_top_logprobs_b64": (...,),
    "routed_experts_start_len": (...,),
}
SAMPLING: Neutral = {
    "add_special_tokens": (...,),  # the tokenizer adds none, chat templates write theirs
    "length_penalty": (1,),
    "spaces_between_special_tokens": (...,),
    "stop_regex": EMPTY,
    "stop_regex_max_len": (0,),
    "stop_str_max_len": (0,),
    "stream_interval": (...,),
    "structural_tag": EMPTY,
    "custom_params": EMPTY,
}
OPENAI: Neutral = (
    SAMPLING
    | HINTS
    | {
        "best_of": (1,),
        "return_hidden_states": (False,),
        "lora_path": EMPTY,
        # these change nothing that is generated
        "user": (...,),
        "metadata": (...,),
        "safety_identifier": (...,),
        "prompt_cache_key": (...,),
        "request_id": (...,),
        "service_tier": (...,),
        "store": (True, False),
        "prompt_cache_retention": (...,),
        "prompt_cache_options": (...,),
    }
)
CHAT: Neutral = OPENAI | {
    "functions": EMPTY,
    "function_call": ("none", "auto"),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("low", "medium", "high"),  # changes nothing, as on /v1/responses
    "moderation": (),
    "include_reasoning": (True,),
    "do_sample": (True,),
    "usage": (...,),  # OpenRouter's: it is told anyway
    "provider": (...,),  # OpenRouter's: which to ask
    "tool_stream": (...,),  # arguments are streamed anyway
}
COMPLETION: Neutral = OPENAI | {"suffix": EMPTY}
GENERATE: Neutral = HINTS | {
    "token_ids_logprob": EMPTY,
    "return_hidden_states": (False,),
    "input_embeds": EMPTY,
    "image_data": EMPTY,
    "audio_data": EMPTY,
    "video_data": EMPTY,
    "lora_path": EMPTY,
    "custom_logit_processor": EMPTY,
}
# What to do rather than to leave a field out.
INSTEAD = {
    "functions": "send them as tools",
    "function_call": "say it with tool_choice, of tools",
    "include_reasoning": "read the content alone, or switch thinking off",
    "do_sample": "set temperature 0",
}


def asks_nothing(value: Any) -> bool:
    """Whether a field that nobody knows may be left out: null, false, empty, or a list of nulls."""
    return value is None or value is False or _flat(value) in EMPTY


def _flat(value: Any) -> Any:
    """The value; [] for a list of nulls, as batches have them."""
    nulls = isinstance(value, list) and all(each is None for each in value)
    return [] if nulls else value


class Exact(BaseModel):
    """An object of a request, without other fields but those that ask for nothing."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"additionalProperties": NOTHING})

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {k: v for k, v in given.items() if k in known or not asks_nothing(v)}


def check_extra(body: BaseModel, neutral: Neutral, where: str = "") -> None:
    """Refuse fields that `body`'s model does not have, unless they ask for nothing.

    Args:
        body: a model with `extra="allow"`.
        neutral: accepted values by field, of those that are known.
        where: the field that holds `body`, with its dot.

    Raises:
        InvalidRequestError: it names the field.
    """
    for name, value in (body.model_extra or {}).items():
        if name not in neutral:
            if asks_nothing(value):
                continue
            raise InvalidRequestError(f"unknown field {where + name!r}", where + name)
        accepted = neutral[name]
        if value is not None and ... not in accepted and _flat(value) not in accepted:
            instead = INSTEAD.get(name, "leave it out")
            raise InvalidRequestError(f"{where}{name} is not served yet; {instead}", where + name)
