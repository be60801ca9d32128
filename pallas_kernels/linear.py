"""Dense projections: BF16 or float32, and FP8 with dynamically quantised activations."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels import quantize_triton
from pallas_kernels.backend import REF, Backend
from pallas_kernels.fp8 import FP8_MAX, to_fp8
from pallas_kernels.grouped_matmul import choose_tiles, grouped_matmul

CPU_BF16_ROWS = 8
GEMM_MULTIPLE = 16  # of all three sizes of cublasLt's FP8 products


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K] times weight [..., N, K] -> [T, ..., N] in x's dtype, accumulated in float32."""
    return dot("tk,...nk->t...n", x, weight).astype(x.dtype)


def dot(formula: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum accumulated in float32. Rows of x are its axis before the last.

    On a CPU few rows of bfloat16 are widened first: XLA's own path for them is many times slower,
    and the conversion fuses. Elsewhere, and with more rows, the product is the hardware's.
    """

    def narrow(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, weight, preferred_element_type=jnp.float32)

    def wide(x: jax.Array, weight: jax.Array) -> jax.Array:
        return narrow(x.astype(jnp.float32), weight.astype(jnp.float32))

    if x.dtype == jnp.float32 or x.shape[-2] >= CPU_BF16_ROWS:
        return narrow(x, weight)
    return jax.lax.platform_dependent(x, weight, cpu=wide, default=narrow)


class QuantRows(NamedTuple):
    """Rows quantised for FP8 products.

    Attributes:
        values: float8_e4m3fn [T, K].
        scale: float32 [T, B], of each row and block of columns.
    """

    values: jax.Array
    scale: jax.Array


def quantize_rows(x: jax.Array, block: int | None = None, *, backend: Backend = REF) -> QuantRows:
    """x [T, K] to FP8, a scale for each row and each `block` columns; None: for each row.

    The scale is max|x| / 448, and 1 where all are zero.
    """
    if backend.kernels:
        return QuantRows(*quantize_triton.quantize_rows(x, block, interpret=backend.interpret))
    values, scale = quantize(x, block)
    return QuantRows(values.reshape(x.shape[0], -1)[:, : x.shape[1]], scale)


def scaled_linear(
    x: jax.Array | QuantRows,
    values: jax.Array,
    scale: jax.Array,
    block: int | None = None,
    *,
    out_dtype: DTypeLike,
    backend: Backend = REF,
) -> jax.Array:
    """FP8 product: out = sum over blocks b of (x_q[b] . w_q[b]) * s_x[b] * s_w[b].

    Args:
        x: [T, K], quantised here, or quantised already: a scale for each token and block
            (compressed-tensors' "dynamic token" with one block; groups of 128 columns in block
            FP8).
        values: float8_e4m3fn [..., N, K].
        scale: float32 [..., N, B].
        block: columns that share a scale; None: all K, so B is 1.

    Returns:
        [T, ..., N], accumulated in float32.
    """
    rows = x if isinstance(x, QuantRows) else quantize_rows(x, block, backend=backend)
    weight = QuantRows(values.reshape(-1, values.shape[-1]), scale.reshape(-1, scale.shape[-1]))
    if backend.kernels and (block or not _is_gemm(weight.values)):
        out = _grouped_product(rows, weight, block, out_dtype, backend)
    elif block:
        out = _block_product(rows, weight, block)
    else:
        out = _fp8_product(rows, weight)
    return out.astype(out_dtype).reshape(-1, *values.shape[:-1])


def _is_gemm(weight: jax.Array) -> bool:
    """Whether cublasLt multiplies by FP8 [N, K] as it lies: XLA would pad it at each call."""
    return all(size % GEMM_MULTIPLE == 0 for size in weight.shape)


def _fp8_product(rows: QuantRows, weight: QuantRows) -> jax.Array:
    """float32 [T, N] with one scale a row: on a GPU XLA makes it an FP8 GEMM of cublasLt.

    Rows are padded here: XLA would do it, but for a single row it converts the weights instead.
    """
    tokens = rows.values.shape[0]

    def gemm(x: jax.Array, w: jax.Array) -> jax.Array:
        x = _padded_rows(x, GEMM_MULTIPLE)
        return jnp.einsum("tk,nk->tn", x, w, preferred_element_type=jnp.float32)[:tokens]

    def wide(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.einsum("tk,nk->tn", x.astype(jnp.float32), w.astype(jnp.float32))

    out = jax.lax.platform_dependent(rows.values, weight.values, cpu=wide, default=gemm)
    return out * rows.scale * weight.scale[:, 0]


def _grouped_product(
    rows: QuantRows, weight: QuantRows, block: int | None, out_dtype: DTypeLike, backend: Backend
) -> jax.Array:
    """[T, N] from the experts' kernel, as one expert: it scales by blocks and masks odd sizes."""
    tokens = rows.values.shape[0]
    shape = (1, weight.values.shape[0], weight.values.shape[1])
    tile, _ = choose_tiles(tokens, shape, shape, weight.values.dtype, backend, block)
    x, x_scale = (_padded_rows(array, tile.block_rows) for array in rows)
    blocks = x.shape[0] // tile.block_rows
    out = grouped_matmul(
        x,
        weight.values[None],
        jnp.zeros(blocks, jnp.int32),
        jnp.full(1, blocks, jnp.int32),
        tile,
        x_scale=x_scale,
        w_scale=weight.scale[None],
        block=block,
        out_dtype=out_dtype,
        backend=backend,
    )
    return out[:tokens]


def _padded_rows(x: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x, ((0, -x.shape[0] % multiple), (0, 0)))


def _block_product(rows: QuantRows, weight: QuantRows, block: int) -> jax.Array:
    """float32 [T, N] with a scale for each row and block, in plain jax.numpy."""
    x, w = (split_blocks(q.values.astype(jnp.float32), block) for q in (rows, weight))
    out = jnp.einsum("tbk,nbk->tnb", x, w)
    return jnp.einsum("tnb,nb,tb->tn", out, weight.scale, rows.scale)


def quantize(x: jax.Array, block: int | None = None) -> tuple[jax.Array, jax.Array]:
    """x [..., K] to float8_e4m3fn [..., B, block] and float32 scales [..., B].

    The scale is max|x| / 448. Values are clamped before the cast: XLA on a CPU makes a NaN of what
    a GPU saturates.
    """
    grouped = split_blocks(x.astype(jnp.float32), block)
    peak = jnp.max(jnp.abs(grouped), axis=-1)
    scale = jnp.where(peak > 0, peak / FP8_MAX, 1.0)
    return to_fp8(grouped / scale[..., None]), scale


def split_blocks(x: jax.Array, block: int | None) -> jax.Array:
    """[..., K] to [..., B, block], the last block padded with zeros; None: one block of K."""
    if block is None:
        return x[..., None, :]
    missing = -x.shape[-1] % block
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
    return padded.reshape(*x.shape[:-1], -1, block)
