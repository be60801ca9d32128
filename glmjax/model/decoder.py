"""The main model: embedding, pre-norm blocks, final norm, logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.model.attention import Attention, Layout
from glmjax.model.blocks import map_blocks, run_in_blocks
from glmjax.model.layers import DenseMLP, LayerVectors, embed, logits
from glmjax.model.moe import MoE, Routing
from glmjax.model.quant import Activation, takes_rows
from glmjax.model.spec import param
from glmjax.sharding import psum_tensor
from pallas_kernels.norm import add_rms_norm

Vectors = dict[str, jax.Array]


class DecoderLayer(nnx.Module):
    """x += attn(norm(x)); x += mlp(norm(x)). The residual stream is carried beside the last part.

    Two sums over tensor-parallel devices: one after attention, one after the MLP.
    """

    def __init__(self, config: ModelConfig, moe: bool):
        self.config = config
        self.self_attn = Attention(config)
        self.mlp = MoE(config) if moe else DenseMLP(config)

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array,
        vectors: Vectors,
        kv: Any,
        layout: Layout,
        layer: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Any, Routing | None]:
        """x and residual [T, D], whose sum is the stream, -> the same after this layer."""
        normed, residual = self._norm(x, residual, vectors["input_layernorm"], self.self_attn)
        x, kv = self.self_attn(normed, vectors, kv, layout, layer)
        x = psum_tensor(x)
        normed, residual = self._norm(x, residual, vectors["post_attention_layernorm"], self.mlp)
        x, routing = self.mlp(normed, vectors, layout.valid)
        return psum_tensor(x), residual, kv, routing

    def _norm(
        self,
        x: jax.Array,
        residual: jax.Array,
        weight: jax.Array,
        block: Attention | DenseMLP | MoE,
    ) -> tuple[Activation, jax.Array]:
        """The stream normed, in each form that the weights of `block` take; and the stream."""
        eps, backend = self.config.rms_norm_eps, self.config.kernels
        quantize = any(takes_rows(weight) for weight in block.inputs())
        rows, quantized, residual = add_rms_norm(
            x, residual, weight, eps, quantize=quantize, backend=backend
        )
        return Activation(rows, quantized), residual


@partial(jax.jit, static_argnums=0)
def _layer_step(graph: Any, params: Any, *args: Any) -> Any:
    """One layer as an inner jit: layers of one kind are traced and lowered once."""
    return nnx.merge(graph, nnx.State(params))(*args)


def run_layer(layer: DecoderLayer, index: int, *args: Any) -> Any:
    """Apply a layer whose K and V lie at `index` of the pool."""
    graph, params = nnx.split(layer)
    return _layer_step(graph, nnx.to_pure_dict(params), *args, jnp.int32(index))


class Decoder(nnx.Module):
    """Glm4MoeForCausalLM without its MTP block."""

    def __init__(self, config: ModelConfig):
        c = config
        self.config = config
        self.embed_tokens = param((c.vocab_size, c.hidden_size), c.dtype, ("vocab", "embed"))
        self.layers = nnx.List(
            [
                DecoderLayer(config, moe=i >= c.first_k_dense_replace)
                for i in range(c.num_hidden_layers)
            ]
        )
        self.vectors = LayerVectors(config, c.num_hidden_layers, c.num_moe_layers)
        self.norm = param((c.hidden_size,), c.dtype, ("embed",))
        self.lm_head = param((c.vocab_size, c.hidden_size), c.dtype, ("vocab", "embed"))

    def __call__(
        self, input_ids: jax.Array, kv: Any, layout: Layout
    ) -> tuple[jax.Array, Any, list[Routing]]:
        """int32 [T] -> states after the final norm [T, D], the pool written, and all routings."""
        if self.config.deterministic:
            return run_in_blocks(self._forward, (input_ids,), kv, layout)
        return self._forward(input_ids, kv, layout)

    def _forward(
        self, input_ids: jax.Array, kv: Any, layout: Layout
    ) -> tuple[jax.Array, Any, list[Routing]]:
        x = embed(input_ids, self.embed_tokens.get_value())
        residual, routings = jnp.zeros_like(x), []
        for i, layer in enumerate(self.layers):
            vectors = self.vectors.row(i)
            x, residual, kv, routing = run_layer(layer, i, x, residual, vectors, kv, layout)
            routings += [] if routing is None else [routing]
        eps, backend = self.config.rms_norm_eps, self.config.kernels
        x, _, _ = add_rms_norm(x, residual, self.norm.get_value(), eps, backend=backend)
        return x, kv, routings

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [R, D] after the final norm -> float32 [R, V]."""
        head = self.lm_head.get_value()
        if not self.config.deterministic:
            return logits(hidden, head)
        return map_blocks(lambda _, x: ((), logits(x, head)), (), hidden, hidden.shape[0])[1]
