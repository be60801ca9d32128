"""Grouped-query attention with partial rotary embedding over the paged KV pool."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.model.quant import Activation, Weight, matmul
from glmjax.model.spec import ParamSpec, param
from pallas_kernels.backend import Backend
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rope import Rotation, rope_table, rotate_and_store


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVPool:
    """Keys and values of all layers and pages, k and v [L, P, S, K, h]. Page 0 is scratch."""

    k: jax.Array
    v: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Sequences whose query tokens lie in `tokens` places from `first` on. R rows.

    Attributes:
        slots: int32 [R], each row's place in the page table; out of range for padding.
        held: int32 [R], pages that each row has; what goes beyond them goes to scratch.
        q_starts: int32 [R], ascending, each row's first token, counted from `first`.
        q_lens: int32 [R]; 0 for padding.
        seq_lens: int32 [R], lengths with the query tokens.
        first, tokens: static.
        max_q_len: static bound of q_lens.
    """

    slots: jax.Array
    held: jax.Array
    q_starts: jax.Array
    q_lens: jax.Array
    seq_lens: jax.Array
    first: int = field(metadata={"static": True})
    tokens: int = field(metadata={"static": True})
    max_q_len: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Query tokens of one or more sets of rows, and where their sequences lie. T tokens.

    Attributes:
        positions: int32 [T].
        valid: bool [T]; false for padding.
        page_ids, offsets: int32 [T], where each token's K and V go; padding to page 0.
        page_table: int32 [B, W].
        parts: the sets, one after another.
    """

    positions: jax.Array
    valid: jax.Array
    page_ids: jax.Array
    offsets: jax.Array
    page_table: jax.Array
    parts: tuple[Rows, ...]

    def attend(
        self,
        qkv: jax.Array,
        rotation: Rotation,
        kv: KVPool,
        layer: jax.Array,
        scale: float,
        backend: Backend,
    ) -> tuple[jax.Array, KVPool]:
        """Write keys and values into the pool, then look back from the queries -> [T, H, h]."""
        places = layer, self.page_ids, self.offsets
        q, keys, values = rotate_and_store(qkv, rotation, kv.k, kv.v, *places, backend=backend)
        out = [
            paged_attention(
                q[part.first : part.first + part.tokens],
                keys,
                values,
                layer,
                self.page_table,
                part.slots,
                part.q_starts,
                part.q_lens,
                part.seq_lens,
                max_q_len=part.max_q_len,
                scale=scale,
                backend=backend,
            )
            for part in self.parts
        ]
        return jnp.concatenate(out), KVPool(keys, values)


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
        self,
        qkv: jax.Array,
        rotation: Rotation,
        kv: Any,
        layer: jax.Array,
        scale: float,
        backend: Backend,
    ) -> tuple[jax.Array, Any]:
        """Causal attention [T, H, h] over the keys and values of qkv and what `kv` holds.

        Args:
            qkv: [T, K, G + 2, h], projected; `rotation` makes queries, keys and values of it.
        """
        ...


def make_batch(page_table: jax.Array, page_size: int, parts: tuple[Rows, ...]) -> Batch:
    """Positions and places in the pool of every token of `parts`; page_table int32 [B, W]."""
    placed = zip(*(_placed(part, page_table, page_size) for part in parts), strict=True)
    positions, valid, page_ids, offsets = (jnp.concatenate(arrays) for arrays in placed)
    return Batch(positions, valid, page_ids, offsets, page_table, parts)


def split_rows(rows: Rows, size: int) -> Rows:
    """The same tokens in rows of at most `size`, so that one long row does not widen the others."""
    blocks = -(-rows.q_lens // size)
    ends = jnp.cumsum(blocks)
    place = jnp.arange(rows.tokens // size + rows.q_lens.shape[0], dtype=jnp.int32)
    row = jnp.minimum(jnp.searchsorted(ends, place, side="right"), rows.q_lens.shape[0] - 1)
    offset = (place - (ends - blocks)[row]) * size
    real = place < ends[-1]
    q_lens = jnp.where(real, jnp.clip(rows.q_lens[row] - offset, 0, size), 0)
    return replace(
        rows,
        slots=rows.slots[row],
        held=rows.held[row],
        q_starts=jnp.where(real, rows.q_starts[row] + offset, rows.tokens),
        q_lens=q_lens,
        # Attention goes as far as the longest row: those that are none must not lengthen it.
        seq_lens=jnp.where(real, (rows.seq_lens - rows.q_lens)[row] + offset + q_lens, 0),
        max_q_len=size,
    )


def _placed(part: Rows, page_table: jax.Array, page_size: int) -> tuple[jax.Array, ...]:
    """positions, valid, page_ids and offsets of a part's tokens."""
    row = row_of_token(part)
    inner = jnp.arange(part.tokens, dtype=jnp.int32) - part.q_starts[row]
    valid = (inner >= 0) & (inner < part.q_lens[row])
    positions = jnp.where(valid, inner + (part.seq_lens - part.q_lens)[row], 0)
    page = positions // page_size
    stored = valid & (page < part.held[row])
    page_ids = page_table.at[part.slots[row], page].get(mode="fill", fill_value=0)
    return positions, valid, jnp.where(stored, page_ids, 0), positions % page_size


def row_of_token(part: Rows) -> jax.Array:
    """The last row that starts at or before each of a part's tokens, int32 [tokens]."""
    place = jnp.arange(part.tokens, dtype=jnp.int32)
    return jnp.maximum(jnp.searchsorted(part.q_starts, place, side="right") - 1, 0)


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
        x: Activation,
        vectors: dict[str, jax.Array],
        kv: Any,
        layout: Layout,
        layer: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """x [T, D] -> [T, D] to be summed over tensor-parallel devices, and the pool written."""
        c, dtype, tokens = self.config, x.rows.dtype, x.rows.shape[0]
        weight = self.qkv_proj.get_value()
        qkv = matmul(x.of(weight), weight, dtype, c.kernels)
        rotation = self._rotation(vectors, layout.positions)
        out, kv = layout.attend(qkv, rotation, kv, layer, c.head_dim**-0.5, c.kernels)
        return matmul(out.reshape(tokens, -1), self.o_proj.get_value(), dtype, c.kernels), kv

    def inputs(self) -> tuple[Weight, ...]:
        """The weights that a layer's norm is multiplied with."""
        return (self.qkv_proj.get_value(),)

    def _rotation(self, vectors: dict[str, jax.Array], positions: jax.Array) -> Rotation:
        """What is done to projected heads before they attend."""
        c = self.config
        cos, sin = rope_table(positions, c.rotary_dim, c.rope_theta)
        bias, q_norm, k_norm = (vectors.get(name) for name in ("qkv_bias", "q_norm", "k_norm"))
        return Rotation(bias, q_norm, k_norm, cos, sin, c.rms_norm_eps)
