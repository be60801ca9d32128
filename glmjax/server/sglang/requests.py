"""Requests of SGLang's own HTTP API."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from glmjax.errors import InvalidRequestError
from glmjax.server import unserved
from glmjax.server.choice import MAX_CHOICES, ChoiceSpec
from glmjax.server.openai.requests import ChatRequest, Thinking
from glmjax.server.sampling_fields import SamplingFields, check_total, deadline
from glmjax.server.served import ServedModel

# Clients' names of what errors may be about.
SPELLING = {
    "max_tokens": "max_new_tokens",
    "logprobs": "top_logprobs_num",
    "prompt_logprobs_start": "logprob_start_len",
    "request_id": "rid",
}
# The same for /detokenize.
TOKENS = {"prompt": "tokens", "the prompt": "tokens"}


class NativeSampling(SamplingFields):
    """`sampling_params` of /generate."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    max_new_tokens: int | None = 128
    min_new_tokens: int | None = None
    seed: int | None = Field(default=None, validation_alias=AliasChoices("sampling_seed", "seed"))


class GenerateRequest(BaseModel):
    """POST /generate: one prompt or several, as text or as token ids.

    What may be a list has an entry for each prompt then. Log probabilities are asked for by
    `return_logprob`; without it the fields that go with it mean nothing. Of several answers each
    has an id of its own: its entry of `rid`, or that and its place.
    """

    model_config = ConfigDict(extra="allow")

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    return_text_in_logprobs: bool | None = None
    stream: bool | None = None
    rid: str | list[str] | None = None
    model: str | None = None
    priority: int | None = None
    timeout: float | None = None

    @property
    def spelling(self) -> dict[str, str]:
        """The client's names of what errors may be about."""
        return SPELLING | {"prompt": "text" if self.input_ids is None else "input_ids"}

    def prompts(self, served: ServedModel) -> tuple[list[list[int]], bool]:
        """Token ids of each prompt, and whether the request is a batch.

        Raises:
            InvalidRequestError: text and input_ids are both given, or neither, or are empty.
        """
        given = self.text if self.input_ids is None else self.input_ids
        if (self.text is None) == (self.input_ids is None) or not given:
            raise InvalidRequestError("give either text or input_ids, and not an empty one", "text")
        batch = isinstance(given, list) and not isinstance(given[0], int)
        prompts: list[Any] = list(given) if batch else [given]
        texts = [p for p in prompts if isinstance(p, str)]
        return (served.tokenizer.encode_batch(texts) if texts else prompts), batch

    def choices(self, prompts: Sequence[list[int]], served: ServedModel) -> list[ChoiceSpec]:
        """What to generate: the choices of a prompt side by side.

        Raises:
            InvalidRequestError: a value is out of its range, or a list of another length.
        """
        samplings = self._each("sampling_params", len(prompts), NativeSampling())
        asked = self._each("return_logprob", len(prompts), False)
        starts = self._each("logprob_start_len", len(prompts), -1)
        tops = self._each("top_logprobs_num", len(prompts), 0)
        check_total(sum(min(sampling.n or 1, MAX_CHOICES) for sampling in samplings))
        rows = zip(prompts, samplings, asked, starts, tops, strict=True)
        each = [self._choices(served, *row) for row in rows]
        if isinstance(self.rid, list):
            each = [named(*pair) for pair in zip(each, self._rids(len(prompts)), strict=True)]
        return [spec for specs in each for spec in specs]

    def _rids(self, count: int) -> list[str]:
        """`rid` where it is a list."""
        rids = self._each("rid", count, None)
        twice = [rid for rid, times in Counter(rids).items() if times > 1 or not rid]
        if twice:
            raise InvalidRequestError(
                f"rid holds {twice[0]!r}, but its ids must differ and not be empty", "rid"
            )
        return rids

    def _each(self, name: str, count: int, default: Any) -> list[Any]:
        """A field's value for each of `count` prompts."""
        given = getattr(self, name)
        if not isinstance(given, list):
            return [default if given is None else given] * count
        if len(given) != count:
            raise InvalidRequestError(f"{len(given)} {name} for {count} prompts", name)
        return given

    def _choices(
        self,
        served: ServedModel,
        prompt: list[int],
        asked: NativeSampling,
        logprobs: bool,
        start: int,
        top: int,
    ) -> list[ChoiceSpec]:
        unserved.check_extra(asked, unserved.SAMPLING, "sampling_params.")
        scored = start if logprobs and check_start(start, prompt) >= 0 else None
        hidden = asked.max_new_tokens == 0  # the engine generates one token at least
        sampling = {
            "max_new_tokens": 1 if hidden else asked.max_new_tokens,
            "min_new_tokens": asked.min_new_tokens,
            "logprobs": top if logprobs else None,
            "prompt_logprobs_start": scored,
        }
        terms = {"priority": self.priority or 0, "deadline_s": deadline(self.timeout)}
        return asked.specs([prompt], served, sampling, hidden=hidden, **terms)


