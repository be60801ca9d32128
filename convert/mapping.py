"""The one table from HF tensor names to leaves of the parameter tree, and how they are fused.

Matrices keep HF's [out, in] order. A leaf that several tensors share has leading axes for them, so
placing a tensor is `leaf[index] = tensor.reshape(leaf[index].shape)`, a copy without transposition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from glmjax.config import ModelConfig

Index = tuple[Any, ...]


class Fp8(Enum):
    """Whether a tensor may be stored in FP8."""

    NEVER = "never"
    ALLOWED = "allowed"
    EXPECTED = "expected"  # a linear layer: FP8 unless the config's ignore list names it


class Stack(Enum):
    """Which row of a leaf that stacks layers a tensor takes."""

    NONE = "none"
    LAYER = "layer"
    MOE = "MoE layer"


@dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        tensor: HF name within its layer; "{expert}" runs over the routed experts.
        leaf: path of its leaf within the layer, or within `vectors` when stacked.
        index: its place there, after the row of its layer or expert.
    """

    tensor: str
    leaf: str
    index: Index = ()
    fp8: Fp8 = Fp8.NEVER
    stack: Stack = Stack.NONE


@dataclass(frozen=True)
class Place:
    """Where one tensor goes: `leaf[index]`."""

    tensor: str
    leaf: str
    index: Index
    fp8: Fp8

    def tensor_shape(self, leaf_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape in HF's file: [out, in], or one axis for a norm or bias."""
        *out, last = view = np.broadcast_to(np.int8(0), leaf_shape)[self.index].shape
        is_vector = "vectors/" in self.leaf or len(leaf_shape) == 1
        return (math.prod(view),) if is_vector else (math.prod(out), last)


_QUERIES, _KEY, _VALUE = np.s_[:, :-2], np.s_[:, -2], np.s_[:, -1]
_GATE, _UP = (0,), (1,)
_LINEAR, _LAYER = Fp8.EXPECTED, Stack.LAYER

MODEL_ROWS = (
    Row("model.embed_tokens.weight", "embed_tokens"),
    Row("model.norm.weight", "norm"),
    Row("lm_head.weight", "lm_head"),
)
LAYER_ROWS = (
    Row("input_layernorm.weight", "input_layernorm", stack=_LAYER),
    Row("post_attention_layernorm.weight", "post_attention_layernorm", stack=_LAYER),
    Row("self_attn.q_proj.weight", "self_attn/qkv_proj", _QUERIES, _LINEAR),
    Row("self_attn.k_proj.weight", "self_attn/qkv_proj", _KEY, _LINEAR),
    Row("self_attn.v_proj.weight", "self_attn/qkv_proj", _VALUE, _LINEAR),
    Row("self_attn.q_proj.bias", "qkv_bias", _QUERIES, stack=_LAYER),
    Row("self_attn.k_proj.bias", "qkv_bias", _KEY, stack=_LAYER),
    Row("self_attn.v_proj.bias", "qkv_bias", _VALUE, stack=_LAYER),
    Row("self_attn.o_proj.weight", "self_attn/o_proj", (), _LINEAR),
    Row("self_attn.q_norm.weight", "q_norm", stack=_LAYER),
    Row("self_attn.k_norm.weight", "k_norm", stack=_LAYER),
    Row("mlp.gate_proj.weight", "mlp/gate_up_proj", _GATE, _LINEAR),
    Row("mlp.up_proj.weight", "mlp/gate_up_proj", _UP, _LINEAR),
    Row("mlp.down_proj.weight", "mlp/down_proj", (), _LINEAR),
    Row("mlp.gate.weight", "mlp/gate"),
    Row("mlp.gate.e_score_correction_bias", "e_score_correction_bias", stack=Stack.MOE),
    Row("mlp.experts.{expert}.gate_proj.weight", "mlp/experts_gate_up_proj", _GATE, _LINEAR),
    Row("mlp.experts.{expert}.up_proj.weight", "mlp/experts_gate_up_proj", _UP, _LINEAR),
    Row("mlp.experts.{expert}.down_proj.weight", "mlp/experts_down_proj", (), _LINEAR),
    Row("mlp.shared_experts.gate_proj.weight", "mlp/shared_gate_up_proj", _GATE, _LINEAR),
    Row("mlp.shared_experts.up_proj.weight", "mlp/shared_gate_up_proj", _UP, _LINEAR),
    Row("mlp.shared_experts.down_proj.weight", "mlp/shared_down_proj", (), _LINEAR),
)
MTP_ROWS = (
    Row("enorm.weight", "enorm"),
    Row("hnorm.weight", "hnorm"),
    Row("eh_proj.weight", "eh_proj", (), Fp8.ALLOWED),
    Row("shared_head.norm.weight", "shared_head_norm"),
)
# The MTP block shares the main embedding and lm_head; some releases repeat them in its layer.
MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def places(config: ModelConfig, leaves: Collection[str]) -> list[Place]:
    """Every tensor of a checkpoint whose tree has `leaves`; those of the MTP block under "mtp/"."""
    found = [
        *_model_places(config),
        *(p for i in range(config.num_hidden_layers) for p in _layer_places(config, i)),
        *_mtp_places(config),
    ]
    return [place for place in found if place.leaf in leaves]


def is_ignored(config: ModelConfig, name: str) -> bool:
    """Whether a tensor is known to repeat what is stored or computed elsewhere."""
    copies = {_prefix(config.num_hidden_layers) + copy for copy in MTP_COPIES}
    return (
        name.endswith("rotary_emb.inv_freq")
        or (config.tie_word_embeddings and name == "lm_head.weight")
        or (config.num_nextn_predict_layers > 0 and re.sub(r"_scale(_inv)?$", "", name) in copies)
    )


def mtp_prefix(config: ModelConfig) -> str:
    """How the names of the MTP block's tensors begin."""
    return _prefix(config.num_hidden_layers)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def _model_places(config: ModelConfig) -> Iterator[Place]:
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}
    for row in MODEL_ROWS:
        yield Place(tied.get(row.tensor, row.tensor), row.leaf, row.index, row.fp8)


