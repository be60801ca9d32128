"""Trained parameters to a checkpoint in HF's format: the converter's table, read backwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from convert.mapping import mtp_prefix, places
from convert.plan import flat_specs
from glmjax.bench.synthetic import (
    MTP_FILE,
    check_writable,
    end_ids,
    write_configs,
    write_safetensors,
    write_tokenizer,
)
from glmjax.config import ModelConfig
from glmjax.errors import CheckpointError, ConfigError
from glmjax.model.spec import ParamSpec, path_name

MODEL_FILE = "model.safetensors"

Tree = dict[Any, Any]


def export_hf(
    folder: str | Path,
    config: ModelConfig,
    model: Tree,
    mtp: Tree,
    tokenizer: Tokenizer,
    dtype: str = "bfloat16",
    *,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint that transformers loads as Glm4MoeForCausalLM and the converter converts.

    It appears at `folder` whole, in one rename. Its generation config asks for greedy decoding.

    Args:
        config: sizes. Its end tokens are replaced by the tokenizer's, its dtype by `dtype`.
        model, mtp: arrays of any float dtype, in the structure of `specs_of(Decoder(config))` and
            `specs_of(MTP(config))`.
        tokenizer: holds GLM's end tokens.
        dtype: "bfloat16" or "float32"; the correction bias is float32 in both.
        overwrite: replace a checkpoint that lies at `folder`.

    Raises:
        CheckpointError: `folder` is in the way.
        ConfigError: config, trees and tokenizer do not belong together, an unknown dtype, or a
            quantised config.
    """
    folder = Path(folder).absolute()
    _check_target(folder, overwrite)
    check_writable(config, dtype)
    config = replace(config, num_nextn_predict_layers=1)
    eos = _end_ids(config, tokenizer)
    tensors = hf_tensors(config, model, mtp, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as private:
        written = Path(private) / "written"
        written.mkdir()
        write_safetensors(written, _files(config, tensors).items())
        write_configs(written, config, dtype, eos, do_sample=False)
        write_tokenizer(written, tokenizer, config.max_position_embeddings)
        if folder.exists():
            folder.rename(Path(private) / "replaced")
        written.rename(folder)


def hf_tensors(config: ModelConfig, model: Tree, mtp: Tree, dtype: str) -> dict[str, np.ndarray]:
    """Every tensor by HF name, in `dtype` except for the correction bias.

    Raises:
        ConfigError: the trees are not those of `config`, or two tied leaves differ.
    """
    config = replace(config, dtype=dtype)
    specs = flat_specs(config, has_mtp=True)
    leaves = _leaves(specs, {**model, "mtp": mtp})
    if config.tie_word_embeddings and (leaves["embed_tokens"] != leaves["lm_head"]).any():
        raise ConfigError(
            "tie_word_embeddings is true, but embed_tokens and lm_head differ, and a tied "
            "checkpoint holds only one of them; train them as one, or untie them in the config"
        )
    tensors = {}
    for place in places(config, specs):
        shape = place.tensor_shape(specs[place.leaf].shape)
        tensor = leaves[place.leaf][place.index].reshape(shape)
        tensors[place.tensor] = np.ascontiguousarray(tensor)
    return tensors


def _leaves(specs: dict[str, ParamSpec], tree: Tree) -> dict[str, np.ndarray]:
    """Every leaf on the host by path, checked against its spec and cast to its dtype."""
    found = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    expected = {path: list(spec.shape) for path, spec in specs.items()}
    given = {path: list(leaf.shape) for path, leaf in found.items()}
    faults = [
        f"{path}: the config asks for {expected.get(path, 'nothing')}, "
        f"given is {given.get(path, 'nothing')}"
        for path in expected | given
        if expected.get(path) != given.get(path)
    ]
    if faults:
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ConfigError(
            "the parameters are not those of the config:\n  " + "\n  ".join(faults[:10]) + more
        )
    return {path: np.asarray(found[path]).astype(spec.dtype) for path, spec in specs.items()}


def _files(config: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """File name -> its tensors. transformers reads the first alone: it has no MTP block."""
    prefix = mtp_prefix(config)
    files: dict[str, dict[str, np.ndarray]] = {MODEL_FILE: {}, MTP_FILE: {}}
    for name, tensor in tensors.items():
        files[MTP_FILE if name.startswith(prefix) else MODEL_FILE][name] = tensor
    return files


def _end_ids(config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {largest}, but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer that the model was trained with"
        )
    return end_ids(tokenizer)


def _check_target(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} exists and is not a checkpoint; choose another folder")
    if not overwrite:
        raise CheckpointError(
            f"{folder} is a checkpoint already; choose another folder, or pass overwrite=True"
        )