def named(specs: Sequence[ChoiceSpec], rid: str) -> list[ChoiceSpec]:
    """A prompt's choices, each with an id of its own; that of an only one is `rid` itself."""
    return [replace(specs[0], rid=rid)] if len(specs) == 1 else numbered(specs, rid)


def numbered(specs: Sequence[ChoiceSpec], rid: str) -> list[ChoiceSpec]:
    """The choices, each with an id that begins with `rid`, unless it has one."""
    return [replace(spec, rid=spec.rid or f"{rid}-{i}") for i, spec in enumerate(specs)]


def check_start(start: int, prompt: Sequence[int]) -> int:
    """`logprob_start_len` itself.

    Raises:
        InvalidRequestError: it is neither a place in the prompt nor -1.
    """
    if not -1 <= start <= len(prompt):
        raise InvalidRequestError(
            f"logprob_start_len is {start}, but must be -1 (no prompt token) or at most the "
            f"prompt's {len(prompt)} tokens",
            "logprob_start_len",
        )
    return start


class OfModel(unserved.Exact):
    """A request that may name the model."""

    model: str | None = None


class TokenizeRequest(OfModel):
    """POST /tokenize: a text, several, or a conversation as /v1/chat/completions takes it.

    Attributes:
        add_special_tokens: changes nothing: the tokenizer adds none, chat templates write theirs.
        return_token_strs: also give the tokens' texts; vLLM's.
    """

    prompt: str | list[str] | None = None
    add_special_tokens: bool | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    thinking: Thinking | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    def ids(self, served: ServedModel) -> list[int] | list[list[int]]:
        """Token ids; a list for each text where `prompt` is a list.

        Raises:
            InvalidRequestError: not one of prompt and messages is given, or what goes with messages
                is given with a prompt; and as `ChatRequest.prompt` does.
        """
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("either prompt or messages is required, not both", "prompt")
        if self.messages is not None:
            return ChatRequest(**self._chat()).prompt(served)
        if extra := self._chat().keys() - {"model", "messages"}:
            raise InvalidRequestError(f"{min(extra)} goes with messages; leave it out", min(extra))
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt or []
        ids = served.tokenizer.encode_batch(texts)
        return ids[0] if isinstance(self.prompt, str) else ids

    def _chat(self) -> dict[str, Any]:
        """The fields given that a conversation has."""
        names = self.model_fields_set & ChatRequest.model_fields.keys()
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class DetokenizeRequest(OfModel):
    """POST /detokenize."""

    tokens: list[int] | list[list[int]]
    skip_special_tokens: bool = True


class AbortRequest(unserved.Exact):
    """POST /abort_request: what to end, and what its answers say of it."""

    rid: str | None = None
    abort_all: bool | None = None
    abort_message: str | None = None
