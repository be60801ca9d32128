"""Every kernel at the shapes of the official models: what is compiled, tuned, timed and checked.

Sizes are those of one GPU, after tensor or expert parallelism has cut the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.activation import silu_mul
from pallas_kernels.backend import Backend
from pallas_kernels.dispatch import align, combine, gather_rows, padded_rows
from pallas_kernels.grouped_matmul import GroupedTile, choose_tiles, grouped_matmul
from pallas_kernels.linear import QuantRows, quantize_rows
from pallas_kernels.norm import add_rms_norm
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.rope import Rotation, rope_table, rotate_and_store
from pallas_kernels.router import route

FP8, BF16 = jnp.dtype("float8_e4m3fn"), jnp.dtype("bfloat16")
EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """A model's sizes on one GPU: E experts of width F, K KV heads with G query heads each.

    With `ways` above 1 all GPUs see all tokens, and each has E of the ways * E experts.
    """

    name: str
    hidden: int
    experts: int
    width: int
    kv_heads: int = 8
    queries: int = 12
    head_dim: int = 128
    top_k: int = 8
    ways: int = 1

    def tensor(self, ways: int) -> Sizes:
        """Cut `ways` by tensor parallelism."""
        kv_heads = max(self.kv_heads // ways, 1)
        cut = {"width": self.width // ways, "kv_heads": kv_heads}
        return replace(self, name=f"{self.name} tp{ways}", **cut)

    def expert(self, ways: int) -> Sizes:
        """Experts shared out `ways`, each whole; attention as by tensor parallelism."""
        kv_heads = max(self.kv_heads // ways, 1)
        cut = {"experts": self.experts // ways, "kv_heads": kv_heads, "ways": ways}
        return replace(self, name=f"{self.name} ep{ways}", **cut)


AIR = Sizes("air", hidden=4096, experts=128, width=1408)
LARGE = Sizes("355b", hidden=5120, experts=160, width=1536)
SPLITS = tuple(
    split
    for model in (AIR, LARGE)
    for split in (*(model.tensor(n) for n in (1, 2, 4, 8)), model.expert(8))
)


@dataclass(frozen=True)
class Case:
    """One call of one kernel.

    Attributes:
        op: the operation.
        label: which sizes, in words.
        run: (backend, *inputs) -> outputs.
        inputs: key -> inputs; traced, it costs no memory.
        read_bytes: what must come from memory at least, and go there.
        flops: multiplications and additions.
        donate: inputs updated in place.
    """

    op: str
    label: str
    run: Callable[..., Any]
    inputs: Callable[[jax.Array], tuple[Any, ...]]
    read_bytes: int
    flops: int
    donate: tuple[int, ...] = ()

    def abstract(self) -> tuple[Any, ...]:
        """Shapes and dtypes of the inputs."""
        return jax.eval_shape(self.inputs, jax.random.key(0))


def grouped_cases(s: Sizes, tokens: int, dtype: jnp.dtype, backend: Backend) -> Iterator[Case]:
    """Both products of the experts' MLP for `tokens` tokens, routed evenly at random."""
    live = -(-tokens * s.top_k // s.ways)
    shapes = {
        "gate_up": (s.experts, 2 * s.width, s.hidden),
        "down": (s.experts, s.hidden, s.width),
    }
    tiles = choose_tiles(live, shapes["gate_up"], shapes["down"], dtype, backend)
    touched = s.experts * (1 - (1 - s.top_k / (s.experts * s.ways)) ** tokens)
    for (name, (experts, n, k)), tile in zip(shapes.items(), tiles, strict=True):
        yield Case(
            "grouped_matmul",
            f"{s.name} {dtype.name} {name}, {tokens} tokens",
            partial(_run_grouped, tile),
            partial(_grouped_inputs, s, tokens, (experts, n, k), dtype, tile),
            int(touched * n * k * dtype.itemsize) + live * (k * dtype.itemsize + n * 2),
            2 * live * n * k,
        )


def _grouped_inputs(
    s: Sizes,
    tokens: int,
    shape: tuple[int, int, int],
    dtype: jnp.dtype,
    tile: GroupedTile,
    key: jax.Array,
) -> tuple[Any, ...]:
    experts, n, k = shape
    keys = jax.random.split(key, 5)
    ids = random_ids(keys[0], tokens, s)
    aligned = align(ids, experts, tile.block_rows)
    padded = padded_rows(tokens * s.top_k, experts, tile.block_rows)
    x, w = random(keys[1], (padded, k), dtype), random(keys[2], shape, dtype)
    scales = (None, None)
    if dtype == FP8:
        scales = uniform(keys[3], (padded, 1)), uniform(keys[4], (experts, n, 1))
    return x, w, aligned.experts, aligned.num_blocks, *scales


def _run_grouped(tile, backend, x, w, experts, num_blocks, x_scale, w_scale):
    return grouped_matmul(
        x, w, experts, num_blocks, tile, x_scale=x_scale, w_scale=w_scale, backend=backend
    )


def attention_case(
    s: Sizes, rows: int, queries: int, length: int, page_size: int, dtype: jnp.dtype
) -> Case:
    """`rows` sequences of `length` positions, each with `queries` new tokens."""
    heads, pages = s.kv_heads * s.queries, -(-length // page_size)
    pool = (1, rows * pages + 1, page_size, s.kv_heads, s.head_dim)
    kv_bytes = 2 * rows * length * s.kv_heads * s.head_dim * dtype.itemsize

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 4)
        table = 1 + jax.random.permutation(keys[0], rows * pages).reshape(rows, pages)
        q = random(keys[1], (rows * queries, heads, s.head_dim), BF16)
        k, v = (random(key, pool, dtype) for key in keys[2:])
        starts = jnp.arange(rows, dtype=jnp.int32)
        lens = jnp.full(rows, length, jnp.int32)
        places = starts, starts * queries, jnp.full(rows, queries, jnp.int32), lens
        return q, k, v, jnp.int32(0), table.astype(jnp.int32), *places

    def run(backend: Backend, *inputs: jax.Array) -> jax.Array:
        scale = s.head_dim**-0.5
        return paged_attention(*inputs, max_q_len=queries, scale=scale, backend=backend)

    label = f"{s.name} {dtype.name} KV, page {page_size}, {rows} x {queries} of {length}"
    flops = 4 * rows * queries * length * heads * s.head_dim
    return Case("paged_attention", label, run, inputs, kv_bytes, flops)


def norm_case(s: Sizes, tokens: int, quantize: bool) -> Case:
    """Residual add, RMSNorm and, with `quantize`, FP8 rows."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 3)
        rows = (random(key, (tokens, s.hidden), BF16) for key in keys[:2])
        return *rows, random(keys[2], (s.hidden,), BF16)

    def run(backend: Backend, x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
        return add_rms_norm(x, residual, weight, EPS, quantize=quantize, backend=backend)

    moved = tokens * s.hidden * (4 * 2 + quantize)
    label = f"{s.name}, {tokens} tokens{', FP8' if quantize else ''}"
    return Case("add_rms_norm", label, run, inputs, moved, 6 * tokens * s.hidden)


def rotate_case(s: Sizes, tokens: int, dtype: jnp.dtype, qk_norm: bool) -> Case:
    """Bias, QK-norm, RoPE, and the new keys and values into the pool."""
    pool = (2, 1024, 64, s.kv_heads, s.head_dim)
    shape = (tokens, s.kv_heads, s.queries + 2, s.head_dim)

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key, 4)
        q_norm, k_norm = (random(key, (s.head_dim,), BF16) if qk_norm else None for key in keys[2:])
        cos, sin = rope_table(jnp.arange(tokens), s.head_dim // 2, 1e6)
        rotation = Rotation(random(keys[1], shape[1:], BF16), q_norm, k_norm, cos, sin, EPS)
        pools = jnp.zeros(pool, dtype), jnp.zeros(pool, dtype)
        place = jnp.arange(tokens, dtype=jnp.int32)
        return random(keys[0], shape, BF16), rotation, *pools, jnp.int32(1), place // 64, place % 64

    def run(backend: Backend, *inputs: Any) -> Any:
        return rotate_and_store(*inputs, backend=backend)

    heads = tokens * s.kv_heads * s.head_dim
    moved = heads * ((2 * s.queries + 2) * 2 + 2 * dtype.itemsize)
    label = f"{s.name} {dtype.name} KV, {tokens} tokens"
    flops = 8 * heads * (s.queries + 2)
    return Case("rotate_and_store", label, run, inputs, moved, flops, donate=(2, 3))


def route_case(s: Sizes, tokens: int) -> Case:
    """Scores to the experts of each token."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        keys = jax.random.split(key)
        logits = jax.random.normal(keys[0], (tokens, s.experts))
        return logits, 7 + jax.random.normal(keys[1], (s.experts,)), jnp.ones(tokens, bool)

    def run(backend: Backend, logits: jax.Array, bias: jax.Array, valid: jax.Array) -> Any:
        sizes = {"top_k": s.top_k, "n_group": 1, "topk_group": 1}
        kind = {"norm_topk_prob": True, "scaling_factor": 2.5}
        return route(logits, bias, **sizes, **kind, valid=valid, backend=backend)

    moved = tokens * (s.experts + 2 * s.top_k) * 4
    return Case("route", f"{s.name}, {tokens} tokens", run, inputs, moved, moved * s.top_k)


def dispatch_cases(s: Sizes, tokens: int, block_rows: int, dtype: jnp.dtype) -> Iterator[Case]:
    """Places of routed rows, rows brought there, and experts' outputs added up."""
    label = f"{s.name} {dtype.name}, {tokens} tokens in blocks of {block_rows}"
    rows, item = tokens * s.top_k, dtype.itemsize
    padded = padded_rows(rows, s.experts, block_rows)

    def ids_of(key: jax.Array) -> tuple[jax.Array]:
        return (random_ids(key, tokens, s),)

    def gather_inputs(key: jax.Array) -> tuple[Any, ...]:
        x = random(key, (tokens, s.hidden), dtype)
        rows = QuantRows(x, uniform(key, (tokens, 1))) if dtype == FP8 else x
        return rows, align(*ids_of(key), s.experts, block_rows)

    def combine_inputs(key: jax.Array) -> tuple[Any, ...]:
        out, shared = (random(key, (n, s.hidden), BF16) for n in (padded, tokens))
        places = align(*ids_of(key), s.experts, block_rows).places
        return out, places, uniform(key, (tokens, s.top_k)), shared

    def run_align(backend: Backend, ids: jax.Array) -> Any:
        return align(ids, s.experts, block_rows, backend=backend)

    def run_gather(backend: Backend, x: Any, alignment: Any) -> Any:
        return gather_rows(x, alignment, s.top_k, backend=backend)

    def run_combine(backend: Backend, *inputs: jax.Array) -> Any:
        return combine(*inputs, dtype=BF16, backend=backend)

    moved = (tokens + rows) * s.hidden
    yield Case("align", label, run_align, ids_of, 4 * (2 * rows + padded), rows * s.experts)
    yield Case("gather_rows", label, run_gather, gather_inputs, moved * item, 0)
    summed = (moved + tokens * s.hidden) * 2
    yield Case("combine", label, run_combine, combine_inputs, summed, 2 * rows * s.hidden)


def silu_case(s: Sizes, rows: int, quantize: bool) -> Case:
    """SwiGLU's middle, of routed rows."""

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        return (random(key, (rows, 2, s.width), BF16),)

    def run(backend: Backend, gate_up: jax.Array) -> Any:
        return silu_mul(gate_up, quantize=quantize, backend=backend)

    moved = rows * s.width * (4 + (1 if quantize else 2))
    label = f"{s.name}, {rows} rows{', FP8' if quantize else ''}"
    return Case("silu_mul", label, run, inputs, moved, 6 * rows * s.width)


def quantize_case(s: Sizes, tokens: int) -> Case:
    """Attention's output, to FP8."""
    width = s.kv_heads * s.queries * s.head_dim

    def inputs(key: jax.Array) -> tuple[Any, ...]:
        return (random(key, (tokens, width), BF16),)

    def run(backend: Backend, x: jax.Array) -> Any:
        return quantize_rows(x, backend=backend)

    label = f"{s.name}, {tokens} tokens"
    return Case("quantize_rows", label, run, inputs, 3 * tokens * width, 3 * tokens * width)


def random_ids(key: jax.Array, tokens: int, s: Sizes) -> jax.Array:
    """int32 [T, k], different experts for each token, all equally likely; other GPUs' are E."""
    scores = jax.random.uniform(key, (tokens, s.experts * s.ways))
    return jnp.minimum(jax.lax.top_k(scores, s.top_k)[1], s.experts)


def random(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Normal values of `dtype`."""
    return jax.random.normal(key, shape, BF16).astype(dtype)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Float32 between 0.5 and 1.5: scales and weights."""
    return jax.random.uniform(key, shape, minval=0.5, maxval=1.5)


DECODE_TOKENS, VERIFY_TOKENS, PREFILL_TOKENS = (8, 64), 4, 2048


def all_cases(
    backend: Backend,
    splits: tuple[Sizes, ...] = SPLITS,
    tokens: tuple[int, ...] = (*DECODE_TOKENS, PREFILL_TOKENS),
) -> list[Case]:
    """What the official models ask of each kernel, on one GPU of each split."""
    return [case for s in splits for case in _cases_of(s, tokens, backend)]


def _cases_of(s: Sizes, sizes: tuple[int, ...], backend: Backend) -> Iterator[Case]:
    for tokens in sizes:
        for dtype in (BF16, FP8):
            yield from grouped_cases(s, tokens, dtype, backend)
            yield from dispatch_cases(s, tokens, 128 if tokens >= PREFILL_TOKENS else 16, dtype)
            yield rotate_case(s, tokens, dtype, qk_norm=s.hidden == LARGE.hidden)
        for quantize in (False, True):
            yield norm_case(s, tokens, quantize)
            yield silu_case(s, tokens * s.top_k, quantize)
        yield route_case(s, tokens)
        yield quantize_case(s, tokens)
    for page_size in (16, 64):
        for dtype in (BF16, FP8):
            yield attention_case(s, 64, 1, 8192, page_size, dtype)
            yield attention_case(s, 64, VERIFY_TOKENS, 8192, page_size, dtype)
            yield attention_case(s, 64, 32, 8192, page_size, dtype)
