"""What the servers know of the model they serve. No jax, no weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from glmjax.config import ModelConfig, read_json, token_ids
from glmjax.errors import CheckpointError, InvalidRequestError, ModelNotFoundError
from glmjax.text.chat import ChatTemplate
from glmjax.text.grammar import Grammars, GrammarSpec
from glmjax.text.reader import Opening
from glmjax.text.thinking import Marks, Phase, Thinking
from glmjax.text.tokenizer import Tokenizer
from glmjax.types import Constraint, SamplingParams

ASSISTANT, THINK, END_THINK = "<|assistant|>", "<think>", "</think>"
Parser = Literal["glm", "glm45", "glm47", "none"]
# glm: as the chat template has it. Thoughts are read alike in all forms; none: they are text.
PARSERS: tuple[Parser, ...] = ("glm", "glm45", "glm47", "none")
TAIL = 4096  # tokens of a prompt in which a thought that is spelled out is looked for
# Other servers take GBNF in these.
EBNF_FIELDS = ("ebnf", "ebnf_grammar", "guided_grammar", "structured_outputs")
DEFAULTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ServedModel:
    """A model folder without its weights.

    Attributes:
        folder: where its files are.
        name: what clients call it.
        aliases: what they may call it besides.
        config: sizes.
        tokenizer: text to ids and back.
        template: chat messages to text; None: the model has none.
        eos_token_ids: the model's own end tokens.
        max_seq_len: longest sequence served, prompt and output together.
        default_sampling: temperature, top_p and the like where a request names none.
        pad_token_id: for clients that ask.
        reasoning_parser, tool_call_parser: how thoughts and calls are written, one of `PARSERS`.
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
    reasoning_parser: Parser = "glm"
    tool_call_parser: Parser = "glm"
    aliases: tuple[str, ...] = ()

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

    @property
    def names(self) -> tuple[str, ...]:
        """All that it is told as."""
        return self.name, *self.aliases

    def check_name(self, name: str | None) -> None:
        """Raise ModelNotFoundError when another model is asked for.

        Its names are its own, and what clients of SGLang say: its folder, or "default".
        """
        if name not in (None, "default", str(self.folder), *self.names):
            raise ModelNotFoundError(
                f"the model {name!r} is not served here; {self.name!r} is", "model"
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

    @property
    def call_form(self) -> Literal["glm45", "glm47"] | None:
        """How tool calls are written; None: the model calls no tools."""
        if self.tool_call_parser == "glm":
            return None if self.template is None else self.template.call_form
        return None if self.tool_call_parser == "none" else self.tool_call_parser

    @property
    def answer_lead(self) -> str:
        """What the model may put between its thought and the answer."""
        return "\n" if self.template and self.template.call_form == "glm45" else ""

    def constraint(
        self,
        grammar: GrammarSpec | None,
        prompt_ids: Sequence[int],
        thinks: bool,
        budget: int | None = None,
    ) -> Constraint | None:
        """What holds a request to its grammar and its thought to a length; new each time.

        Args:
            grammar: of the answer, behind the thought if there is one.
            prompt_ids: the prompt.
            thinks: the model will think unless the prompt says that it has.
            budget: tokens that the thought may have; None: any number.

        Raises:
            InvalidRequestError: the grammar does not compile, or thoughts have no tokens of their
                own.
        """
        inner = None if grammar is None else self._grammar(grammar)
        if budget is not None and self._marks is None:
            raise InvalidRequestError(
                f"{self.name} does not think, as its tokenizer has no {THINK}: leave "
                "max_thinking_tokens out",
                "max_thinking_tokens",
            )
        phase = self.phase(prompt_ids, thinks)
        if inner is None and phase is Phase.ANSWER and self.opening(prompt_ids).fresh:
            phase = Phase.BEFORE  # a model can think though it was told not to
        if self._marks is None or phase is Phase.ANSWER or (inner is None and budget is None):
            return inner
        size, ends = self.config.vocab_size, self.eos_token_ids
        return Thinking(self._marks, size, phase, inner, budget, ends)

    def _grammar(self, grammar: GrammarSpec) -> Constraint:
        try:
            return self._grammars.constraint(grammar)
        except InvalidRequestError as error:
            if grammar.kind != "lark" or grammar.param not in EBNF_FIELDS:
                raise
            raise InvalidRequestError(f"{error}; GBNF is not served", error.param) from None

    def phase(self, prompt_ids: Sequence[int], thinks: bool) -> Phase:
        """Where a prompt leaves the answer. Its last turn decides, if it has turns.

        Args:
            prompt_ids: the prompt.
            thinks: the model will think unless that turn has a thought; else it does only where the
                prompt ends inside one.
        """
        last = self._last_mark(prompt_ids)
        mark = prompt_ids[last] if last >= 0 else None
        if self._marks is None or mark == self._marks.end:
            return Phase.ANSWER
        if mark == self._marks.think:
            return Phase.THOUGHT
        return Phase.BEFORE if thinks else Phase.ANSWER

    def opening(self, prompt_ids: Sequence[int]) -> Opening:
        """Where a prompt leaves whoever reads the answer to it."""
        begin = self._last_mark(prompt_ids) + 1
        if self._marks is None:
            return self._spelled_opening(prompt_ids[max(begin, len(prompt_ids) - TAIL) :])
        in_thought = self.phase(prompt_ids, thinks=False) is Phase.THOUGHT
        return Opening(in_thought, fresh=all(map(self._is_blank, islice(prompt_ids, begin, None))))

    def _spelled_opening(self, turn: Sequence[int]) -> Opening:
        """Of a tokenizer that has no tokens for thoughts, by the end of the last turn."""
        text = self.tokenizer.decode(turn)
        before, begun, thought = text.rpartition(THINK)
        _, ended, answer = (thought or before).rpartition(END_THINK)
        return Opening(bool(begun) and not ended, fresh=not answer.strip())

    def _last_mark(self, prompt_ids: Sequence[int]) -> int:
        """Where a turn of the assistant or a thought begins or ends last; -1: nowhere."""
        marks = {self._assistant, *(self._marks or ())[:2]}
        places = reversed(range(len(prompt_ids)))
        return next((i for i in places if prompt_ids[i] in marks), -1)

    def _is_blank(self, token_id: int) -> bool:
        special = token_id in self.tokenizer.special_ids
        return special or not self.tokenizer.token_bytes(token_id).strip()

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
    def _marks(self) -> Marks | None:
        """Of thoughts; None: the tokenizer has no tokens for them."""
        think, end = self.tokenizer.find(THINK), self.tokenizer.find(END_THINK)
        if think is None or end is None:
            return None
        line_break = self.tokenizer.encode("\n")
        blank = frozenset(filter(self._is_blank, range(self.tokenizer.size)))
        return Marks(think, end, line_break[0] if len(line_break) == 1 else None, blank)

    @functools.cached_property
    def _assistant(self) -> int | None:
        """What begins an assistant's turn."""
        return self.tokenizer.find(ASSISTANT)

    @functools.cached_property
    def default_sampling_json(self) -> str:
        """The defaults as JSON, or "" when there are none."""
        return json.dumps(dict(self.default_sampling)) if self.default_sampling else ""


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
