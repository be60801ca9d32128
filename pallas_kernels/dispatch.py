"""Carrying tokens to the experts that they chose, and what the experts made of them back.

A routed row is one choice of one token, numbered t * k + j. `align` gives each a place so that the
rows of an expert lie together and begin with a block of `block_rows`: then one block of a grouped
matmul needs one expert's weights. P is static and holds any routing.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import dispatch_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.linear import QuantRows

Rows = TypeVar("Rows", bound=jax.Array | QuantRows)


class Alignment(NamedTuple):
    """Which routed row lies where.

    Attributes:
        rows: int32 [P], the routed row of each place; T * k: padding.
        places: int32 [T, k], the place of each routed row; P where its id is E or more.
        experts: int32 [P // block_rows], each block's expert; meaningless from num_blocks on.
        num_blocks: int32 [1], how many blocks have rows.
    """

    rows: jax.Array
    places: jax.Array
    experts: jax.Array
    num_blocks: jax.Array


def padded_rows(rows: int, experts: int, block_rows: int) -> int:
    """P: places enough for any routing of so many rows, in whole blocks.

    Each expert has at most block_rows - 1 places of padding, and none if it has no row.
    """
    blocks = min(rows, (rows + experts * (block_rows - 1)) // block_rows)
    return blocks * block_rows


def align(
    ids: jax.Array, num_experts: int, block_rows: int, *, backend: Backend = REF
) -> Alignment:
    """Order routed rows by expert, each expert's rows padded to whole blocks.

    Args:
        ids: int32 [T, k]; an id of E or more gets no place.

    Returns:
        Experts in order, the rows of one in their order; nothing is sorted.
    """
    places = padded_rows(ids.size, num_experts, block_rows)
    if backend.kernels:
        parts = dispatch_triton.align(
            ids, num_experts, block_rows, places, interpret=backend.interpret
        )
        return Alignment(*parts)
    flat, experts = ids.reshape(-1), jnp.arange(num_experts)
    one_hot = (flat[:, None] == experts).astype(jnp.int32)
    blocks = -(-jnp.sum(one_hot, axis=0) // block_rows)
    ends = jnp.cumsum(blocks)
    starts = (ends - blocks) * block_rows
    place = jnp.sum((starts + jnp.cumsum(one_hot, axis=0) - 1) * one_hot, axis=1)
    place = jnp.where(flat < num_experts, place, places)
    rows = jnp.full(places, ids.size, jnp.int32)
    return Alignment(
        rows.at[place].set(jnp.arange(ids.size, dtype=jnp.int32), mode="drop"),
        place.reshape(ids.shape),
        _owners(ends, places // block_rows),
        ends[-1:],
    )


def _owners(ends: jax.Array, blocks: int) -> jax.Array:
    """The expert of each block, of int32 [E] blocks before each expert's end."""
    before = jnp.sum(jnp.arange(blocks)[:, None] >= ends, axis=1, dtype=jnp.int32)
    return jnp.minimum(before, ends.shape[0] - 1)


def gather_rows(x: Rows, alignment: Alignment, k: int, *, backend: Backend = REF) -> Rows:
    """Each token's row at the places of its `k` choices; padding is zeros, with a scale of 1.

    Args:
        x: [T, K] in any dtype, or quantised.

    Returns:
        P rows of the same kind.
    """
    parts, kind = jax.tree.flatten(x)
    if backend.kernels:
        gathered = dispatch_triton.gather(parts, alignment.rows, k, interpret=backend.interpret)
    else:
        tokens = alignment.rows // k
        gathered = [
            part.at[tokens].get(mode="fill", fill_value=fill)
            for part, fill in zip(parts, (0, 1), strict=False)
        ]
    return jax.tree.unflatten(kind, gathered)


def combine(
    out: jax.Array,
    places: jax.Array,
    weights: jax.Array,
    shared: jax.Array | None,
    *,
    dtype: DTypeLike,
    backend: Backend = REF,
) -> jax.Array:
    """Sum of each token's choices by weight in float32, rounded to `dtype`, and `shared` added.

    Args:
        out: [P, D]; rows that no place names may hold anything.
        places: int32 [T, k]; P or more contributes nothing.
        weights: float32 [T, k].
        shared: [T, D] in `dtype`, or None.

    Returns:
        [T, D] in `dtype`.
    """
    if backend.kernels:
        return dispatch_triton.combine(
            out, places, weights, shared, dtype=dtype, interpret=backend.interpret
        )
    chosen = out.at[places].get(mode="fill", fill_value=0).astype(jnp.float32)
    live = places < out.shape[0]
    routed = jnp.sum(jnp.where(live, weights, 0)[..., None] * chosen, axis=1).astype(dtype)
    return routed if shared is None else routed + shared
