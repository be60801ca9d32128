"""Embedding, logits, dense MLP, and the small vectors of all layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.model.quant import Activation, Weight, matmul, takes_rows
from glmjax.model.spec import param
from glmjax.sharding import gather_tensor, psum_tensor, tensor_index
from pallas_kernels.activation import silu_mul
from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import dot


class LayerVectors(nnx.Module):
    """Norms and biases of `layers` layers, stacked: slicing them is free and saves arguments.

    The first `layers - moe_layers` layers are dense and have no row in the correction bias.
    """

    def __init__(self, config: ModelConfig, layers: int, moe_layers: int):
        c, dtype = config, config.dtype
        self.moe_start = layers - moe_layers
        self.input_layernorm = param((layers, c.hidden_size), dtype, (None, "embed"))
        self.post_attention_layernorm = param((layers, c.hidden_size), dtype, (None, "embed"))
        if c.attention_bias:
            groups = c.num_attention_heads // c.num_key_value_heads + 2
            shape = (layers, c.num_key_value_heads, groups, c.head_dim)
            self.qkv_bias = param(shape, dtype, (None, "kv_heads", None, None))
        if c.use_qk_norm:
            self.q_norm = param((layers, c.head_dim), dtype, (None, None))
            self.k_norm = param((layers, c.head_dim), dtype, (None, None))
        if moe_layers:
            shape = (moe_layers, c.n_routed_experts)
            self.e_score_correction_bias = param(shape, "float32", (None, None))

    def row(self, layer: int) -> dict[str, jax.Array]:
        """The vectors of one layer, by name."""
        rows = {}
        for name, stacked in nnx.to_pure_dict(nnx.state(self, nnx.Param)).items():
            index = layer - (self.moe_start if name == "e_score_correction_bias" else 0)
            if index >= 0:
                rows[name] = stacked[index]
        return rows


class DenseMLP(nnx.Module):
    """SwiGLU MLP of the first layers; returns this device's part of the sum."""

    def __init__(self, config: ModelConfig):
        self.config = config
        width, hidden = config.intermediate_size, config.hidden_size
        self.gate_up_proj = param((2, width, hidden), config.dtype, (None, "mlp", "embed"))
        self.down_proj = param((hidden, width), config.dtype, ("embed", "mlp"))

    def __call__(
        self, x: Activation, vectors: dict[str, jax.Array], valid: jax.Array
    ) -> tuple[jax.Array, None]:
        """x [T, D] -> [T, D], still to be summed over tensor-parallel devices; no routing."""
        weights = self.gate_up_proj.get_value(), self.down_proj.get_value()
        return swiglu(x, *weights, self.config.kernels), None

    def inputs(self) -> tuple[Weight, ...]:
        """The weights that a layer's norm is multiplied with."""
        return (self.gate_up_proj.get_value(),)


def swiglu(x: Activation, gate_up: Weight, down: Weight, backend: Backend = REF) -> jax.Array:
    """down(silu(gate x) * up x) with gate_up [2, F, D] and down [D, F]: [T, D] -> [T, D]."""
    dtype = x.rows.dtype
    hidden = matmul(x.of(gate_up), gate_up, dtype, backend)
    hidden = silu_mul(hidden, quantize=takes_rows(down), backend=backend)
    return matmul(hidden, down, dtype, backend)


def embed(input_ids: jax.Array, table: jax.Array) -> jax.Array:
    """Rows of a vocabulary-sharded table [V, D] for int32 [T] -> [T, D], whole on each device."""
    local_ids = input_ids - tensor_index() * table.shape[0]
    here = (local_ids >= 0) & (local_ids < table.shape[0])
    rows = table.at[local_ids].get(mode="clip")
    return psum_tensor(jnp.where(here[:, None], rows, 0))


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Hidden states [R, D] times a vocabulary-sharded head [V, D] -> float32 [R, V], whole."""
    return gather_tensor(dot("rd,vd->rv", hidden, head))
