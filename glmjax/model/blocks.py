"""Tokens in blocks of one size: whatever a step's shape, each token meets the same operations.

A product of another shape may add up in another order, and bfloat16 shows it. Here it has one shape
in every program. The loop counts at run time: unrolled into what surrounds it, its body would be
compiled otherwise in one program than in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from glmjax.model.attention import Batch, Layout, Rows, row_of_token

BLOCK_TOKENS = 16  # fewer: weights are read more often; more: a lone token computes more padding


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tokens:
    """A batch's tokens apart from each other: int32 or bool [T] each, as in `Batch` and `Rows`."""

    positions: jax.Array
    valid: jax.Array
    page_ids: jax.Array
    offsets: jax.Array
    slots: jax.Array

    @classmethod
    def of(cls, batch: Batch) -> Tokens:
        slots = jnp.concatenate([part.slots[row_of_token(part)] for part in batch.parts])
        return cls(batch.positions, batch.valid, batch.page_ids, batch.offsets, slots)

    def batch(self, page_table: jax.Array) -> Batch:
        """Each token as a row of its own: one shape of attention, wherever a token comes from."""
        n, lens = self.valid.shape[0], self.valid.astype(jnp.int32)
        ends = jnp.where(self.valid, self.positions + 1, 0)
        starts = jnp.arange(n, dtype=jnp.int32)
        rows = Rows(self.slots, jnp.zeros_like(ends), starts, lens, ends, 0, n, 1)
        placed = self.positions, self.valid, self.page_ids, self.offsets
        return Batch(*placed, page_table, (rows,))


def run_in_blocks(
    forward: Callable[..., tuple[jax.Array, Any, Any]],
    inputs: tuple[jax.Array, ...],
    kv: Any,
    layout: Layout,
) -> tuple[jax.Array, Any, Any]:
    """`forward(*inputs, kv, layout)` over the paged pool, a block of tokens after another.

    What a block writes to the pool the next ones see, so causal attention is as ever.

    Args:
        forward: (*inputs, kv, layout) -> (out [T, ...], the pool written, tree of arrays [T, ...]).
        inputs: arrays [T, ...].
        layout: a `Batch`.
    """
    assert isinstance(layout, Batch), "a trainer's sequences have no pool"

    def block(kv: Any, part: tuple[tuple[jax.Array, ...], Tokens]) -> tuple[Any, Any]:
        out, kv, rest = forward(*part[0], kv, part[1].batch(layout.page_table))
        return kv, (out, rest)

    place = jnp.arange(layout.valid.shape[0], dtype=jnp.int32)
    count = jnp.max(jnp.where(layout.valid, place + 1, 0))
    kv, (out, rest) = map_blocks(block, kv, (inputs, Tokens.of(layout)), count)
    return out, kv, rest


def map_blocks(
    fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, tokens: Any, count: jax.Array | int
) -> tuple[Any, Any]:
    """Apply `fn` to blocks of BLOCK_TOKENS tokens, one after another.

    Args:
        fn: (carry, tree of arrays [BLOCK_TOKENS, ...]) -> (carry, such a tree). Padding is zeros.
        carry: what each block hands to the next.
        tokens: tree of arrays [T, ...].
        count: how many tokens, from the first on, matter; blocks behind them are left out.

    Returns:
        The last carry, and a tree of arrays [T, ...], zeros in the blocks that were left out.
    """
    total = jax.tree.leaves(tokens)[0].shape[0]
    padded = jax.tree.map(lambda x: _pad(x, -total % BLOCK_TOKENS), tokens)
    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _output(fn, carry, padded))

    def visit(i: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, out = state
        carry, new = fn(carry, _block(padded, i))
        return carry, jax.tree.map(lambda old, x: _put(old, x, i), out, new)

    blocks = jax.lax.optimization_barrier(jnp.int32(-(-count // BLOCK_TOKENS)))
    carry, out = jax.lax.fori_loop(0, blocks, visit, (carry, out))
    return carry, jax.tree.map(lambda x: x[:total], out)


def _pad(x: jax.Array, missing: int) -> jax.Array:
    return jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))


def _block(tokens: Any, i: jax.Array | int) -> Any:
    def cut(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, i * BLOCK_TOKENS, BLOCK_TOKENS)

    return jax.tree.map(cut, tokens)


def _put(out: jax.Array, block: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, block, i * BLOCK_TOKENS, 0)


def _output(fn: Callable[[Any, Any], tuple[Any, Any]], carry: Any, padded: Any) -> Any:
    """Shapes of all blocks' outputs together."""
    tokens = jax.tree.leaves(padded)[0].shape[0]
    block = jax.eval_shape(lambda: fn(carry, _block(padded, 0))[1])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((tokens, *x.shape[1:]), x.dtype), block)
