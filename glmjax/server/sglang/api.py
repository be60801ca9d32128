"""SGLang's own HTTP API: /generate, tokenizing, health, information."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.server import unserved
from glmjax.server.choice import ChoiceSpec
from glmjax.server.collect import Collected, collect
from glmjax.server.draft_words import draft_words
from glmjax.server.engine_thread import EngineState
from glmjax.server.frontend import ABORTED, Generation
from glmjax.server.http.context import FrontendOf, TimesOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.http.streams import DONE, EventStream, event, until_disconnect
from glmjax.server.info import VERSION, load_numbers, model_info, server_info
from glmjax.server.logprob_words import native_words, token_name
from glmjax.server.sampling_fields import spelled
from glmjax.server.served import END_THINK, THINK, ServedModel
from glmjax.server.sglang.requests import (
    TOKENS,
    AbortRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
    numbered,
)
from glmjax.text.thinking import Phase
from glmjax.types import FinishReason

router = APIRouter(route_class=JsonRoute)


@router.put("/generate", include_in_schema=False)
@router.post("/generate")
async def generate(body: GenerateRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue text or token ids, one or many; a stream repeats all of the text in each event."""
    served = frontend.served
    served.check_name(body.model)
    unserved.check_extra(body, unserved.GENERATE)
    rid = (isinstance(body.rid, str) and body.rid) or secrets.token_hex(16)
    with spelled(body.spelling):
        specs, many = await asyncio.to_thread(_specs, body, served)
        generation = await frontend.generate(rid, numbered(specs, rid) if many else specs)
    answer = Answer(generation, many, served, bool(body.return_text_in_logprobs))
    if body.stream:
        return EventStream(generation, answer.events(generation))
    async with generation:
        choices = await until_disconnect(request.receive, collect(generation))
    return JSONResponse(answer.whole(choices))


def _specs(body: GenerateRequest, served: ServedModel) -> tuple[list[ChoiceSpec], bool]:
    """The choices, and whether the answer is a list, though perhaps of one."""
    prompts, batch = body.prompts(served)
    specs = body.choices(prompts, served)
    return specs, batch or len(specs) > 1


@dataclass(frozen=True)
class Answer:
    """Words for one request's answer.

    Attributes:
        generation: the request under way.
        many: the answer is a list, though perhaps of one.
        served: the model.
        texts: log probabilities come with the tokens' texts.
    """

    generation: Generation
    many: bool
    served: ServedModel
    texts: bool

    def whole(self, choices: list[Collected]) -> Any:
        """Everything at once."""
        answers = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return answers if self.many else answers[0]

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """All that is known of a choice, again and again."""
        choices = [Collected() for _ in generation.specs]
        async for delta in generation:
            choices[delta.index].add(delta)
            where = {"index": delta.index} if self.many else {}
            yield event(self._choice(delta.index, choices[delta.index]) | where)
        yield DONE

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        last, spec = choice.last, self.generation.specs[index]
        meta = {
            "id": spec.rid or self.generation.id,
            "finish_reason": _finish(choice, self.generation.why),
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.completion_tokens,
            "cached_tokens": last.cached_tokens,
            "weight_version": last.weight_version,
            "spec_accept_token_num": last.accepted_tokens,
            "spec_draft_token_num": last.drafted_tokens,
        }
        drafts = draft_words([last.accept_lengths])
        if drafts:
            meta["spec_verify_ct"] = drafts["verifications"]
            meta["spec_accept_length"] = drafts["mean_accepted_length"]
            meta["spec_acceptance"] = drafts["acceptance"]
        if last.finish_reason is not None:
            meta["e2e_latency"] = time.monotonic() - self.generation.begun_s
            ended = isinstance(last.matched, int)  # by a token, which is no part of what it ended
            ids = choice.token_ids[:-1] if ended else choice.token_ids
            meta["reasoning_tokens"] = _thought_tokens(spec, ids, self.served)
        words = meta | self._logprobs(spec, choice)
        return {"text": choice.text, "output_ids": choice.token_ids, "meta_info": words}

    def _logprobs(self, spec: ChoiceSpec, choice: Collected) -> dict[str, Any]:
        top, start = spec.sampling.logprobs, spec.sampling.prompt_logprobs_start
        if top is None:
            return {}
        prompt_ids = () if start is None else spec.prompt_ids[start:]
        words: dict[str, Any] = {}
        for kind, ids, logprobs in (
            ("input", prompt_ids, choice.prompt_logprobs),
            ("output", choice.token_ids, choice.logprobs),
        ):
            words |= native_words(self.served.tokenizer, kind, ids, logprobs, top > 0, self.texts)
        return words


