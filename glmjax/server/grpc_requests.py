"""From SglangScheduler's messages to choices, and back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from smg_grpc_proto import sglang_scheduler_pb2 as pb

from glmjax.errors import InvalidRequestError
from glmjax.server.collect import Collected
from glmjax.server.frontend import ChoiceDelta, ChoiceSpec, choices
from glmjax.types import SamplingParams

# Fields that are not served, with the values that ask for nothing. proto3 cannot tell unset from 0.
# Free to be anything: no_stop_trim and spaces_between_special_tokens are about text, which the
# client makes of our ids; require_reasoning is about grammars, which are refused.
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (0, 1),
    "min_p": (0,),
    "min_new_tokens": (0,),
    "logit_bias": ({},),
    "stream_interval": (0, 1),
    "regex": ("",),
    "json_schema": ("",),
    "ebnf_grammar": ("",),
    "structural_tag": ("",),
}
NEUTRAL_REQUEST: dict[str, tuple[Any, ...]] = {
    "return_logprob": (False,),
    "top_logprobs_num": (0,),
    "token_ids_logprob": ([],),
    "return_hidden_states": (False,),
    "custom_logit_processor": ("",),
    "input_embeds": ([],),
    "lora_id": ("",),
}
# Messages and pinned values that must be absent.
ABSENT_REQUEST = ("mm_inputs", "disaggregated_params", "data_parallel_rank")


def specs_of(request: pb.GenerateRequest) -> list[ChoiceSpec]:
    """What to generate.

    Raises:
        InvalidRequestError: something is asked for that is not served or out of its range.
    """
    _check_served(request)
    asked = request.sampling_params
    sampling = SamplingParams(
        max_new_tokens=asked.max_new_tokens if asked.HasField("max_new_tokens") else None,
        temperature=asked.temperature,
        top_k=asked.top_k or -1,
        top_p=asked.top_p or 1.0,
        stop_token_ids=frozenset(asked.stop_token_ids),
        ignore_eos=asked.ignore_eos,
    )
    spec = ChoiceSpec(
        tuple(request.tokenized.input_ids),
        sampling,
        tuple(asked.stop),
        asked.skip_special_tokens,
    )
    return choices(spec, asked.n or 1, seed=None)


def _check_served(request: pb.GenerateRequest) -> None:
    asked = request.sampling_params
    names = [name for name in ABSENT_REQUEST if request.HasField(name)]
    names += [n for n, neutral in NEUTRAL_REQUEST.items() if getattr(request, n) not in neutral]
    names += [n for n, neutral in NEUTRAL_SAMPLING.items() if getattr(asked, n) not in neutral]
    names += ["custom_params"] if asked.custom_params.fields else []
    if names:
        raise InvalidRequestError(f"{', '.join(names)}: not served yet; leave it out", names[0])


def responses(
    request: pb.GenerateRequest, delta: ChoiceDelta, so_far: Collected
) -> Iterator[pb.GenerateResponse]:
    """What to send for a delta: a chunk where the client streams, and the end as a whole."""
    if request.stream and delta.token_ids:
        yield pb.GenerateResponse(
            request_id=request.request_id,
            chunk=pb.GenerateStreamChunk(token_ids=delta.token_ids, **_counts(delta)),
        )
    if delta.finish_reason is not None:
        complete = pb.GenerateComplete(
            output_ids=so_far.token_ids,
            finish_reason=str(delta.finish_reason),
            **_counts(delta),
            **_matched(delta),
        )
        yield pb.GenerateResponse(request_id=request.request_id, complete=complete)


def _counts(delta: ChoiceDelta) -> dict[str, int]:
    return {
        "prompt_tokens": delta.prompt_tokens,
        "completion_tokens": delta.completion_tokens,
        "cached_tokens": delta.cached_tokens,
        "index": delta.index,
    }


def _matched(delta: ChoiceDelta) -> dict[str, Any]:
    if delta.matched is None:
        return {}
    by_text = isinstance(delta.matched, str)
    return {"matched_stop_str" if by_text else "matched_token_id": delta.matched}
