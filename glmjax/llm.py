"""Generation from Python: one call, or a model kept loaded for many."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from tqdm import tqdm

from glmjax.build import build
from glmjax.bundled import converted
from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.engine import Engine
from glmjax.errors import (
    EngineStoppedError,
    InvalidRequestError,
    RequestFailedError,
)
from glmjax.scheduler.admission import new_token_bound
from glmjax.server.served import ServedModel
from glmjax.server.tool_fields import Toolset, toolset
from glmjax.text.detokenizer import Detokenizer
from glmjax.text.grammar import GrammarSpec
from glmjax.text.output import AnswerDelta, take_output, text_of
from glmjax.text.parts import Message, Part, message
from glmjax.text.reader import AnswerReader, Reader, Reading, TextReader
from glmjax.types import (
    Constraint,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)

ChatMessage = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[ChatMessage]

THINKING_END = "</think>"


@dataclass(frozen=True)
class Completion:
    """What a prompt gave. How it was computed plays no part when two are compared.

    Attributes:
        text: without the token or stop string that ended it.
        token_ids: all generated tokens.
        finish_reason: why it ended.
        prompt_tokens: length of the prompt.
        message: of the answer to chat messages its thought, content and tool calls; else None.
        logprobs: one for each of `token_ids`, where they were asked for.
        prompt_logprobs: of the prompt tokens from `prompt_logprobs_start` on, None in place of the
            very first token.
        cached_tokens: prompt tokens whose KV was there from an earlier prompt.
        drafted_tokens, accepted_tokens: drafts that were verified, and that were accepted.
        weight_version: of the weights that computed its last tokens.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    message: Message | None = field(default=None, compare=False)
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    cached_tokens: int = field(default=0, compare=False)
    drafted_tokens: int = field(default=0, compare=False)
    accepted_tokens: int = field(default=0, compare=False)
    weight_version: str = field(default="default", compare=False)


