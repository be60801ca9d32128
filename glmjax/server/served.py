"""What the servers know of the model they serve. No jax, no weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glmjax.config import ModelConfig, read_json, token_ids
from glmjax.errors import CheckpointError, InvalidRequestError
from glmjax.text.chat import ChatTemplate
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import SamplingParams


@dataclass(frozen=True)
class ServedModel:
    """A model folder without its weights.

    Attributes:
        folder: where its files are.
        name: what clients call it.
        config: sizes.
        tokenizer: text to ids and back.
        template: chat messages to text; None: the model has none.
        eos_token_ids: the model's own end tokens.
        max_seq_len: longest sequence served, prompt and output together.
        default_sampling: temperature, top_p and top_k where a request names none.
        pad_token_id: for clients that ask.
    """

    folder: Path
    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    template: ChatTemplate | None
    eos_token_ids: tuple[int, ...]
    max_seq_len: int
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    pad_token_id: int = 0

    @classmethod
    def load(
        cls, folder: str | Path, name: str | None = None, max_seq_len: int | None = None
    ) -> ServedModel:
        """Read config, generation config, tokenizer and chat template from a model folder.

        Args:
            folder: holds them.
            name: what clients call it; None: the folder's name.
            max_seq_len: None: the model's own.

        Raises:
            ConfigError: config.json is missing or of another model.
            CheckpointError: another file is missing, damaged or does not fit the config.
        """
        folder = Path(folder).resolve()
        config = ModelConfig.from_hf(folder)
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer.size > config.vocab_size:
            raise CheckpointError(
                f"{folder}: tokenizer.json has ids up to {tokenizer.size - 1}, but the model's "
                f"vocab_size is {config.vocab_size}; they are of different models"
            )
        file = folder / "generation_config.json"
        generation = read_json(file) if file.is_file() else {}
        return cls(
            folder=folder,
            name=name or folder.name,
            config=config,
            tokenizer=tokenizer,
            template=ChatTemplate.from_folder(folder),
            eos_token_ids=token_ids(generation.get("eos_token_id")) or config.eos_token_ids,
            max_seq_len=min(max_seq_len or config.max_position_embeddings, 2**31 - 1),
            default_sampling=_default_sampling(generation, file),
            pad_token_id=generation.get("pad_token_id") or 0,
        )

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters: what is given, else the model's defaults; None is not given.

        Raises:
            InvalidRequestError: a value is out of its range.
        """
        explicit = {key: value for key, value in given.items() if value is not None}
        return SamplingParams(**(dict(self.default_sampling) | explicit))

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], /, **variables: Any) -> list[int]:
        """Token ids of a conversation. Raises InvalidRequestError as the template does."""
        if self.template is None:
            raise InvalidRequestError(
                f"{self.name} has no chat template, so it takes plain prompts only: use "
                "/v1/completions"
            )
        return self.tokenizer.encode(self.template.render(messages, **variables))

    def check_prompt(self, prompt_ids: Sequence[int]) -> None:
        """Raise InvalidRequestError when an id is not one of the model's."""
        size = self.config.vocab_size
        least, most = min(prompt_ids, default=0), max(prompt_ids, default=0)
        if least < 0 or most >= size:
            raise InvalidRequestError(
                f"the prompt holds token id {least if least < 0 else most}, but the model's ids "
                f"are 0 to {size - 1}",
                "prompt",
            )

    @functools.cached_property
    def default_sampling_json(self) -> str:
        """The defaults as JSON, or "" when there are none."""
        return json.dumps(dict(self.default_sampling)) if self.default_sampling else ""


def _default_sampling(generation: Mapping[str, Any], file: Path) -> dict[str, Any]:
    names = ("temperature", "top_p", "top_k")
    defaults = {name: generation[name] for name in names if generation.get(name) is not None}
    if defaults.get("top_k") == 0:  # HF's word for all
        defaults["top_k"] = -1
    if generation.get("do_sample") is False:  # HF's word for greedy; absent, it says nothing here
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except (InvalidRequestError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    return defaults
