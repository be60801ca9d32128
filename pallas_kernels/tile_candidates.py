"""Which tiles are worth trying for which shapes of the official models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise, product
from typing import Any

from pallas_kernels.backend import Backend
from pallas_kernels.grouped_matmul import GroupedTile, choose_tiles, misfit
from pallas_kernels.mosaic import SHARED_BYTES
from pallas_kernels.official import BF16, FP8, SPLITS, Case, Sizes, attention_case, grouped_cases
from pallas_kernels.tiles import Tile, find

TOKENS = (1, 8, 64, 256, 1024, 4096)  # of a step
QUERY_TOKENS = (1, 2, 4, 32)  # of a row: decode, verify, a chunk's
LENGTH, ROWS, PAGE_SIZES = 8192, 64, (16, 64)
MOST = 1 << 20  # above any count of rows or queries

GROUPED_GRID: dict[str, dict[str, tuple[int, ...]]] = {
    "decode": {
        "block_rows": (8, 16, 32),
        "block_n": (64, 128),
        "block_k": (96, 128, 192, 256),
        "stages": (4, 6),
    },
    "prefill": {
        "block_rows": (64, 128),
        "block_n": (128, 176, 192, 256),
        "block_k": (64, 128),
        "stages": (3, 4, 5),
    },
    "triton": {
        "block_rows": (16, 32, 64, 128),
        "block_n": (64, 128),
        "block_k": (64, 128),
        "stages": (3, 4),
        "warps": (4, 8),
    },
}
ATTENTION_GRID = {
    "rows": (16, 32, 64, 128),
    "keys": (32, 64, 128),
    "warps": (4, 8),
    "stages": (2, 3, 4),
}


@dataclass(frozen=True)
class Part:
    """What one entry of tiles.json is for.

    Attributes:
        when: its condition.
        tiles: candidates.
        cases: backend -> the calls that they are timed with, by the tiles of the backend's device.
    """

    when: dict[str, Any]
    tiles: tuple[Tile, ...]
    cases: Callable[[Backend], list[Case]]


@dataclass(frozen=True)
class Task:
    """Parts whose tiles are chosen together.

    Attributes:
        op, label: the operation, and which shapes of it.
        parts: their tiles must have the same values of the names in `alike`.
    """

    op: str
    label: str
    parts: tuple[Part, ...]
    alike: tuple[str, ...] = ()


def grid(axes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, int]]:
    """Every choice of one value an axis."""
    return (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def ranges(values: Sequence[int]) -> dict[int, list[int]]:
    """[least, most] that each of some positive values stands for: they meet halfway, by ratio."""
    values = sorted(set(values))
    middles = [math.isqrt(a * b) for a, b in pairwise(values)]
    least, most = [1, *(m + 1 for m in middles)], [*middles, MOST]
    return {v: [a, b] for v, a, b in zip(values, least, most, strict=True)}


def grouped_tiles(
    rows: int, shape: tuple[int, int, int], dtype: Any, backend: Backend
) -> Iterator[Tile]:
    """Tiles of a grouped matmul for `rows` routed rows and weights [E, N, K] of `dtype`.

    Blocks hold an expert's average of rows, or up to twice more or fewer. Triton's are tried where
    no kernel for Hopper can do these weights, or none may.
    """
    average = min(max(rows / shape[0], 8.0), 128.0)
    found: dict[str, list[Tile]] = {kernel: [] for kernel in GROUPED_GRID}
    for kernel, axes in GROUPED_GRID.items():
        for sizes in grid(axes):
            tile = GroupedTile(kernel, **sizes)
            near = average <= 2 * tile.block_rows and tile.block_rows <= max(2 * average, 16)
            if near and _fits(tile, shape, dtype):
                found[kernel].append(asdict(tile))
    hopper = found["decode"] + found["prefill"] if backend.name == "mosaic" else []
    yield from hopper or found["triton"]


def _fits(tile: GroupedTile, shape: tuple[int, int, int], dtype: Any) -> bool:
    if tile.kernel != "triton":
        return not misfit(tile, shape, dtype, None)
    step = (tile.block_rows + tile.block_n) * tile.block_k * dtype.itemsize
    return tile.stages * step <= SHARED_BYTES


def attention_tiles(queries: int, pool: Any, head_dim: int) -> Iterator[Tile]:
    """Tiles of paged attention for rows of so many packed queries."""
    for tile in grid(ATTENTION_GRID):
        keys = 2 * tile["keys"] * head_dim * pool.itemsize
        shared = tile["stages"] * keys + tile["rows"] * head_dim * BF16.itemsize
        # a tile twice as tall as its queries is half idle; 16 is the least that is multiplied
        near = tile["rows"] <= max(16, 2 * queries - 1) and 8 * tile["rows"] >= min(queries, 128)
        if near and shared <= SHARED_BYTES:
            yield tile


def grouped_tasks(
    backend: Backend, splits: Iterable[Sizes] = SPLITS, tokens: Sequence[int] = TOKENS
) -> Iterator[Task]:
    """An MLP's two products: their rows lie in the same blocks."""
    for s, dtype in product(splits, (BF16, FP8)):
        spans = ranges([t * s.top_k for t in tokens])
        for t in tokens:
            label = f"{s.name} {dtype.name}, {t} tokens"
            parts = tuple(
                _grouped_part(s, t, dtype, i, spans[t * s.top_k], backend) for i in (0, 1)
            )
            yield Task("grouped_matmul", label, parts, alike=("block_rows",))


