"""Grouped-query attention with partial rotary embedding over the paged KV pool."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.model.quant import matmul
from glmjax.model.spec import ParamSpec, param
from pallas_kernels.norm import rms_norm
from pallas_kernels.paged_attention import paged_attention, write_kv
from pallas_kernels.rope import apply_rope, rope_table


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPool:
    """Keys and values of all layers and pages, k and v [L, P, S, K, h]. Page 0 is scratch."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Packed query tokens, and where their sequences lie. T tokens, R rows, W pages a sequence.

    Attributes:
        positions: int32 [T].
        valid: bool [T]; false for padding.
        page_ids, offsets: int32 [T], where each token's K and V go; padding to page 0.
        page_table: int32 [R, W].
        q_starts, q_lens, seq_lens: int32 [R].
        max_q_len: static bound of q_lens.
    """

    positions: jax.Array
    valid: jax.Array
    page_ids: jax.Array
    offsets: jax.Array
    page_table: jax.Array
    q_starts: jax.Array
    q_lens: jax.Array
    seq_lens: jax.Array
    max_q_len: int = field(metadata={"static": True})

    def attend(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        kv: KVPool,
        layer: jax.Array,
        scale: float,
    ) -> tuple[jax.Array, KVPool]:
        """Write k and v [T, K, h] into the pool, then look back from q [T, H, h] -> [T, H, h]."""
        pools = write_kv(kv.k, kv.v, k, v, layer, self.page_ids, self.offsets)
        rows = self.page_table, self.q_starts, self.q_lens, self.seq_lens
        out = paged_attention(q, *pools, layer, *rows, max_q_len=self.max_q_len, scale=scale)
        return out, KVPool(*pools)


class Layout(Protocol):
    """How tokens form sequences: `Batch` over the paged pool, or a trainer's without one.

    Attributes:
        positions: int32 [T].
        valid: bool [T]; false for padding.
    """

    @property
    def positions(self) -> jax.Array: ...

    @property
    def valid(self) -> jax.Array: ...

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kv: Any, layer: jax.Array, scale: float
    ) -> tuple[jax.Array, Any]:
        """Causal attention of q [T, H, h] over k and v [T, K, h] and what `kv` holds."""
        ...


def make_batch(
    page_table: jax.Array,
    q_lens: jax.Array,
    seq_lens: jax.Array,
    page_size: int,
    tokens: int,
    max_q_len: int,
) -> Batch:
    """Lay out rows one after another in `tokens` places.

    Args:
        page_table: int32 [R, W].
        q_lens: int32 [R], query tokens of each row; their sum is at most `tokens`.
        seq_lens: int32 [R], lengths with the query tokens.
    """
    ends = jnp.cumsum(q_lens)
    q_starts = ends - q_lens
    place = jnp.arange(tokens, dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, place, side="right"), q_lens.shape[0] - 1)
    valid = place < ends[-1]
    positions = jnp.where(valid, place - q_starts[row] + (seq_lens - q_lens)[row], 0)
    page_ids = jnp.where(valid, page_table[row, positions // page_size], 0)
    offsets = positions % page_size
    return Batch(
        positions, valid, page_ids, offsets, page_table, q_starts, q_lens, seq_lens, max_q_len
    )


def kv_specs(config: ModelConfig, layers: int, pages: int, page_size: int, dtype: str) -> KVPool:
    """ParamSpecs of a pool whose `pages` are split over data groups."""
    shape = (layers, pages, page_size, config.num_key_value_heads, config.head_dim)
    spec = ParamSpec(shape, dtype, (None, "pages", None, "kv_heads", None))
    return KVPool(spec, spec)  # pyright: ignore[reportArgumentType]


class Attention(nnx.Module):
    """Self-attention of one layer. Returns this device's part of the output sum.

    qkv_proj is [K, G + 2, h, D]: for each KV head its G query heads, its key, its value, so that a
    shard over K is a whole number of groups. o_proj is HF's [D, H * h].
    """

    def __init__(self, config: ModelConfig):
        c = config
        self.config = config
        qkv = (c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads + 2)
        axes = ("kv_heads", None, None, "embed")
        self.qkv_proj = param((*qkv, c.head_dim, c.hidden_size), c.dtype, axes)
        shape = (c.hidden_size, c.num_attention_heads * c.head_dim)
        self.o_proj = param(shape, c.dtype, ("embed", "heads"))

    def __call__(
        self,
        x: jax.Array,
        vectors: dict[str, jax.Array],
        kv: Any,
        layout: Layout,
        layer: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """x [T, D] -> [T, D] to be summed over tensor-parallel devices, and the pool written."""
        q, k, v = self._project(x, vectors)
        q, k = self._rotate(q, k, vectors, layout.positions)
        out, kv = layout.attend(q, k, v, kv, layer, self.config.head_dim**-0.5)
        return matmul(out.reshape(x.shape[0], -1), self.o_proj.get_value()), kv

    def _project(self, x: jax.Array, vectors: dict[str, jax.Array]):
        """q [T, H, h], k and v [T, K, h] of this device's heads."""
        qkv = matmul(x, self.qkv_proj.get_value())
        if self.config.attention_bias:
            qkv = qkv + vectors["qkv_bias"]
        q = qkv[:, :, :-2].reshape(x.shape[0], -1, self.config.head_dim)
        return q, qkv[:, :, -2], qkv[:, :, -1]

    def _rotate(self, q, k, vectors, positions):
        """QK-norm, where the model has it, then RoPE."""
        if self.config.use_qk_norm:
            q = rms_norm(q, vectors["q_norm"], self.config.rms_norm_eps)
            k = rms_norm(k, vectors["k_norm"], self.config.rms_norm_eps)
        cos, sin = rope_table(positions, self.config.rotary_dim, self.config.rope_theta)
        return apply_rope(q, cos, sin), apply_rope(k, cos, sin)
