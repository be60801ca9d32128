"""From SglangScheduler's messages to choices, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from smg_grpc_proto import sglang_scheduler_pb2 as pb

from glmjax.errors import InvalidRequestError
from glmjax.server.choice import ChoiceDelta, ChoiceSpec, choices
from glmjax.server.collect import Collected
from glmjax.server.sampling_fields import logit_bias
from glmjax.server.served import ServedModel
from glmjax.server.sglang.requests import check_start
from glmjax.text.grammar import GrammarSpec
from glmjax.types import SamplingParams, TokenLogprobs

# Fields that are not served, with the values that ask for nothing. proto3 cannot tell unset from 0.
# Free to be anything: no_stop_trim and spaces_between_special_tokens are about text, which the
# client makes of our ids.
NEUTRAL_SAMPLING: dict[str, tuple[Any, ...]] = {
    "stream_interval": (0, 1),
    "structural_tag": ("",),
}
NEUTRAL_REQUEST: dict[str, tuple[Any, ...]] = {
    "token_ids_logprob": ([],),
    "return_hidden_states": (False,),
    "custom_logit_processor": ("",),
    "input_embeds": ([],),
    "lora_id": ("",),
}
# Messages and pinned values that must be absent.
ABSENT_REQUEST = ("mm_inputs", "disaggregated_params", "data_parallel_rank")
# Which kind of grammar a field holds; "" is none.
GRAMMARS: dict[str, Literal["regex", "json_schema", "lark"]] = {
    "regex": "regex",
    "json_schema": "json_schema",
    "ebnf_grammar": "lark",
}


def specs_of(request: pb.GenerateRequest, served: ServedModel) -> list[ChoiceSpec]:
    """What to generate.

    A zero is a field that was not set. `logprob_start_len` is the exception: 0 is the whole prompt,
    as in SGLang, -1 none of it; without `return_logprob` it means nothing.

    Raises:
        InvalidRequestError: something is asked for that is not served or out of its range.
    """
    _check_served(request)
    asked, prompt_ids = request.sampling_params, tuple(request.tokenized.input_ids)
    limit = asked.max_new_tokens if asked.HasField("max_new_tokens") else None
    start = check_start(request.logprob_start_len, prompt_ids) if request.return_logprob else -1
    hidden = limit == 0 and start >= 0  # only the prompt is asked about, but one token is the least
    sampling = SamplingParams(
        max_new_tokens=1 if hidden else limit,
        min_new_tokens=asked.min_new_tokens,
        temperature=asked.temperature,
        top_k=asked.top_k or -1,
        top_p=asked.top_p or 1.0,
        min_p=asked.min_p,
        frequency_penalty=asked.frequency_penalty,
        presence_penalty=asked.presence_penalty,
        repetition_penalty=asked.repetition_penalty or 1.0,
        logit_bias=logit_bias(asked.logit_bias, served),
        stop_token_ids=frozenset(asked.stop_token_ids),
        ignore_eos=asked.ignore_eos,
        logprobs=request.top_logprobs_num if request.return_logprob else None,
        prompt_logprobs_start=start if start >= 0 else None,
    )
    spec = ChoiceSpec(
        prompt_ids,
        sampling,
        tuple(asked.stop),
        asked.skip_special_tokens,
        hidden,
        _grammar(asked),
        thinks=request.require_reasoning,
    )
    return choices(spec, asked.n or 1, seed=None)


def _grammar(asked: pb.SamplingParams) -> GrammarSpec | None:
    field = asked.WhichOneof("constraint")
    value = getattr(asked, field) if field else ""
    return GrammarSpec(GRAMMARS[field], value, field) if field in GRAMMARS and value else None


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
            chunk=pb.GenerateStreamChunk(
                token_ids=delta.token_ids, **_counts(delta), **_logprobs(request, delta)
            ),
        )
    if delta.finish_reason is not None:
        complete = pb.GenerateComplete(
            output_ids=so_far.token_ids,
            finish_reason=str(delta.finish_reason),
            spec_accepted_tokens=delta.accepted_tokens,
            spec_draft_tokens=delta.drafted_tokens,
            **_counts(delta),
            **_matched(delta),
            **_logprobs(request, so_far),
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


def _logprobs(request: pb.GenerateRequest, known: ChoiceDelta | Collected) -> dict[str, Any]:
    """Log probabilities of what is known, the prompt's where it has any."""
    found: dict[str, Any] = {}
    if known.logprobs:
        found["output_logprobs"] = pb.OutputLogProbs(
            token_logprobs=[each.logprob for each in known.logprobs],
            token_ids=known.token_ids,
            top_logprobs=_top(request, known.logprobs),
        )
    if known.prompt_logprobs:
        found["input_logprobs"] = pb.InputLogProbs(
            token_logprobs=[
                pb.InputTokenLogProb(value=each and each.logprob) for each in known.prompt_logprobs
            ],
            token_ids=request.tokenized.input_ids[request.logprob_start_len :],
            top_logprobs=_top(request, known.prompt_logprobs),
        )
    return found


def _top(
    request: pb.GenerateRequest, logprobs: Iterable[TokenLogprobs | None]
) -> list[pb.TopLogProbs]:
    """Of the likeliest in each place; nothing where they were not asked for."""
    tops = [each.top if each else () for each in logprobs if request.top_logprobs_num]
    return [
        pb.TopLogProbs(token_ids=[i for i, _ in top], values=[value for _, value in top])
        for top in tops
    ]
