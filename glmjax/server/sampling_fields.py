"""How a request wants its answers sampled: what OpenAI's and SGLang's HTTP APIs share."""

from __future__ import annotations

import contextlib
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict

from glmjax.errors import InvalidRequestError
from glmjax.server.choice import MAX_CHOICES, ChoiceSpec, choices
from glmjax.server.grammar_fields import GrammarFields
from glmjax.server.served import ServedModel

MAX_TOTAL_CHOICES = 1024
# Where errors have names of fields: at their beginning and in two phrases. Elsewhere such a word
# may be the client's own.
NAME = re.compile(r"\A(?:the )?\w+|\w+(?= \d+(?: make |\Z))|(?<= leave )\w+(?= out\Z)")
# Fields that have the same name and meaning in SamplingParams.
SAME = (
    "temperature",
    "top_p",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "ignore_eos",
)

Strings = Annotated[list[str], BeforeValidator(lambda x: [x] if isinstance(x, str) else x)]


class SamplingFields(GrammarFields):
    """Null is the same as left out."""

    model_config = ConfigDict(extra="allow")

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    seed: int | None = None
    stop: Strings | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name, and vLLM's
    include_stop_str_in_output: bool | None = None

    def specs(
        self,
        prompts: Sequence[Sequence[int]],
        served: ServedModel,
        sampling: Mapping[str, Any],
        **fields: Any,
    ) -> list[ChoiceSpec]:
        """What to generate: `n` choices of each prompt, those of a prompt side by side.

        Args:
            prompts: token ids of each.
            served: the model, for its defaults.
            sampling: what else SamplingParams takes; None: its default.
            fields: what else ChoiceSpec takes.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        n = 1 if self.n is None else self.n
        fields.setdefault("grammar", self.grammar())
        if n <= MAX_CHOICES:  # `choices` checks n itself
            check_total(n * len(prompts))
        spec = ChoiceSpec(
            prompt_ids=(),
            sampling=served.sampling(**(self._sampling(served) | dict(sampling))),
            stops=tuple(self.stop or ()),
            skip_special_tokens=self.skip_special_tokens is not False,
            keep_stop=bool(self.no_stop_trim or self.include_stop_str_in_output),
            **fields,
        )
        of = [replace(spec, prompt_ids=tuple(prompt)) for prompt in prompts]
        return [choice for spec in of for choice in choices(spec, n, self.seed)]

    def _sampling(self, served: ServedModel) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SAME} | {
            "top_k": -1 if self.top_k == 0 else self.top_k,  # vLLM's and HF's word for all
            "logit_bias": logit_bias(self.logit_bias, served),
            "stop_token_ids": self.stop_token_ids or (),
        }


def check_total(choices: int) -> None:
    """Raise InvalidRequestError where all prompts of a request have too many choices together."""
    if choices > MAX_TOTAL_CHOICES:
        raise InvalidRequestError(
            f"prompts x n are {choices} choices, but a request may have {MAX_TOTAL_CHOICES}; send "
            "several requests",
            "prompt",
        )


def logit_bias(asked: Mapping[str, float] | None, served: ServedModel) -> dict[int, float]:
    """Biases by token id, from JSON's string keys.

    Raises:
        InvalidRequestError: a key is no id of the model's.
    """
    size = served.config.vocab_size
    for key in asked or ():
        if not (key.isascii() and key.isdigit() and len(key) < 10 and int(key) < size):
            raise InvalidRequestError(
                f"logit_bias has the key {key!r}, but its keys are token ids, 0 to {size - 1}, "
                "as strings",
                "logit_bias",
            )
    return {int(key): value for key, value in (asked or {}).items()}


def deadline(timeout_s: float | None) -> float | None:
    """The moment `timeout_s` from now, on the clock of time.monotonic; None: never.

    Raises:
        InvalidRequestError: it is not above 0.
    """
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise InvalidRequestError(f"timeout is {timeout_s}, but must be seconds above 0", "timeout")
    return None if timeout_s is None else time.monotonic() + timeout_s


@contextlib.contextmanager
def spelled(names: Mapping[str, str]) -> Iterator[None]:
    """Make errors about the fields in `names` use the client's names for them."""
    try:
        yield
    except InvalidRequestError as error:
        if error.param is None or error.param not in names:
            raise
        words = NAME.sub(lambda word: names.get(word[0], word[0]), str(error))
        raise type(error)(words, names[error.param]) from None
