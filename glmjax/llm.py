"""Generation from Python: one call, or a model kept loaded for many."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from glmjax.build import build
from glmjax.bundled import converted
from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.errors import InvalidRequestError
from glmjax.scheduler.admission import new_token_bound
from glmjax.server.served import ServedModel
from glmjax.text.detokenizer import Detokenizer
from glmjax.text.output import take_output
from glmjax.types import FinishReason, Request, RequestOutput, SamplingParams

Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class Completion:
    """What a prompt gave.

    Attributes:
        text: without the token or stop string that ended it.
        token_ids: all generated tokens.
        finish_reason: why it ended.
        prompt_tokens: length of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


class LLM:
    """A model on a mesh, for many calls. Not thread-safe.

    Args:
        model: a folder that convert/hf_to_orbax.py wrote; None: glm-nano, a tiny model that comes
            with glmjax.
        mesh: "8" or 8 (tensor parallel), or "2x4" (data groups x tensor parallel).
        dtype: "bfloat16" or "float32"; None: the checkpoint's.
        cache, scheduler: pool and queue sizes; None: defaults.

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
    ):
        scheduler = scheduler or SchedulerConfig()
        devices = MeshConfig.parse(mesh)
        folder = converted(devices.size) if model is None else model
        self._engine, self._served = build(folder, devices, dtype, cache, scheduler)
        self._queue_limit = scheduler.max_queued_requests

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
        progress: bool = False,
        **sampling: Any,
    ) -> Completion | list[Completion]:
        """Continue prompts, all of them at once.

        Args:
            prompts: a string, chat messages or token ids; or a list of such prompts.
            stop: strings that end the text, which does not hold them.
            chat_template_kwargs: what the chat template may read, such as enable_thinking.
            progress: show a bar of finished prompts.
            sampling: fields of `SamplingParams`; what is missing comes from the model's
                generation config. Without a seed, sampled output differs from call to call.

        Returns:
            A Completion for one prompt, a list in order for a list of prompts.

        Raises:
            InvalidRequestError: a prompt or parameter that cannot be served; nothing has run then.
        """
        one, batch = as_batch(prompts)
        params = self._params(sampling)
        stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if "" in stops:
            raise InvalidRequestError("stop holds an empty string, which would end at once", "stop")
        requests = [
            Request(str(i), tuple(self._encode(prompt, chat_template_kwargs or {})), params)
            for i, prompt in enumerate(batch)
        ]
        for request in requests:
            self._served.check_prompt(request.prompt_ids)
            new_token_bound(request, self._engine.limits)
        results = self._run(requests, stops, progress)
        return results[0] if one else results

    def update_params(self, params: Any) -> None:
        """Generate with other weights of the same model from now on; nothing is compiled.

        Args:
            params: the main model's parameter tree, as a trainer holds it or as
                `glmjax.runner.weights.load` returns it: float arrays of any dtype, on any devices.

        Raises:
            ConfigError: a tree of another model, or of FP8 weights where these are not or the
                other way round; the old weights stay.
        """
        self._engine.update_params(params)

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
        self, requests: list[Request], stops: tuple[str, ...], progress: bool
    ) -> list[Completion]:
        live = {r.id: _Answer(Detokenizer(self._served.tokenizer, stops)) for r in requests}
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
                        completion = live[output.request_id].take(output)
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

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._text: list[str] = []
        self._token_ids: list[int] = []

    def take(self, output: RequestOutput) -> Completion | None:
        """Take an output; the completion once it is whole."""
        delta = take_output(self._detokenizer, output)
        self._text.append(delta.text)
        self._token_ids += delta.token_ids
        if delta.finish_reason is None:
            return None
        ids = tuple(self._token_ids)
        return Completion("".join(self._text), ids, delta.finish_reason, output.prompt_tokens)


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
    **options: Any,
) -> Completion | list[Completion]:
    """Load a model, continue prompts, let the model go. `LLM` keeps it for more.

    Args:
        prompts: a string, chat messages or token ids; or a list of such prompts.
        model, mesh, dtype: as for `LLM`.
        options: as for `LLM.generate`, such as max_new_tokens=64, temperature=0, stop="\n".

    Returns:
        A Completion for one prompt, a list in order for a list of prompts.
    """
    return LLM(model, mesh, dtype).generate(prompts, **options)
