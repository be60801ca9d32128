"""Static shapes: which to compile, and the smallest that holds a step."""

from __future__ import annotations

from collections.abc import Iterable

from glmjax.types import Bucket

MIN_CHUNK = 64
SHORT_PROMPT = 16  # tokens a row in buckets for many rows


def decode_buckets(slots: int) -> tuple[Bucket, ...]:
    """1, 4, 16, ... rows of one token, and as many as there are slots."""
    return tuple(Bucket(rows, rows, 1) for rows in _powers_of_4(1, slots))


def prefill_buckets(slots: int, chunk: int) -> tuple[Bucket, ...]:
    """64, 256, ... up to `chunk` tokens, each for one long row and for many short ones."""
    shapes = {
        Bucket(rows, tokens, tokens)
        for tokens in _powers_of_4(min(MIN_CHUNK, chunk), chunk)
        for rows in (1, min(slots, max(1, tokens // SHORT_PROMPT)))
    }
    return tuple(sorted(shapes, key=_cost))


def smallest(buckets: Iterable[Bucket], rows: int, tokens: int, max_q_len: int) -> Bucket:
    """The cheapest bucket that holds a step.

    Raises:
        ValueError: none does.
    """
    fits = [
        b for b in buckets if b.rows >= rows and b.tokens >= tokens and b.max_q_len >= max_q_len
    ]
    if not fits:
        raise ValueError(f"no bucket holds {rows} rows, {tokens} tokens, longest {max_q_len}")
    return min(fits, key=_cost)


def _cost(bucket: Bucket) -> tuple[int, int]:
    return bucket.tokens, bucket.rows


def _powers_of_4(first: int, last: int) -> list[int]:
    """first, 4 first, 16 first, ... below `last`, then `last`."""
    values = []
    while first < last:
        values.append(first)
        first *= 4
    return [*values, last]
