"""Random GLM-4.5 checkpoints in HF's format, written with numpy alone: no torch, no jax.

They have every part of a real release: shards with an index, the MTP block in a file of its own, a
tokenizer with GLM's special tokens, a chat template. Only the weights are noise. What writes the
files also serves `glmjax.train.export`, whose weights are not.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from glmjax.config import ARCHITECTURE, DTYPES, MODEL_TYPE, ModelConfig
from glmjax.errors import ConfigError

END_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")
CONTROL_TOKENS = (
    "<|endoftext|>",
    "[MASK]",
    "[gMASK]",
    "[sMASK]",
    "<sop>",
    "<eop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)
# Single tokens too, but part of the text that a model writes: decoding keeps them.
TEXT_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "/nothink",
)
SPECIAL_TOKENS = (*CONTROL_TOKENS, *TEXT_TOKENS)
MERGED_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"

INDEX_FILE = "model.safetensors.index.json"
MTP_FILE = "mtp.safetensors"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def default_config() -> ModelConfig:
    """A model small enough for any machine that has every feature and divides over 8 devices."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=2.5,
        use_qk_norm=True,
        attention_bias=True,
        rope_theta=1e6,
        max_position_embeddings=4096,
        dtype="float32",
        eos_token_ids=end_ids(make_tokenizer(512)),
    )


def write_checkpoint(
    folder: str | Path,
    config: ModelConfig,
    seed: int = 0,
    shards: int = 2,
    dtype: str = "float32",
    tokenizer: bool = True,
) -> None:
    """Write a checkpoint that `transformers` loads as Glm4MoeForCausalLM.

    The same arguments give the same bytes. Activations and logits are of order one, and routing
    depends on both the token and the correction bias, which lies near 7 as in trained models.

    Args:
        folder: made when missing; files of the same names are replaced.
        config: sizes. With `tokenizer` its end tokens are replaced by the tokenizer's.
        shards: files of the main model; at most one of them is held in memory.
        dtype: "float32" or "bfloat16"; the correction bias is float32 in both.
        tokenizer: also write a tokenizer and a chat template.

    Raises:
        ConfigError: an unknown dtype, a quantised config, fewer tensors than shards, or a
            vocabulary too small for the tokenizer.
    """
    check_writable(config, dtype)
    _check_shards(config, shards)
    made = make_tokenizer(config.vocab_size) if tokenizer else None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, config, seed, shards, dtype)
    write_configs(folder, config, dtype, end_ids(made) if made else config.eos_token_ids)
    if made:
        write_tokenizer(folder, made, config.max_position_embeddings)


def write_configs(
    folder: Path, config: ModelConfig, dtype: str, eos_token_ids: tuple[int, ...], **generation: Any
) -> None:
    """Write config.json, and generation_config.json with the end tokens and `generation`."""
    _write_json(folder / "config.json", hf_config(config, dtype, eos_token_ids))
    _write_json(
        folder / "generation_config.json", {"eos_token_id": list(eos_token_ids)} | generation
    )


def hf_config(config: ModelConfig, dtype: str, eos_token_ids: tuple[int, ...]) -> dict[str, Any]:
    """The config.json of an unquantised model, as transformers 5 writes it."""
    left_out = {
        "rope_theta",
        "partial_rotary_factor",
        "eos_token_ids",
        "quant",
        "deterministic",
        "kernels",
    }
    rope = {
        "rope_type": "default",
        "rope_theta": config.rope_theta,
        "partial_rotary_factor": config.partial_rotary_factor,
    }
    sizes = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "hidden_act": "silu",
        **{name: value for name, value in sizes.items() if name not in left_out},
        "dtype": dtype,
        "rope_parameters": rope,
        "eos_token_id": list(eos_token_ids),
        "pad_token_id": eos_token_ids[0] if eos_token_ids else None,
    }


