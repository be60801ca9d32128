"""Fields of other servers' APIs that are not served here: named in an error, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from glmjax.errors import InvalidRequestError

# Values besides null with which a field asks for nothing.
Neutral = Mapping[str, tuple[Any, ...]]

SAMPLING: Neutral = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "logit_bias": ({},),
    "no_stop_trim": (False,),
    "spaces_between_special_tokens": (True, False),
    "stop_regex": ([],),
    "regex": (),
    "ebnf": (),
    "json_schema": (),
    "structural_tag": (),
    "custom_params": ({},),
}
OPENAI: Neutral = SAMPLING | {
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "return_hidden_states": (False,),
    "lora_path": (),
    "store": (False,),
    # these change nothing that is generated
    "user": (...,),
    "metadata": (...,),
    "safety_identifier": (...,),
    "prompt_cache_key": (...,),
    "service_tier": (...,),
}
CHAT: Neutral = OPENAI | {
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "continue_final_message": (False,),
    "separate_reasoning": (False,),
}
COMPLETION: Neutral = OPENAI | {"logprobs": (), "echo": (False,), "suffix": ("",)}
GENERATE: Neutral = {
    "return_logprob": (False, [False]),
    "logprob_start_len": (-1,),
    "top_logprobs_num": (0,),
    "token_ids_logprob": ([],),
    "return_text_in_logprobs": (True, False),
    "return_hidden_states": (False,),
    "input_embeds": ([],),
    "image_data": ([],),
    "audio_data": ([],),
    "video_data": ([],),
    "lora_path": (),
    "custom_logit_processor": (),
    "log_metrics": (True, False),
}


def check_extra(body: BaseModel, neutral: Neutral, where: str = "") -> None:
    """Refuse fields that `body`'s model does not have, unless they ask for nothing.

    Args:
        body: a model with `extra="allow"`.
        neutral: accepted values by field; `...` accepts any.
        where: the field that holds `body`, with its dot.

    Raises:
        InvalidRequestError: it names the field.
    """
    for name, value in (body.model_extra or {}).items():
        if name not in neutral:
            raise InvalidRequestError(f"unknown field {where}{name}", where + name)
        accepted = neutral[name]
        if value is not None and ... not in accepted and value not in accepted:
            raise InvalidRequestError(
                f"{where}{name} is not served yet; leave it out", where + name
            )