def _thought_tokens(spec: ChoiceSpec, ids: Sequence[int], served: ServedModel) -> int:
    """How many tokens of a text stand between the tags of its first thought."""
    think, end = served.tokenizer.find(THINK), served.tokenizer.find(END_THINK)
    phase = served.phase(spec.prompt_ids, thinks=True)
    if phase is Phase.ANSWER or (phase is Phase.BEFORE and think not in ids):
        return 0
    begin = 0 if phase is Phase.THOUGHT else ids.index(cast("int", think)) + 1
    rest = ids[begin:]
    return rest.index(end) if end in rest else len(rest)


def _finish(choice: Collected, why: str) -> dict[str, Any] | None:
    reason, matched = choice.last.finish_reason, choice.last.matched
    details: dict[FinishReason, dict[str, Any]] = {
        FinishReason.STOP: {"matched": matched},
        FinishReason.LENGTH: {"length": choice.last.completion_tokens},
        FinishReason.ABORT: {"message": why},
    }
    return None if reason is None else {"type": reason, **details[reason]}


@router.post("/abort_request")
async def abort_request(body: AbortRequest, frontend: FrontendOf) -> Response:
    """End early a request, or one answer of several, by the id it came with or was given; or all.

    Answers that are ended so say `abort_message`.
    """
    why = body.abort_message or ABORTED
    found = frontend.abort_all(why) if body.abort_all else frontend.abort(body.rid or "", why)
    return JSONResponse({"aborted": found})


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, frontend: FrontendOf) -> Response:
    """Token ids of a text, of each of several, or of a conversation. None is added to a text."""
    served = frontend.served
    served.check_name(body.model)
    ids = await asyncio.to_thread(body.ids, served)
    many = isinstance(body.prompt, list)
    count = [len(each) for each in cast("list[list[int]]", ids)] if many else len(ids)
    words = {"tokens": ids, "count": count, "max_model_len": served.max_seq_len}
    texts = {"token_strs": _texts(ids, served)} if body.return_token_strs else {}
    return JSONResponse(words | texts)


def _texts(ids: list[Any], served: ServedModel) -> list[Any]:
    """The text of each token id, in lists of lists too."""
    return [
        _texts(each, served) if isinstance(each, list) else token_name(served.tokenizer, each)
        for each in ids
    ]


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, frontend: FrontendOf) -> Response:
    """Text of token ids, or of each of several lists."""
    served = frontend.served
    served.check_name(body.model)
    one = not body.tokens or isinstance(body.tokens[0], int)
    lists = cast("list[list[int]]", [body.tokens] if one else body.tokens)
    with spelled(TOKENS):
        for ids in lists:
            served.check_prompt(ids)
    decode = served.tokenizer.decode
    texts = await asyncio.to_thread(lambda: [decode(x, body.skip_special_tokens) for x in lists])
    return JSONResponse({"text": texts[0] if one else texts})


@router.head("/health", include_in_schema=False)
@router.get("/health")
async def health(frontend: FrontendOf) -> Response:
    """200 while requests are taken, else 503."""
    state = frontend.engine.state
    return JSONResponse({"status": state}, 200 if state is EngineState.RUNNING else 503)


@router.get("/health_generate")
async def health_generate(frontend: FrontendOf, request: Request) -> Response:
    """200 once a token was generated."""
    sampling = frontend.served.sampling(max_new_tokens=1, temperature=0.0)
    spec = ChoiceSpec((frontend.served.eos_token_ids[:1] or (0,)), sampling)
    async with await frontend.generate(f"health-{secrets.token_hex(8)}", [spec]) as generation:
        await until_disconnect(request.receive, collect(generation))
    return JSONResponse({"status": frontend.engine.state})


@router.get("/server_info", include_in_schema=False)
@router.get("/get_server_info")
async def get_server_info(frontend: FrontendOf, times: TimesOf) -> Response:
    """What is served, within which limits, and how busy it is."""
    return JSONResponse(server_info(frontend, times) | {"version": VERSION})


@router.get("/model_info", include_in_schema=False)
@router.get("/get_model_info")
async def get_model_info(frontend: FrontendOf) -> Response:
    """What is served."""
    return JSONResponse(model_info(frontend))


@router.get("/v1/loads")
async def loads(frontend: FrontendOf) -> Response:
    """How busy the server is. It is one rank: its data groups share one queue."""
    now = datetime.now(UTC).isoformat()
    load = {"dp_rank": 0} | load_numbers(frontend)
    return JSONResponse({"timestamp": now, "version": VERSION, "loads": [load]})


@router.get("/get_load")
async def get_load(frontend: FrontendOf) -> Response:
    """The same in the words of older clients."""
    load = load_numbers(frontend)
    requests = {"num_reqs": load["num_total_reqs"], "num_waiting_reqs": load["num_waiting_reqs"]}
    return JSONResponse([{"dp_rank": 0} | requests | {"num_tokens": load["num_used_tokens"]}])
