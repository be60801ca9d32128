"""A training run: resumes, steps, logs, saves, exports."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from tokenizers import Tokenizer

from glmjax.config import MeshConfig
from glmjax.devices import mesh_for
from glmjax.errors import ConfigError
from glmjax.train.batches import Batches
from glmjax.train.curves import draw_curves
from glmjax.train.data.packing import Packed
from glmjax.train.data.tokenizer import train_tokenizer
from glmjax.train.export import export_hf
from glmjax.train.loss import Params, TrainBatch
from glmjax.train.metrics import MetricsLog, summary
from glmjax.train.optimizer import make_optimizer
from glmjax.train.progress import Progress
from glmjax.train.recipe import Recipe, Stage
from glmjax.train.step import (
    Measure,
    TrainState,
    TrainStep,
    init_state,
    make_measure,
    make_train_step,
    put,
)

log = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2


class Run:
    """One run of a recipe in a folder.

    Args:
        recipe: what to train.
        recipe_file: its source, copied into the folder; a resumed run must have the same.
        folder: made when missing; holds metrics.jsonl, curves.png, checkpoints/, tokenizer.json
            and at the end the model in HF's format under the recipe's name.

    Raises:
        ConfigError: the folder holds a run of another recipe.
    """

    def __init__(self, recipe: Recipe, recipe_file: Path, folder: Path):
        self.recipe, self.folder = recipe, folder.absolute()
        _claim(self.folder, recipe_file)
        self.mesh = mesh_for(MeshConfig(recipe.devices, 1))
        self.tokenizer = _tokenizer(recipe, self.folder / "tokenizer.json")
        self.optimizer = make_optimizer(recipe.optimizer, recipe.steps)
        self.batches = Batches(recipe, self.tokenizer)
        self.metrics = MetricsLog(self.folder / "metrics.jsonl")

    @property
    def model_folder(self) -> Path:
        """Where the trained model is exported."""
        return self.folder / self.recipe.name

    def train(self) -> Path:
        """Train to the end, from the last checkpoint if there is one; returns `model_folder`."""
        state = init_state(self.recipe.model, self.optimizer, self.mesh, self.recipe.seed)
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT_CHECKPOINTS)
        with ocp.CheckpointManager(self.folder / "checkpoints", options=options) as checkpoints:
            state = _resumed(checkpoints, state)
            state = self._steps(state, checkpoints)
        self._export(state.params)
        return self.model_folder

    def _steps(self, state: TrainState, checkpoints: ocp.CheckpointManager) -> TrainState:
        first = int(state.step)
        self.metrics.keep_before(first)
        measure = make_measure(self.recipe.model, self.mesh)
        with Progress(first, self.recipe.steps) as progress:
            for step, run_step, batch in self._feed(first):
                state, metrics = run_step(state, batch)
                row = summary(metrics) | {"tokens": batch.tokens.size}
                if self._is_due(step, self.recipe.held_out_every_steps):
                    row |= self._held_out(step, state.params, measure)
                self.metrics.write(step, row | {"elapsed_s": progress.elapsed_s()})
                progress.show(step + 1, row)
                if self._is_due(step, self.recipe.checkpoint_every_steps):
                    checkpoints.save(step + 1, args=ocp.args.StandardSave(state))
                    draw_curves(self.metrics.file, self.folder / "curves.png")
        return state

    def _is_due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.recipe.steps

    def _held_out(self, step: int, params: Params, measure: Measure) -> dict[str, float]:
        """Metrics of problems that are never trained on."""
        batch = put(self.batches.at(step, "held_out"), self.mesh)
        return {f"held_out_{k}": value for k, value in summary(measure(params, batch)).items()}

    def _feed(self, first: int) -> Iterator[tuple[int, TrainStep, TrainBatch]]:
        """Steps with their programs and batches; the next batch is drawn meanwhile."""
        programs: dict[Stage, TrainStep] = {}
        with ThreadPoolExecutor(1) as pool:
            pending: Future[Packed] | None = None
            for step in range(first, self.recipe.steps):
                packed = self.batches.at(step) if pending is None else pending.result()
                if step + 1 < self.recipe.steps:
                    pending = pool.submit(self.batches.at, step + 1)
                stage = self.recipe.stage_at(step)
                if stage not in programs:
                    programs[stage] = make_train_step(self.recipe, stage, self.optimizer, self.mesh)
                yield step, programs[stage], put(packed, self.mesh)

    def _export(self, params: Params) -> None:
        draw_curves(self.metrics.file, self.folder / "curves.png")
        parts = params["model"], params["mtp"], self.tokenizer
        export_hf(self.model_folder, self.recipe.model, *parts, overwrite=True)


def _claim(folder: Path, recipe_file: Path) -> None:
    """Copy the recipe into the folder, unless another one's run is there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made ({error.strerror}); name another --out"
        ) from None
    copy = folder / "recipe.toml"
    if copy.exists() and copy.read_bytes() != recipe_file.read_bytes():
        raise ConfigError(
            f"{folder} holds a run of another recipe ({copy}); name another folder, or remove it "
            "to begin anew"
        )
    if not copy.exists():
        shutil.copyfile(recipe_file, copy)


def _tokenizer(recipe: Recipe, file: Path) -> Tokenizer:
    if not file.exists():
        made = train_tokenizer(
            recipe.seed, recipe.tokenizer.vocab_size, recipe.tokenizer.conversations
        )
        made.save(str(file.with_suffix(".partial")))
        file.with_suffix(".partial").rename(file)
    return Tokenizer.from_file(str(file))


def _resumed(checkpoints: ocp.CheckpointManager, state: TrainState) -> TrainState:
    """The newest checkpoint in the place of a new state, or that state."""
    latest = checkpoints.latest_step()
    if latest is None:
        return state
    log.info("resuming after step %d", latest)
    restored: Any = checkpoints.restore(latest, args=ocp.args.StandardRestore(state))
    return restored