class LLM:
    """A model on a mesh, for many calls. Not thread-safe. `with LLM() as llm:` closes it.

    Args:
        model: a folder that convert/hf_to_orbax.py wrote; None: glm-nano, a tiny model that comes
            with glmjax.
        mesh: "8" or 8 (tensor parallel), or "2x4" (data groups x tensor parallel).
        dtype: "bfloat16" or "float32"; None: the checkpoint's.
        cache, scheduler: pool and queue sizes, and the KV's dtype; None: as `serve.py` has them.
        kernels: how operations are computed: "auto", "ref", "triton" or "mosaic".
        expert_parallel: whole experts on each device of a group, rather than a part of every
            expert's width.

    Raises:
        ConfigError, CheckpointError: as `glmjax.build.build`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        mesh: str | int = 1,
        dtype: str | None = None,
        cache: CacheConfig | None = None,
        scheduler: SchedulerConfig | None = None,
        kernels: str = "auto",
        expert_parallel: bool = False,
    ):
        devices = MeshConfig.parse(mesh, expert_parallel=expert_parallel)
        folder = converted(devices.size) if model is None else model
        self._open_engine: Engine | None
        self._open_engine, self._served = build(
            folder, devices, dtype, cache, scheduler, kernels=kernels
        )
        self._queue_limit = (scheduler or SchedulerConfig()).max_queued_requests

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the weights and the KV pool go. Only `served` is of use afterwards."""
        self._open_engine = None

    @property
    def served(self) -> ServedModel:
        """Tokenizer, chat template and sizes of the model."""
        return self._served

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        stop: str | Sequence[str] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        progress: bool = False,
        json_schema: dict[str, Any] | str | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        choice: str | Sequence[str] | None = None,
        after_thinking: bool = False,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Continue prompts, all of them at once.

        At most one of `json_schema`, `regex`, `grammar` and `choice` says what may come.

        Args:
            prompts: a string, chat messages or token ids; or a list of such prompts.
            stop: strings that end the text, which does not hold them. In the answer to chat
                messages they mean nothing in thoughts and calls.
            chat_template_kwargs: what the chat template may read, such as enable_thinking.
            tools: that the model may call in answer to chat messages, as in OpenAI's API;
                `Completion.message` has the calls. Strict ones hold calls to their schemas, and a
                grammar is then of the answer behind the thought, and allows calls instead.
            progress: show a bar of finished prompts.
            json_schema: each answer is JSON that this schema, or JSON text of one, allows.
            regex: each answer matches this as a whole.
            grammar: each answer is one of this Lark grammar.
            choice: each answer is one of these strings.
            after_thinking: that holds for what follows the thought, with which an answer then
                begins unless the prompt says that it has ended.
            sampling: fields of `SamplingParams`; what is missing comes from the model's
                generation config. Without a seed, sampled output differs from call to call.

        Returns:
            A Completion for one prompt, a list in order for a list of prompts.

        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served; nothing has run then.
            RequestFailedError: the engine could not finish a prompt.
            EngineStoppedError: the model was closed, or its engine has failed.
        """
        one, batch = as_batch(prompts)
        params = self._params(sampling)
        spec = _grammar(json_schema, regex, grammar, choice)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in stops:
            raise InvalidRequestError("stop holds an empty string, which would end at once", "stop")
        if tools and not all(map(is_chat, batch)):
            raise InvalidRequestError("tools go with chat messages only", "tools")
        toolbox = toolset(tools, None, None, self._served)
        spec, thinks = toolbox.grammar(spec, self._served), after_thinking or bool(tools)
        kwargs = {"tools": list(tools) if tools else None} | dict(chat_template_kwargs or {})
        encoded = [tuple(self._encode(prompt, kwargs)) for prompt in batch]
        requests = [
            Request(str(i), ids, params, self._constraint(spec, ids, thinks))
            for i, ids in enumerate(encoded)
        ]
        for request in requests:
            self._served.check_prompt(request.prompt_ids)
            new_token_bound(request, self._engine.limits)
        answers = {
            request.id: _Answer(self._served, request, stops, toolbox if is_chat(prompt) else None)
            for request, prompt in zip(requests, batch, strict=True)
        }
        results = self._run(requests, answers, progress)
        return results[0] if one else results

    def update_params(self, params: Any, version: str | None = None) -> None:
        """Generate with other weights of the same model from now on; nothing is compiled.

        Args:
            params: the main model's parameter tree, as a trainer holds it or as
                `glmjax.runner.weights.load` returns it: float arrays of any dtype, on any devices.
            version: what `Completion.weight_version` calls them; None: a name of the engine's.

        Raises:
            ConfigError: a tree of another model, or of FP8 weights where these are not or the
                other way round; the old weights stay.
            EngineStoppedError: the model was closed, or its engine has failed.
        """
        self._engine.update_params(params, version)

    def flush_cache(self) -> None:
        """Forget the KV of all earlier prompts. Raises EngineStoppedError as `generate` does."""
        self._engine.flush_cache()

    @property
    def _engine(self) -> Engine:
        if self._open_engine is None:
            raise EngineStoppedError("this LLM was closed; make a new one")
        return self._open_engine

    def _constraint(
        self, spec: GrammarSpec | None, prompt_ids: Sequence[int], after_thinking: bool
    ) -> Constraint | None:
        if spec and after_thinking and self._served.tokenizer.find(THINKING_END) is None:
            raise InvalidRequestError(
                f"{self._served.name} has no token {THINKING_END}: it does not think; leave "
                "after_thinking out",
                "after_thinking",
            )
        return self._served.constraint(spec, prompt_ids, after_thinking)

    def _params(self, sampling: Mapping[str, Any]) -> SamplingParams:
        unknown = sampling.keys() - SamplingParams.__dataclass_fields__.keys()
        if unknown:
            known = ", ".join(SamplingParams.__dataclass_fields__)
            raise InvalidRequestError(
                f"unknown sampling parameter(s) {', '.join(sorted(unknown))}; known: {known}"
            )
        return self._served.sampling(**({"seed": secrets.randbits(32)} | dict(sampling)))

    def _encode(self, prompt: Prompt, template_kwargs: Mapping[str, Any]) -> Sequence[int]:
        if isinstance(prompt, str):
            return self._served.tokenizer.encode(prompt)
        if is_chat(prompt):
            return self._served.chat_prompt(prompt, **template_kwargs)  # pyright: ignore
        return prompt  # pyright: ignore

    def _run(
        self, requests: list[Request], answers: Mapping[str, _Answer], progress: bool
    ) -> list[Completion]:
        waiting = requests[::-1]
        done: dict[str, Completion] = {}
        with tqdm(total=len(requests), unit="prompt", disable=not progress) as bar:
            try:
                while len(done) < len(requests):
                    while waiting and self._engine.load().waiting < self._queue_limit:
                        self._engine.add(waiting.pop())
                    for output in self._engine.step():
                        if output.request_id in done:
                            continue  # ended by a stop string, seen here before the engine
                        completion = answers[output.request_id].take(output)
                        if completion:
                            done[output.request_id] = completion
                            self._engine.abort(output.request_id)
                            bar.update()
            finally:
                self._settle(requests)
        return [done[request.id] for request in requests]

    def _settle(self, requests: list[Request]) -> None:
        """Leave the engine idle, also after an error or Ctrl-C."""
        for request in requests:
            self._engine.abort(request.id)
        while self._engine.has_work():
            self._engine.step()


class _Answer:
    """Joins the outputs of one request until it ends, by itself or by a stop string."""

    def __init__(
        self, served: ServedModel, request: Request, stops: tuple[str, ...], tools: Toolset | None
    ):
        self._tokenizer, self._taken_apart = served.tokenizer, tools is not None
        self._reader: Reader = TextReader(Detokenizer(served.tokenizer, stops))
        if tools is not None:
            opening = served.opening(request.prompt_ids)
            reading = Reading(tools.schemas)
            self._reader = AnswerReader(served.tokenizer, reading, opening, stops)
        self._parts: list[Part] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    def take(self, output: RequestOutput) -> Completion | None:
        """Take an output; the completion once it is whole. Raises RequestFailedError."""
        if output.error is not None:
            raise RequestFailedError(f"prompt {output.request_id}: {output.error}")
        delta = take_output(self._reader, output)
        self._parts += delta.parts
        self._token_ids += delta.token_ids
        self._logprobs += delta.logprobs
        self._prompt_logprobs += output.prompt_logprobs
        if delta.finish_reason is None:
            return None
        return self._whole(delta, delta.finish_reason, output)

    def _text(self, matched: str | int | None) -> str:
        """All of the text, tags and all."""
        if not self._taken_apart:
            return text_of(self._parts)
        ids = self._token_ids[:-1] if isinstance(matched, int) else self._token_ids
        text = self._tokenizer.decode(ids)
        return text[: text.rindex(matched)] if isinstance(matched, str) else text

    def _whole(
        self, delta: AnswerDelta, finish_reason: FinishReason, last: RequestOutput
    ) -> Completion:
        return Completion(
            text=self._text(delta.matched),
            token_ids=tuple(self._token_ids),
            finish_reason=finish_reason,
            prompt_tokens=last.prompt_tokens,
            message=message(self._parts) if self._taken_apart else None,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            cached_tokens=last.cached_tokens,
            drafted_tokens=last.drafted_tokens,
            accepted_tokens=last.accepted_tokens,
            weight_version=last.weight_version,
        )


def _grammar(
    json_schema: dict[str, Any] | str | None,
    regex: str | None,
    grammar: str | None,
    choice: str | Sequence[str] | None,
) -> GrammarSpec | None:
    """The one that is given, or None. Raises InvalidRequestError when several are."""
    choices = (choice,) if isinstance(choice, str) else choice and tuple(choice)
    specs = (
        GrammarSpec("json_schema", json_schema, "json_schema"),
        GrammarSpec("regex", regex, "regex"),
        GrammarSpec("lark", grammar, "grammar"),
        GrammarSpec("choice", choices, "choice"),
    )
    given = [spec for spec in specs if spec.value is not None]
    if len(given) > 1:
        names = " and ".join(str(spec.param) for spec in given)
        raise InvalidRequestError(f"{names} are given, expected at most one of them")
    return given[0] if given else None


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of chat messages."""
    listed = isinstance(prompt, list | tuple) and bool(prompt)
    return listed and all(isinstance(message, Mapping) for message in prompt)