def _layer_places(config: ModelConfig, layer: int) -> Iterator[Place]:
    rows = {
        Stack.NONE: None,
        Stack.LAYER: layer,
        Stack.MOE: layer - config.first_k_dense_replace,
    }
    roots = {Stack.NONE: f"layers/{layer}/", Stack.LAYER: "vectors/", Stack.MOE: "vectors/"}
    return _block_places(config, _prefix(layer), rows, roots)


def _mtp_places(config: ModelConfig) -> Iterator[Place]:
    prefix = mtp_prefix(config)
    rows = {Stack.NONE: None, Stack.LAYER: 0, Stack.MOE: 0}
    roots = {Stack.NONE: "mtp/layer/", Stack.LAYER: "mtp/vectors/", Stack.MOE: "mtp/vectors/"}
    yield from _block_places(config, prefix, rows, roots)
    for row in MTP_ROWS:
        yield Place(prefix + row.tensor, f"mtp/{row.leaf}", row.index, row.fp8)


def _block_places(
    config: ModelConfig, prefix: str, rows: dict[Stack, int | None], roots: dict[Stack, str]
) -> Iterator[Place]:
    for row in LAYER_ROWS:
        number, leaf = rows[row.stack], roots[row.stack] + row.leaf
        if number is not None and number < 0:
            continue  # a dense layer has no row among the MoE layers
        index = row.index if number is None else (number, *row.index)
        if "{expert}" in row.tensor:
            for expert in range(config.n_routed_experts):
                name = prefix + row.tensor.format(expert=expert)
                yield Place(name, leaf, (expert, *index), row.fp8)
        else:
            yield Place(prefix + row.tensor, leaf, index, row.fp8)
