"""The multi-token prediction block: drafts the token after next from a hidden state."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.model.attention import Layout
from glmjax.model.blocks import run_in_blocks
from glmjax.model.decoder import DecoderLayer, run_layer
from glmjax.model.layers import LayerVectors
from glmjax.model.moe import Routing
from glmjax.model.quant import matmul
from glmjax.model.spec import param
from pallas_kernels.norm import add_rms_norm, rms_norm


class MTP(nnx.Module):
    """Layer `num_hidden_layers` of the checkpoint. Shares the main embedding and lm_head."""

    def __init__(self, config: ModelConfig):
        c = config
        self.config = config
        self.enorm = param((c.hidden_size,), c.dtype, ("embed",))
        self.hnorm = param((c.hidden_size,), c.dtype, ("embed",))
        self.eh_proj = param((c.hidden_size, 2 * c.hidden_size), c.dtype, ("embed", None))
        self.layer = DecoderLayer(config, moe=True)
        self.vectors = LayerVectors(config, layers=1, moe_layers=1)
        self.shared_head_norm = param((c.hidden_size,), c.dtype, ("embed",))

    def __call__(
        self,
        embedded: jax.Array,
        hidden: jax.Array,
        kv: Any,
        layout: Layout,
        kv_layer: int,
    ) -> tuple[jax.Array, Any, Routing]:
        """One pass of the block.

        Args:
            embedded: [T, D], main embedding of the token that follows each position.
            hidden: [T, D], the main model's state after its final norm, or, in a chain of
                drafts, what this returned: the state after `shared_head.norm`.
            kv_layer: where the block's own K and V lie in the pool.

        Returns:
            [T, D] after `shared_head.norm`, ready for the main lm_head and for the next draft;
            the pool written; which experts were chosen.
        """
        forward = partial(self._forward, kv_layer=kv_layer)
        if self.config.deterministic:
            return run_in_blocks(forward, (embedded, hidden), kv, layout)
        return forward(embedded, hidden, kv, layout)

    def _forward(
        self, embedded: jax.Array, hidden: jax.Array, kv: Any, layout: Layout, kv_layer: int
    ) -> tuple[jax.Array, Any, Routing]:
        eps = self.config.rms_norm_eps
        parts = [
            rms_norm(embedded, self.enorm.get_value(), eps),
            rms_norm(hidden, self.hnorm.get_value(), eps),
        ]
        backend = self.config.kernels
        both = jnp.concatenate(parts, axis=-1)
        x = matmul(both, self.eh_proj.get_value(), both.dtype, backend)
        x, residual, kv, routing = run_layer(
            self.layer, kv_layer, x, jnp.zeros_like(x), self.vectors.row(0), kv, layout
        )
        weight = self.shared_head_norm.get_value()
        x, _, _ = add_rms_norm(x, residual, weight, eps, backend=backend)
        return x, kv, routing