def is_prompt(value: Any) -> bool:
    """Whether a value is one prompt: a string, chat messages, or token ids."""
    if isinstance(value, str) or is_chat(value):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(map(is_token_id, value))


def is_token_id(value: Any) -> bool:
    """Whether a value can be a token id."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def as_batch(prompts: Any) -> tuple[bool, list[Any]]:
    """Whether `prompts` is one prompt, and the list of prompts.

    Raises:
        InvalidRequestError: it is neither a prompt nor a list of prompts.
    """
    if is_prompt(prompts):
        return True, [prompts]
    if isinstance(prompts, list | tuple) and all(map(is_prompt, prompts)):
        return False, list(prompts)
    raise InvalidRequestError(
        "prompts must be a string, chat messages, token ids, or a list of those", "prompts"
    )


def generate(
    prompts: Prompt | Sequence[Prompt],
    model: str | Path | None = None,
    *,
    mesh: str | int = 1,
    dtype: str | None = None,
    expert_parallel: bool = False,
    **options: Any,
) -> Completion | list[Completion]:
    """Load a model, continue prompts, let the model go. `LLM` keeps it for more.

    Args:
        prompts: a string, chat messages or token ids; or a list of such prompts.
        model, mesh, dtype, expert_parallel: as for `LLM`.
        options: as for `LLM.generate`, such as max_new_tokens=64, temperature=0, stop="\n".

    Returns:
        A Completion for one prompt, a list in order for a list of prompts.
    """
    with LLM(model, mesh, dtype, expert_parallel=expert_parallel) as llm:
        return llm.generate(prompts, **options)
