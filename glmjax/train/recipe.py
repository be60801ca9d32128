"""A training run as data: model, data, optimiser and stages, read from TOML."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from glmjax.config import ModelConfig
from glmjax.errors import ConfigError
from glmjax.train.data.mixture import TASKS

# What TOML may give for a field of each type.
SCALARS: dict[Any, tuple[type, ...]] = {
    int: (int,),
    float: (int, float),
    bool: (bool,),
    str: (str,),
}
RECIPE_COUNTS = ("devices", "checkpoint_every_steps", "held_out_every_steps")
STAGE_COUNTS = ("steps", "rows", "seq_len")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
TAKEN = ("checkpoints", "recipe.toml", "tokenizer.json", "metrics.jsonl", "curves.png")


@dataclass(frozen=True)
class TokenizerRecipe:
    """How the tokenizer is trained.

    Attributes:
        vocab_size: bytes, merges and special tokens together.
        conversations: how many are drawn to learn merges from.
    """

    vocab_size: int = 1024
    conversations: int = 10000


@dataclass(frozen=True)
class Restart:
    """A new cycle of the learning rate: warm-up, then a cosine (SGDR, arXiv 1608.03983).

    Attributes:
        step: where it begins.
        learning_rate: its peak.
    """

    step: int
    learning_rate: float


@dataclass(frozen=True)
class OptimizerRecipe:
    """Muon for matrices, AdamW for the rest (GLM-4.5 report, arXiv 2508.06471, section 2.4).

    Attributes:
        learning_rate: peak, for both.
        final_fraction: of the peak, where the cosine ends.
        warmup_steps: linear, from 0.
        weight_decay: of matrices.
        momentum: Muon's.
        newton_schulz_steps: Muon's.
        update_rms: what Muon's updates are scaled to, before the learning rate.
        max_grad_norm: longer gradients are scaled down to it.
        restarts: later cycles of the learning rate, with the same warm-up and end.
    """

    learning_rate: float = 5e-3
    final_fraction: float = 0.1
    warmup_steps: int = 100
    weight_decay: float = 0.1
    momentum: float = 0.95
    newton_schulz_steps: int = 5
    update_rms: float = 0.2
    max_grad_norm: float = 1.0
    restarts: tuple[Restart, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stretch of steps of one shape.

    Attributes:
        steps: how many.
        rows: sequences a step, over all devices.
        seq_len: tokens a row, filled with whole conversations.
        mtp_weight: of the MTP loss.
        bias_rate: by how much a correction bias moves a step; 0: balancing is over.
        joined: a row is one long text, in which later conversations see the earlier ones.
        tasks: weights of tasks in the place of the mixture's own.
    """

    steps: int
    rows: int
    seq_len: int
    mtp_weight: float = 0.3
    bias_rate: float = 1e-3
    joined: bool = False
    tasks: Mapping[str, float] | None = field(default=None, hash=False)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out.

    Attributes:
        name: of the model.
        seed: of parameters, tokenizer and data.
        devices: data-parallel ones; sums over them depend on their number in the last bits.
        prompt_weight: of the loss on tokens that are not the model's to write.
        balance_weight: of the sequence-level balance loss.
        checkpoint_every_steps: how often the run is saved.
        held_out_every_steps: how often it is measured on problems that it never learns from.
    """

    name: str
    model: ModelConfig
    stages: tuple[Stage, ...]
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    seed: int = 0
    devices: int = 2
    prompt_weight: float = 0.05
    balance_weight: float = 1e-4
    checkpoint_every_steps: int = 200
    held_out_every_steps: int = 50

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        """Places for tokens in all steps."""
        return sum(stage.steps * stage.rows * stage.seq_len for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage of a step, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"step lies {step + 1} beyond the last stage")


def read_recipe(file: str | Path) -> Recipe:
    """Read a recipe.

    Raises:
        ConfigError: no such file, not TOML, an unknown or missing field, a wrong value.
    """
    try:
        raw = tomllib.loads(Path(file).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as a TOML recipe: {error}") from None
    try:
        return _recipe(raw)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _recipe(raw: dict[str, Any]) -> Recipe:
    parts = {
        "model": lambda value: _make(ModelConfig, value, "model"),
        "tokenizer": lambda value: _make(TokenizerRecipe, value, "tokenizer"),
        "optimizer": _optimizer,
        "stages": lambda value: tuple(
            _make(Stage, stage, "stages")
            for stage in (value if isinstance(value, list) else [value])
        ),
    }
    recipe = _make(Recipe, {k: parts.get(k, lambda v: v)(v) for k, v in raw.items()}, "recipe")
    _check_recipe(recipe)
    return recipe


def _check_recipe(recipe: Recipe) -> None:
    counts = {name: getattr(recipe, name) for name in RECIPE_COUNTS}
    counts |= {
        f"stages[{i}].{name}": getattr(stage, name)
        for i, stage in enumerate(recipe.stages)
        for name in STAGE_COUNTS
    }
    if low := [f"{name} is {count}" for name, count in counts.items() if count < 1]:
        raise ConfigError(f"{', '.join(low)}, expected 1 or more")
    unknown = {task for stage in recipe.stages for task in stage.tasks or ()} - TASKS.keys()
    uneven = [stage.rows for stage in recipe.stages if stage.rows % recipe.devices]
    sizes = recipe.model.vocab_size, recipe.tokenizer.vocab_size
    rules = [
        (recipe.stages, "stages is empty, expected at least one"),
        (NAME.fullmatch(recipe.name), f"name is {recipe.name!r}, expected letters, digits, . _ -"),
        (recipe.name not in TAKEN, f"name is {recipe.name!r}, which the run's folder has already"),
        (
            len({*sizes}) == 1,
            f"model.vocab_size {sizes[0]} and tokenizer.vocab_size {sizes[1]} differ",
        ),
        (not unknown, f"stages.tasks names {sorted(unknown)}, expected some of {list(TASKS)}"),
        (not uneven, f"rows {uneven} are no multiples of devices {recipe.devices}"),
    ]
    for holds, message in rules:
        if not holds:
            raise ConfigError(message)


def _optimizer(values: Any) -> OptimizerRecipe:
    recipe = _make(OptimizerRecipe, values, "optimizer")
    restarts = (_make(Restart, value, "optimizer.restarts") for value in recipe.restarts)
    return replace(recipe, restarts=tuple(restarts))


def _make(kind: type, values: Any, where: str) -> Any:
    known = [field.name for field in fields(kind)]
    if not isinstance(values, dict) or values.keys() - set(known):
        raise ConfigError(f"{where} is {values!r}, expected a table of {', '.join(known)}")
    for name, hint in get_type_hints(kind).items():
        accepted = SCALARS.get(hint)
        if accepted and name in values and type(values[name]) not in accepted:
            raise ConfigError(f"{where}.{name} is {values[name]!r}, expected {hint.__name__}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
