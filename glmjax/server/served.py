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
from glmjax.text.grammar import Grammars, GrammarSpec
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import Constraint, SamplingParams

ASSISTANT, THINK, END_THINK = "<|assistant|>", "<think>", "</think>"
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


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
        default_sampling: temperature, top_p and the like where a request names none.
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

    def constraint(
        self, grammar: GrammarSpec | None, prompt_ids: Sequence[int], thinks: bool
    ) -> Constraint | None:
        """What holds a request to its grammar, if it has one; new each time, as it has state.

        Raises:
            InvalidRequestError: the grammar does not compile.
        """
        if grammar is None:
            return None
        try:
            return self._grammars.constraint(grammar, self.thought_end(prompt_ids, thinks))
        except InvalidRequestError as error:
            if grammar.kind != "lark":
                raise
            # the field that holds it is called ebnf, after other notations
            raise InvalidRequestError(f"{error}; GBNF is not served", error.param) from None

    def thought_end(self, prompt_ids: Sequence[int], thinks: bool) -> int | None:
        """The token that will end a thought, so that the answer begins behind it.

        Args:
            prompt_ids: the prompt. The last turn decides, if it has turns.
            thinks: the model will think unless that turn has a thought that has ended. Else it
                does only where the prompt ends inside a thought.

        Returns:
            None: no thought goes on, so the answer begins at once.
        """
        assistant, think, end = self._marks
        if end is None:
            return None
        begun, ended, turn = (_last(prompt_ids, mark) for mark in (think, end, assistant))
        goes_on = ended <= turn if thinks else ended < begun
        return end if goes_on else None

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
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.config.vocab_size, self.eos_token_ids)

    @functools.cached_property
    def _marks(self) -> tuple[int | None, ...]:
        """Ids of the tokens that begin a turn, and that begin and end a thought."""
        return tuple(map(self._id, (ASSISTANT, THINK, END_THINK)))

    def _id(self, token: str) -> int | None:
        try:
            return self.tokenizer.token_id(token)
        except CheckpointError:
            return None

    @functools.cached_property
    def default_sampling_json(self) -> str:
        """The defaults as JSON, or "" when there are none."""
        return json.dumps(dict(self.default_sampling)) if self.default_sampling else ""


def _last(ids: Sequence[int], wanted: int | None) -> int:
    """The last place of an id; -1: it is not there."""
    return max((place for place, token in enumerate(ids) if token == wanted), default=-1)


def _default_sampling(generation: Mapping[str, Any], file: Path) -> dict[str, Any]:
    defaults = {name: generation[name] for name in DEFAULTED if generation.get(name) is not None}
    if defaults.get("top_k") == 0:  # HF's word for all
        defaults["top_k"] = -1
    if generation.get("do_sample") is False:  # HF's word for greedy; absent, it says nothing here
        defaults["temperature"] = 0.0
    try:
        SamplingParams(**defaults)
    except (InvalidRequestError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from None
    return defaults
