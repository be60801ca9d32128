"""Static shapes: which to compile, and the smallest that holds a step."""

from __future__ import annotations

from functools import lru_cache

from glmjax.plans import Bucket

MIN_CHUNK = 64
SHORT_PROMPT = 32  # tokens a chunk, where a step has as many chunks as it can


def make_buckets(slots: int, chunk: int, drafts: int) -> tuple[Bucket, ...]:
    """Shapes to compile for steps of `slots` sequences and `chunk` tokens of known text.

    Steps that only decode come in 1, 8, 64, ... rows, with drafts and without; chunks alone in 64,
    256, ... tokens; both together in the largest size.
    """
    rows = _powers(1, slots, 8)
    decode = [Bucket(n, d, 0, 0) for n in rows for d in sorted({0, drafts})]
    tokens = _powers(min(MIN_CHUNK, chunk), chunk, 4)
    chunks = [Bucket(0, drafts, _chunk_rows(slots, t), t) for t in tokens]
    shapes = {*chunks, Bucket(slots, drafts, _chunk_rows(slots, chunk), chunk)}
    return tuple(sorted({*decode, *shapes}, key=_cost))


@lru_cache(maxsize=4096)
def smallest(
    buckets: tuple[Bucket, ...], rows: int, drafts: int, chunk_rows: int, chunk_tokens: int
) -> Bucket:
    """The cheapest bucket with exactly `drafts` drafts that holds a step.

    Raises:
        ValueError: none does.
    """
    wanted = (rows, drafts, chunk_rows, chunk_tokens)
    fits = [
        b
        for b in buckets
        if b.drafts == drafts and all(n >= least for n, least in zip(b, wanted, strict=True))
    ]
    if not fits:
        raise ValueError(f"no bucket holds {Bucket(*wanted)}")
    return min(fits, key=_cost)


def _chunk_rows(slots: int, tokens: int) -> int:
    return min(slots, max(1, tokens // SHORT_PROMPT))


def _cost(bucket: Bucket) -> tuple[int, ...]:
    return (bucket.rows * (bucket.drafts + 1) + bucket.chunk_tokens, *bucket)


def _powers(first: int, last: int, base: int) -> list[int]:
    """first, base first, base^2 first, ... below `last`, then `last`."""
    values = []
    while first < last:
        values.append(first)
        first *= base
    return [*values, last]
