"""Runs a model's forward pass over a paged pool, with none of the engine around it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.model.attention import KVPool, Rows, kv_specs, make_batch
from glmjax.model.decoder import Decoder
from glmjax.model.layers import embed
from glmjax.model.mtp import MTP
from glmjax.model.spec import axes_tree
from glmjax.sharding import placement, shard_map

PAGE_SIZE, PAGES = 4, 24
# pages in no order: nothing may rely on neighbours
TABLE = np.random.default_rng(3).permutation(np.arange(1, PAGES))[None]


class Forward:
    """One sequence through a model and its MTP block, chunk by chunk.

    Args:
        params: the tree of `Decoder`; `mtp` that of `MTP`, or None.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, params: Any, mtp: Any = None):
        self.config, self.mesh, self.params, self.mtp = config, mesh, params, mtp
        layers = config.num_hidden_layers + 1
        self.kv_axes = axes_tree(kv_specs(config, layers, PAGES, PAGE_SIZE, config.dtype))
        shape = (layers, PAGES, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
        self.kv = KVPool(*(jnp.zeros(shape, config.dtype) for _ in "kv"))
        self.graph = nnx.graphdef(Decoder(config))
        self.lens = {"main": 0, "mtp": 0}
        axes = placement(params)
        self.run_main = self._mapped(self._main_step, (axes, self.kv_axes, (None,), ()))
        if mtp is not None:
            self.mtp_graph = nnx.graphdef(MTP(config))
            trees = (axes, placement(mtp), self.kv_axes)
            self.run_mtp = self._mapped(self._mtp_step, (*trees, (None,), (None, None), ()))

    def main(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next tokens int32 [n] -> logits [n, V] and final hidden states [n, D]."""
        arguments = self.params, self.kv, jnp.asarray(ids), self.lens["main"]
        self.kv, logits, hidden = self.run_main(*arguments)
        self.lens["main"] += len(ids)
        return np.asarray(logits), np.asarray(hidden)

    def draft(self, ids: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens that follow int32 [n], states [n, D] -> logits [n, V] and states [n, D]."""
        arguments = jnp.asarray(ids), jnp.asarray(hidden), self.lens["mtp"]
        self.kv, logits, hidden = self.run_mtp(self.params, self.mtp, self.kv, *arguments)
        self.lens["mtp"] += len(ids)
        return np.asarray(logits), np.asarray(hidden)

    def _main_step(self, params, kv, ids, start):
        decoder = nnx.merge(self.graph, nnx.State(params))
        hidden, kv, _ = decoder(ids, kv, self._batch(start, ids.shape[0]))
        return kv, decoder.logits(hidden), hidden

    def _mtp_step(self, params, mtp, kv, ids, hidden, start):
        decoder = nnx.merge(self.graph, nnx.State(params))
        block = nnx.merge(self.mtp_graph, nnx.State(mtp))
        embedded = embed(ids, decoder.embed_tokens.get_value())
        batch = self._batch(start, ids.shape[0])
        hidden, kv, _ = block(embedded, hidden, kv, batch, self.config.num_hidden_layers)
        return kv, decoder.logits(hidden), hidden

    def _mapped(self, step, in_axes):
        out_axes = (self.kv_axes, (None, None), (None, None))
        return jax.jit(shard_map(step, self.mesh, in_axes, out_axes))

    def _batch(self, start, tokens: int):
        lens = jnp.array([tokens])
        zero, held = jnp.array([0]), jnp.array([PAGES])
        rows = Rows(zero, held, zero, lens, start + lens, 0, tokens, tokens)
        return make_batch(jnp.asarray(TABLE), PAGE_SIZE, (rows,))
