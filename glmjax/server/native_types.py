"""Requests of SGLang's own HTTP API."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from glmjax.errors import InvalidRequestError
from glmjax.server import unserved
from glmjax.server.frontend import ChoiceSpec, choices
from glmjax.server.openai_types import stop_strings
from glmjax.server.served import ServedModel


class NativeSampling(BaseModel):
    """`sampling_params` of /generate."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)

    max_new_tokens: int | None = 128
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    n: int | None = None
    seed: int | None = Field(default=None, validation_alias=AliasChoices("sampling_seed", "seed"))
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    def specs(self, prompt_ids: list[int], served: ServedModel) -> list[ChoiceSpec]:
        """The choices to generate. Raises InvalidRequestError when a value is out of its range."""
        unserved.check_extra(self, unserved.SAMPLING, "sampling_params.")
        sampling = served.sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=frozenset(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
        )
        skip = self.skip_special_tokens is not False
        spec = ChoiceSpec(tuple(prompt_ids), sampling, stop_strings(self.stop), skip)
        return choices(spec, 1 if self.n is None else self.n, self.seed)


class GenerateRequest(BaseModel):
    """POST /generate: one prompt or several, as text or as token ids."""

    model_config = ConfigDict(extra="allow")

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: NativeSampling | list[NativeSampling] | None = None
    stream: bool | None = None
    rid: str | None = None

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

    def samplings(self, count: int) -> list[NativeSampling]:
        """Sampling parameters of each of `count` prompts."""
        given = self.sampling_params or NativeSampling()
        if isinstance(given, NativeSampling):
            return [given] * count
        if len(given) != count:
            raise InvalidRequestError(
                f"{len(given)} sampling_params for {count} prompts", "sampling_params"
            )
        return given


class TokenizeRequest(BaseModel):
    """POST /tokenize."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str | list[str]


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    tokens: list[int] | list[list[int]]
    skip_special_tokens: bool = True


class AbortRequest(BaseModel):
    """POST /abort_request."""

    model_config = ConfigDict(extra="forbid")

    rid: str