def _grouped_part(
    s: Sizes, tokens: int, dtype: Any, index: int, span: list[int], backend: Backend
) -> Part:
    gate_up, down = (s.experts, 2 * s.width, s.hidden), (s.experts, s.hidden, s.width)
    rows, shape = tokens * s.top_k, (gate_up, down)[index]
    sizes = dict(zip(("experts", "n", "k"), shape, strict=True))
    when = {"backend": backend.name, "dtype": dtype.name, **sizes}

    def cases(backend: Backend) -> list[Case]:
        wanted = find(backend.device, "grouped_matmul", **when, rows=rows)
        if asdict(choose_tiles(rows, gate_up, down, dtype, backend)[index]) != wanted:
            raise ValueError("the other product cannot have blocks of as many rows")
        return [list(grouped_cases(s, tokens, dtype, backend))[index]]

    return Part(when | {"rows": span}, tuple(grouped_tiles(rows, shape, dtype, backend)), cases)


def attention_tasks(
    backend: Backend, splits: Iterable[Sizes] = SPLITS, query_tokens: Sequence[int] = QUERY_TOKENS
) -> Iterator[Task]:
    """One tile for all numbers of KV heads and sizes of pages. The backends have one kernel."""
    del backend
    heads = {(s.queries, s.head_dim, s.kv_heads): s for s in splits}
    groups: dict[tuple[int, int], list[Sizes]] = {}
    for (*group, _), s in heads.items():
        groups.setdefault((group[0], group[1]), []).append(s)
    for (alike, dtype), t in product(product(groups.values(), (BF16, FP8)), query_tokens):
        group = alike[0].queries
        span = ranges([n * group for n in query_tokens])[t * group]
        found = tuple(attention_tiles(t * group, dtype, alike[0].head_dim))
        when = {"pool": dtype.name, "queries": span}
        part = Part(when, found, partial(_attention_cases, alike, t, dtype))
        yield Task("paged_attention", f"{dtype.name} KV, {t} x {group} queries", (part,))


def _attention_cases(
    splits: Sequence[Sizes], tokens: int, dtype: Any, backend: Backend
) -> list[Case]:
    del backend  # its tile is found when the case is traced
    return [
        attention_case(s, ROWS, tokens, LENGTH, page_size, dtype)
        for s, page_size in product(splits, PAGE_SIZES)
    ]
