"""SGLang's own HTTP API: /generate, tokenizing, health, information."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from glmjax.server import unserved
from glmjax.server.choice import ChoiceSpec
from glmjax.server.collect import Collected, collect
from glmjax.server.draft_words import draft_words
from glmjax.server.engine_thread import EngineState
from glmjax.server.frontend import Generation
from glmjax.server.http.context import FrontendOf
from glmjax.server.http.json_body import JsonRoute
from glmjax.server.http.json_response import JSONResponse
from glmjax.server.http.streams import DONE, EventStream, event, until_disconnect
from glmjax.server.info import VERSION, server_info
from glmjax.server.logprob_words import native_words
from glmjax.server.sampling_fields import spelled
from glmjax.server.served import ServedModel
from glmjax.server.sglang.requests import (
    TOKENS,
    AbortRequest,
    DetokenizeRequest,
    GenerateRequest,
    TokenizeRequest,
)
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import FinishReason

router = APIRouter(route_class=JsonRoute)


@router.put("/generate", include_in_schema=False)
@router.post("/generate")
async def generate(body: GenerateRequest, request: Request, frontend: FrontendOf) -> Response:
    """Continue text or token ids, one or many; a stream repeats all of the text in each event."""
    unserved.check_extra(body, unserved.GENERATE)
    served = frontend.served
    with spelled(body.spelling):
        specs, batch = await asyncio.to_thread(_specs, body, served)
        generation = await frontend.generate(body.rid or secrets.token_hex(16), specs)
    many, texts = batch or len(specs) > 1, bool(body.return_text_in_logprobs)
    answer = Answer(generation.id, specs, many, served.tokenizer, texts)
    if body.stream:
        return EventStream(generation, answer.events(generation))
    async with generation:
        choices = await until_disconnect(request.receive, collect(generation))
    return JSONResponse(answer.whole(choices))


def _specs(body: GenerateRequest, served: ServedModel) -> tuple[list[ChoiceSpec], bool]:
    prompts, batch = body.prompts(served)
    return body.choices(prompts, served), batch


@dataclass(frozen=True)
class Answer:
    """Words for one request's answer.

    Attributes:
        rid: the request's id.
        specs: its choices.
        many: the answer is a list, though perhaps of one.
        tokenizer: the model's.
        texts: log probabilities come with the tokens' texts.
    """

    rid: str
    specs: list[ChoiceSpec]
    many: bool
    tokenizer: Tokenizer
    texts: bool

    def whole(self, choices: list[Collected]) -> Any:
        """Everything at once."""
        answers = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return answers if self.many else answers[0]

    async def events(self, generation: Generation) -> AsyncIterator[bytes]:
        """All that is known of a choice, again and again."""
        choices = [Collected() for _ in self.specs]
        async for delta in generation:
            choices[delta.index].add(delta)
            where = {"index": delta.index} if self.many else {}
            yield event(self._choice(delta.index, choices[delta.index]) | where)
        yield DONE

    def _choice(self, index: int, choice: Collected) -> dict[str, Any]:
        last = choice.last
        meta = {
            "id": f"{self.rid}-{index}" if self.many else self.rid,
            "finish_reason": _finish(choice),
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
        words = meta | self._logprobs(self.specs[index], choice)
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
            words |= native_words(self.tokenizer, kind, ids, logprobs, top > 0, self.texts)
        return words


def _finish(choice: Collected) -> dict[str, Any] | None:
    reason, matched = choice.last.finish_reason, choice.last.matched
    details: dict[FinishReason, dict[str, Any]] = {
        FinishReason.STOP: {"matched": matched},
        FinishReason.LENGTH: {"length": choice.last.completion_tokens},
        FinishReason.ABORT: {"message": "aborted"},
    }
    return None if reason is None else {"type": reason, **details[reason]}


@router.post("/abort_request")
async def abort_request(body: AbortRequest, frontend: FrontendOf) -> Response:
    """End a request early, by the id it came with or was given."""
    return JSONResponse({"aborted": frontend.abort(body.rid)})


@router.post("/tokenize")
@router.post("/v1/tokenize", include_in_schema=False)
async def tokenize(body: TokenizeRequest, frontend: FrontendOf) -> Response:
    """Token ids of a text, of each of several, or of a conversation. None is added to a text."""
    served = frontend.served
    body.check_model(served)
    ids = await asyncio.to_thread(body.ids, served)
    many = isinstance(body.prompt, list)
    count = [len(each) for each in cast("list[list[int]]", ids)] if many else len(ids)
    return JSONResponse({"tokens": ids, "count": count, "max_model_len": served.max_seq_len})


@router.post("/detokenize")
@router.post("/v1/detokenize", include_in_schema=False)
async def detokenize(body: DetokenizeRequest, frontend: FrontendOf) -> Response:
    """Text of token ids, or of each of several lists."""
    served = frontend.served
    body.check_model(served)
    one = not body.tokens or isinstance(body.tokens[0], int)
    lists = cast("list[list[int]]", [body.tokens] if one else body.tokens)
    with spelled(TOKENS):
        for ids in lists:
            served.check_prompt(ids)
    decode = served.tokenizer.decode
    texts = await asyncio.to_thread(lambda: [decode(x, body.skip_special_tokens) for x in lists])
    return JSONResponse({"text": texts[0] if one else texts})


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


@router.get("/get_server_info")
async def get_server_info(frontend: FrontendOf) -> Response:
    """What is served, within which limits, and how busy it is."""
    return JSONResponse(server_info(frontend) | {"version": VERSION})
