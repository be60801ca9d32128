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
    "prompt_cache_retention": (...,),
    "prompt_cache_options": (...,),
}
CHAT: Neutral = OPENAI | {
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("low", "medium", "high"),  # changes nothing, as on /v1/responses
    "moderation": (),
    "include_reasoning": (True,),
    "do_sample": (True,),
    "tool_stream": (...,),  # arguments are streamed anyway
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
# What to do rather than to leave a field out.
INSTEAD = {
    "functions": "send them as tools",
    "function_call": "say it with tool_choice, of tools",
    "include_reasoning": "read the content alone, or switch thinking off",
    "do_sample": "set temperature 0",
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
            raise InvalidRequestError(f"unknown field {where + name!r}", where + name)
        accepted = neutral[name]
        if value is not None and ... not in accepted and value not in accepted:
            instead = INSTEAD.get(name, "leave it out")
            raise InvalidRequestError(f"{where}{name} is not served yet; {instead}", where + name)
