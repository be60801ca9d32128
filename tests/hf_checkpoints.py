"""Random HF checkpoints, odd ones too, and what their parameter trees must be.

The trees are put together here from the names of the HF format, independently of `convert`.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from glmjax.bench.synthetic import hf_config, mtp_tensors, tensors
from glmjax.config import ModelConfig

Tensors = dict[str, np.ndarray]

FP8 = ml_dtypes.float8_e4m3fn
BIAS = "e_score_correction_bias"
INDEX = "model.safetensors.index.json"

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=3,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=8,
    n_routed_experts=6,
    num_experts_per_tok=2,
    n_shared_experts=2,
    first_k_dense_replace=1,
    use_qk_norm=True,
    attention_bias=True,
)
# Matrices above the smallest chunk, so that they are cut for a mesh.
SMALL = replace(
    TINY,
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=2048,
    moe_intermediate_size=512,
    num_hidden_layers=2,
    head_dim=64,
    n_routed_experts=8,
)


def draw(config: ModelConfig, seed: int = 0) -> Tensors:
    """Random tensors by HF name, the MTP block's too, in the config's dtype."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, noise in (tensors(config) | mtp_tensors(config)).items():
        values = rng.standard_normal(noise.shape, np.float32) * noise.std + noise.mean
        drawn[name] = values.astype(np.float32 if noise.keep_float32 else config.dtype)
    return drawn


def write(
    folder: Path,
    config: ModelConfig,
    stored: Tensors,
    shards: int = 3,
    **extra: Any,
) -> Path:
    """Write config.json, an index, `shards` files and, for an MTP block, mtp.safetensors.

    Args:
        shards: 0: one model.safetensors, without an index.
        extra: more keys of config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    raw = hf_config(config, config.dtype, (1, 2)) | extra
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"tokenizer": "of a test"}')
    if shards == 0:
        save_file(stored, folder / "model.safetensors")
        return folder
    mtp = f"model.layers.{config.num_hidden_layers}."
    weight_map = {
        name: "mtp.safetensors" if name.startswith(mtp) else f"model-{i % shards}.safetensors"
        for i, name in enumerate(stored)
    }
    for file in sorted(set(weight_map.values())):
        save_file({n: a for n, a in stored.items() if weight_map[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def is_linear(name: str) -> bool:
    """Whether FP8 releases quantise this tensor."""
    return name.endswith("_proj.weight") and not name.endswith("eh_proj.weight")


def quantise(
    stored: Tensors, block: tuple[int, int] | None, scale_dtype: Any = np.float32
) -> Tensors:
    """Linear layers as FP8 and scales; one a block, or one a row."""
    suffix = "_scale_inv" if block else "_scale"
    result = {}
    for name, values in stored.items():
        if not is_linear(name):
            result[name] = values
            continue
        scale = _narrowed(_scales(values.astype(np.float32), block), scale_dtype)
        spread = _spread(scale, values.shape, block)
        result[name] = (values.astype(np.float32) / spread).astype(FP8)
        result[name + suffix] = scale
    return result


def _narrowed(scale: np.ndarray, dtype: Any) -> np.ndarray:
    """Scales in `dtype`; a power of two is the next above, so that no value leaves FP8's range."""
    powers = np.dtype(dtype) == ml_dtypes.float8_e8m0fnu
    return (2.0 ** np.ceil(np.log2(scale)) if powers else scale).astype(dtype)


def quantization_config(block: tuple[int, int] | None, stored: Tensors) -> dict[str, Any]:
    """As compressed-tensors (one scale a row) or RL toolchains (one a block) write it."""
    ignore = ["lm_head", *(n.removesuffix(".weight") for n in stored if n.endswith("mlp.gate"))]
    if block:
        return {
            "quant_method": "fp8",
            "weight_block_size": list(block),
            "modules_to_not_convert": ignore,
        }
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ignore}


def dequantised(stored: Tensors, block: tuple[int, int] | None) -> Tensors:
    """Float32 values times scales, and all that is no scale as it is."""
    result = {}
    for name, values in stored.items():
        if values.dtype == FP8:
            scale = stored[name + ("_scale_inv" if block else "_scale")]
            values = values.astype(np.float32) * _spread(scale, values.shape, block)
        if not name.endswith(("_scale", "_scale_inv")):
            result[name] = values
    return result


def row_scales(stored: Tensors, block: tuple[int, int] | None) -> Tensors:
    """Scales of each FP8 tensor, float32 [out, blocks of columns], under the tensor's own name."""
    rows, suffix = (block[0], "_scale_inv") if block else (1, "_scale")
    return {
        name: np.repeat(stored[name + suffix].astype(np.float32), rows, 0)[: len(values)]
        for name, values in stored.items()
        if values.dtype == FP8
    }


def _scales(values: np.ndarray, block: tuple[int, int] | None) -> np.ndarray:
    rows, columns = block or (1, values.shape[1])
    counts = [math.ceil(n / b) for n, b in zip(values.shape, (rows, columns), strict=True)]
    padding = [
        (0, c * b - n) for c, b, n in zip(counts, (rows, columns), values.shape, strict=True)
    ]
    tiles = np.pad(np.abs(values), padding).reshape(counts[0], rows, counts[1], columns)
    return tiles.max((1, 3)) / 448


