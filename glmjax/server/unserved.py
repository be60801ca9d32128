"""Fields of other servers' APIs that are not served here: named in an error, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from glmjax.errors import InvalidRequestError

# Values besides null with which a field asks for nothing.
Neutral = Mapping[str, tuple[Any, ...]]

SAMPLING: Neutral = {
    "no_stop_trim": (False,),
    "spaces_between_special_tokens": (True, False),
    "stop_regex": ([],),
    "structural_tag": (),
    "custom_params": ({},),
}
OPENAI: Neutral = SAMPLING | {
    "best_of": (1,),
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
COMPLETION: Neutral = OPENAI | {"suffix": ("",)}
GENERATE: Neutral = {
    "token_ids_logprob": ([],),
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
