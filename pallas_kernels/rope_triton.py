"""Bias, QK-norm, RoPE and the write of K and V to their pages, in one Triton kernel.

Values in the kernel are float32, rounded to the model's dtype after each step, as the plain form
rounds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.pool_bits import stored
from pallas_kernels.triton import launch, load, store

WARPS = 4


def rotate_and_store(
    qkv: jax.Array,
    vectors: Mapping[str, jax.Array],
    eps: float,
    k_pages: jax.Array,
    v_pages: jax.Array,
    layer: jax.Array,
    page_ids: jax.Array,
    offsets: jax.Array,
    *,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `rope.rotate_and_store`. A program has one token's heads of one KV head.

    Args:
        vectors: "cos" and "sin", and what there is of "bias", "q_norm" and "k_norm".
    """
    tokens, kv_heads, heads, head_dim = qkv.shape
    places = {"layer": layer.reshape(1), "page_ids": page_ids, "offsets": offsets}
    inputs = {"qkv": qkv, **vectors, **places, "k_pages": k_pages, "v_pages": v_pages}
    q, k_pages, v_pages = launch(
        partial(_kernel, names=tuple(inputs), eps=eps),
        list(inputs.values()),
        [
            jax.ShapeDtypeStruct((tokens, kv_heads, heads - 2, head_dim), qkv.dtype),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        grid=(tokens, kv_heads),
        name="rotate_and_store",
        warps=WARPS,
        aliases={len(inputs) - 2: 1, len(inputs) - 1: 2},
        interpret=interpret,
    )
    return q.reshape(tokens, -1, head_dim), k_pages, v_pages


def _kernel(*refs: Any, names: tuple[str, ...], eps: float) -> None:
    inputs = dict(zip(names, refs, strict=False))
    q_ref, k_ref, v_ref = refs[len(names) :]
    token, kv_head = pl.program_id(0), pl.program_id(1)
    group, head_dim = q_ref.shape[2:]
    parts = _parts(head_dim, inputs["cos"].shape[1])
    query = jnp.arange(pl.next_power_of_2(group), dtype=jnp.int32)[:, None]
    page = inputs["layer"][0], inputs["page_ids"][token], inputs["offsets"][token], kv_head

    q = _turn(_read(inputs, query, parts), inputs, "q_norm", parts, eps)
    for part, x in zip(parts, q, strict=True):
        mask = part.real & (query < group)
        store(q_ref.at[token, kv_head, query, part.columns], x.astype(q_ref.dtype), mask=mask)
    key, value = (_read(inputs, jnp.full((1, 1), group + i, jnp.int32), parts) for i in (0, 1))
    key = _turn(key, inputs, "k_norm", parts, eps)
    for ref, rows in ((k_ref, key), (v_ref, value)):
        for part, x in zip(parts, rows, strict=True):
            store(ref.at[*page, part.columns], stored(x, ref.dtype), mask=part.real)


class _Part(NamedTuple):
    """Columns of a head, int32 [1, c] with c a power of two, and which of them are the part's."""

    columns: jax.Array
    real: jax.Array

    def read(self, ref: Any, *place: Any, mask: jax.Array | bool = True) -> jax.Array:
        x = load(ref.at[*place, self.columns], mask=self.real & mask, other=0)
        return x.astype(jnp.float32)


def _parts(head_dim: int, half: int) -> list[_Part]:
    """The columns that turn, those that they turn with, and the rest, if any."""
    bounds = [(0, half), (half, 2 * half), (2 * half, head_dim)]
    return [_part(start, stop) for start, stop in bounds if start < stop]


def _part(start: int, stop: int) -> _Part:
    places = jnp.arange(pl.next_power_of_2(stop - start), dtype=jnp.int32)[None, :]
    return _Part(start + places, places < stop - start)


def _read(inputs: Mapping[str, Any], head: jax.Array, parts: list[_Part]) -> list[jax.Array]:
    """This program's rows `head` [R, 1], with the bias: float32 [R, c] for each part."""
    token, kv_head = pl.program_id(0), pl.program_id(1)
    qkv, bias = inputs["qkv"], inputs.get("bias")
    there = head < qkv.shape[2]
    rows = [part.read(qkv, token, kv_head, head, mask=there) for part in parts]
    if bias is None:
        return rows
    addends = [part.read(bias, kv_head, head, mask=there) for part in parts]
    return [_rounded(x + y, qkv.dtype) for x, y in zip(rows, addends, strict=True)]


def _turn(
    rows: list[jax.Array], inputs: Mapping[str, Any], norm: str, parts: list[_Part], eps: float
) -> list[jax.Array]:
    """QK-norm, where the model has it, then RoPE, of a head's parts."""
    rounded = partial(_rounded, dtype=inputs["qkv"].dtype)
    if norm in inputs:
        weights = [rounded(part.read(inputs[norm])) for part in parts]
        scale = _norm_scale(rows, inputs[norm].shape[0], eps)
        rows = [rounded(rounded(x * scale) * w) for x, w in zip(rows, weights, strict=True)]
    tables = (inputs["cos"], inputs["sin"])
    cos, sin = (rounded(parts[0].read(table, pl.program_id(0))) for table in tables)
    first, second, *rest = rows
    new_first = rounded(first * cos) - rounded(second * sin)
    new_second = rounded(second * cos) + rounded(first * sin)
    return [rounded(new_first), rounded(new_second), *rest]


def _norm_scale(rows: list[jax.Array], head_dim: int, eps: float) -> jax.Array:
    """1 / sqrt(mean square + eps) of each row, [R, 1]."""
    squares = [jnp.sum(jnp.square(x), axis=1)[:, None] for x in rows]
    return jax.lax.rsqrt(sum(squares[1:], squares[0]) / head_dim + eps)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype).astype(jnp.float32)