def _spread(scale: np.ndarray, shape: tuple[int, ...], block: tuple[int, int] | None) -> np.ndarray:
    rows, columns = block or (1, shape[1])
    spread = np.repeat(np.repeat(scale.astype(np.float32), rows, 0), columns, 1)
    return spread[: shape[0], : shape[1]]


def matrices(c: ModelConfig, prefix: str, moe: bool, stored: Tensors) -> Tensors:
    """Fused linear layers of one layer, of values or of scales: any number of columns."""

    def qkv(name: str, heads: int) -> np.ndarray:
        weight = stored[f"{prefix}.self_attn.{name}_proj.weight"]
        return weight.reshape(c.num_key_value_heads, heads, c.head_dim, -1)

    def mlp(name: str) -> tuple[np.ndarray, np.ndarray]:
        parts = (stored[f"{prefix}.mlp{name}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        gate, up, down = parts
        return np.stack([gate, up]), down

    group = c.num_attention_heads // c.num_key_value_heads
    fused = {
        "self_attn/qkv_proj": np.concatenate([qkv("q", group), qkv("k", 1), qkv("v", 1)], axis=1),
        "self_attn/o_proj": stored[f"{prefix}.self_attn.o_proj.weight"],
    }
    if not moe:
        gate_up, down = mlp("")
        return fused | {"mlp/gate_up_proj": gate_up, "mlp/down_proj": down}
    experts = [mlp(f".experts.{e}") for e in range(c.n_routed_experts)]
    shared = mlp(".shared_experts")
    return fused | {
        "mlp/experts_gate_up_proj": np.stack([gate_up for gate_up, _ in experts]),
        "mlp/experts_down_proj": np.stack([down for _, down in experts]),
        "mlp/shared_gate_up_proj": shared[0],
        "mlp/shared_down_proj": shared[1],
    }


def vectors(c: ModelConfig, layers: list[int], stored: Tensors) -> Tensors:
    """Stacked norms and biases of `layers`, the correction bias of those that are MoE."""

    def stack(suffix: str, of: list[int] = layers) -> np.ndarray:
        return np.stack([stored[f"model.layers.{i}.{suffix}"] for i in of])

    stacked = {
        name: stack(f"{name}.weight") for name in ("input_layernorm", "post_attention_layernorm")
    }
    if c.use_qk_norm:
        stacked |= {name: stack(f"self_attn.{name}.weight") for name in ("q_norm", "k_norm")}
    if c.attention_bias:
        shape = (len(layers), c.num_key_value_heads, -1, c.head_dim)
        parts = [stack(f"self_attn.{p}_proj.bias").reshape(shape) for p in "qkv"]
        stacked["qkv_bias"] = np.concatenate(parts, axis=2)
    moe = [i for i in layers if i >= c.first_k_dense_replace]
    if moe:
        stacked[BIAS] = stack(f"mlp.gate.{BIAS}", moe)
    return stacked


def tree(c: ModelConfig, stored: Tensors) -> dict[str, np.ndarray]:
    """The whole expected tree by path, the MTP block under "mtp/". Unquantised tensors."""
    layers = list(range(c.num_hidden_layers))
    embed = stored["model.embed_tokens.weight"]
    leaves = {
        "embed_tokens": embed,
        "norm": stored["model.norm.weight"],
        "lm_head": embed if c.tie_word_embeddings else stored["lm_head.weight"],
    }
    leaves |= {f"vectors/{k}": v for k, v in vectors(c, layers, stored).items()}
    for i in layers:
        leaves |= _layer(c, i, f"layers/{i}", stored)
    last = f"model.layers.{c.num_hidden_layers}"
    if f"{last}.eh_proj.weight" in stored:
        own = {"enorm", "hnorm", "eh_proj"}
        leaves |= {f"mtp/{name}": stored[f"{last}.{name}.weight"] for name in own}
        leaves["mtp/shared_head_norm"] = stored[f"{last}.shared_head.norm.weight"]
        block = vectors(c, [c.num_hidden_layers], stored)
        leaves |= {f"mtp/vectors/{k}": v for k, v in block.items()}
        leaves |= _layer(c, c.num_hidden_layers, "mtp/layer", stored)
    return leaves


def _layer(c: ModelConfig, index: int, root: str, stored: Tensors) -> Tensors:
    prefix, moe = f"model.layers.{index}", index >= c.first_k_dense_replace
    leaves = {f"{root}/{k}": v for k, v in matrices(c, prefix, moe, stored).items()}
    gate = {f"{root}/mlp/gate": stored[f"{prefix}.mlp.gate.weight"]} if moe else {}
    return leaves | gate


def fp8_tree(c: ModelConfig, stored: Tensors, block: tuple[int, int] | None = None) -> Tensors:
    """The tree of an FP8 checkpoint: fused values, fused scales, and the rest."""
    plain = {n: a for n, a in stored.items() if not n.endswith(("_scale", "_scale_inv"))}
    scales = row_scales(stored, block)
    # The rest has no scales: its own values stand in where only paths matter.
    values, scale = tree(c, plain), tree(c, plain | scales)
    leaves = {path: a for path, a in values.items() if a.dtype != FP8}
    for path, array in values.items():
        if array.dtype == FP8:
            leaves |= {f"{path}/values": array, f"{path}/scale": scale[path]}
    return leaves