@dataclass(frozen=True)
class Noise:
    """How a tensor is drawn: normal, `mean` plus `std` times noise."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    keep_float32: bool = False


def tensors(config: ModelConfig) -> dict[str, Noise]:
    """Every tensor of the main model, by HF name, in the order of the forward pass."""
    c = config
    table = {"model.embed_tokens.weight": Noise((c.vocab_size, c.hidden_size), 1.0)}
    for i in range(c.num_hidden_layers):
        table |= _layer(c, i, moe=i >= c.first_k_dense_replace)
    table |= _norms("model", c.hidden_size, "norm")
    if not c.tie_word_embeddings:
        table["lm_head.weight"] = _linear(c.vocab_size, c.hidden_size)
    return table


def mtp_tensors(config: ModelConfig) -> dict[str, Noise]:
    """The tensors of the MTP block, a layer after the last; empty for a model without one."""
    c, prefix = config, f"model.layers.{config.num_hidden_layers}"
    if not c.num_nextn_predict_layers:
        return {}
    return (
        _norms(prefix, c.hidden_size, "enorm", "hnorm", "shared_head.norm")
        | {f"{prefix}.eh_proj.weight": _linear(c.hidden_size, 2 * c.hidden_size)}
        | _layer(c, c.num_hidden_layers, moe=True)
    )


def _layer(c: ModelConfig, index: int, moe: bool) -> dict[str, Noise]:
    prefix = f"model.layers.{index}"
    mlp = _moe if moe else _mlp
    return (
        _norms(prefix, c.hidden_size, "input_layernorm", "post_attention_layernorm")
        | _attention(c, f"{prefix}.self_attn")
        | mlp(c, f"{prefix}.mlp")
    )


def _attention(c: ModelConfig, prefix: str) -> dict[str, Noise]:
    q_width, kv_width = (
        heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads)
    )
    widths = {"q": q_width, "k": kv_width, "v": kv_width}
    table = {f"{prefix}.{n}_proj.weight": _linear(w, c.hidden_size) for n, w in widths.items()}
    if c.attention_bias:
        table |= {f"{prefix}.{n}_proj.bias": Noise((w,), 0.3) for n, w in widths.items()}
    if c.use_qk_norm:
        table |= _norms(prefix, c.head_dim, "q_norm", "k_norm")
    return table | {f"{prefix}.o_proj.weight": _linear(c.hidden_size, q_width)}


def _mlp(c: ModelConfig, prefix: str, width: int | None = None) -> dict[str, Noise]:
    width = width or c.intermediate_size
    return {
        f"{prefix}.gate_proj.weight": _linear(width, c.hidden_size),
        f"{prefix}.up_proj.weight": _linear(width, c.hidden_size),
        f"{prefix}.down_proj.weight": _linear(c.hidden_size, width),
    }


def _moe(c: ModelConfig, prefix: str) -> dict[str, Noise]:
    table = {
        f"{prefix}.gate.weight": _linear(c.n_routed_experts, c.hidden_size),
        f"{prefix}.gate.e_score_correction_bias": Noise(
            (c.n_routed_experts,), 0.1, mean=7.0, keep_float32=True
        ),
    }
    for expert in range(c.n_routed_experts):
        table |= _mlp(c, f"{prefix}.experts.{expert}", c.moe_intermediate_size)
    return table | _mlp(c, f"{prefix}.shared_experts", c.shared_intermediate_size)


def _norms(prefix: str, width: int, *names: str) -> dict[str, Noise]:
    return {f"{prefix}.{name}.weight": Noise((width,), 0.1, mean=1.0) for name in names}


def _linear(rows: int, columns: int) -> Noise:
    """Keeps the variance of what it multiplies."""
    return Noise((rows, columns), columns**-0.5)


def _write_weights(folder: Path, c: ModelConfig, seed: int, shards: int, dtype: str) -> None:
    """Shards, the MTP file and the index."""
    files = {
        f"model-{number:05}-of-{shards:05}.safetensors": part
        for number, part in enumerate(_split(tensors(c), shards), 1)
    }
    if mtp := mtp_tensors(c):
        files[MTP_FILE] = mtp
    drawn = (
        (file, {name: _draw(name, noise, seed, dtype) for name, noise in part.items()})
        for file, part in files.items()
    )
    write_safetensors(folder, drawn)


def write_safetensors(folder: Path, files: Iterable[tuple[str, dict[str, np.ndarray]]]) -> None:
    """Write files of named tensors, C-contiguous, and their index; one file in memory at a time.

    Args:
        files: name of a file, and its tensors by HF name.
    """
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for file, arrays in files:
        save_file(arrays, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(arrays, file)
        total_bytes += sum(array.nbytes for array in arrays.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_json(folder / INDEX_FILE, index)


def _split(table: dict[str, Noise], parts: int) -> Iterator[dict[str, Noise]]:
    """Cut a table into runs of about the same number of elements, none of them empty."""
    names = list(table)
    sizes = np.cumsum([np.prod(noise.shape) for noise in table.values()])
    start = 0
    for part in range(1, parts + 1):
        fair = int(np.searchsorted(sizes, sizes[-1] * part / parts)) + 1
        end = max(start + 1, min(fair, len(names) - (parts - part)))
        yield {name: table[name] for name in names[start:end]}
        start = end


def _draw(name: str, noise: Noise, seed: int, dtype: str) -> np.ndarray:
    """Each tensor has its own stream, so that its values do not depend on how files are cut."""
    rng = np.random.default_rng((seed, zlib.crc32(name.encode())))
    values = rng.standard_normal(noise.shape, np.float32)
    values = values * np.float32(noise.std) + np.float32(noise.mean)
    narrow = dtype == "bfloat16" and not noise.keep_float32
    return values.astype(ml_dtypes.bfloat16) if narrow else values


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE: all bytes, pairs of letters as far as they fit, then GLM's special tokens.

    Raises:
        ConfigError: `vocab_size` is below 256 + the special tokens.
    """
    spare = vocab_size - 256 - len(SPECIAL_TOKENS)
    if spare < 0:
        raise ConfigError(
            f"vocab_size {vocab_size} cannot hold 256 bytes and {len(SPECIAL_TOKENS)} special "
            f"tokens; give {256 + len(SPECIAL_TOKENS)} or more, or write no tokenizer"
        )
    merges = [(first, second) for first in MERGED_LETTERS for second in MERGED_LETTERS][:spare]
    vocab = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in TEXT_TOKENS])
    return tokenizer


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copyfile(CHAT_TEMPLATE, folder / CHAT_TEMPLATE.name)
    known = [token for token in CONTROL_TOKENS if tokenizer.token_to_id(token) is not None]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "eos_token": END_TOKENS[0],
            "pad_token": END_TOKENS[0],
            "additional_special_tokens": known,
            "clean_up_tokenization_spaces": False,
        },
    )


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of GLM's end tokens. Raises ConfigError when the tokenizer lacks one of them."""
    vocab = tokenizer.get_vocab()
    if missing := [token for token in END_TOKENS if token not in vocab]:
        raise ConfigError(
            f"the tokenizer has no {', '.join(missing)}, at which a model's answer ends; "
            "add GLM's special tokens to it"
        )
    return tuple(vocab[token] for token in END_TOKENS)


def check_writable(config: ModelConfig, dtype: str) -> None:
    """Raise ConfigError for an unknown dtype or a quantised config."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if config.quant is not None:
        raise ConfigError("quantised checkpoints are not written; give a config without")


def _check_shards(config: ModelConfig, shards: int) -> None:
    count = len(tensors(config))
    if not 1 <= shards <= count:
        raise ConfigError(f"shards is {shards}, expected 1 to {count} (one tensor each)")


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
