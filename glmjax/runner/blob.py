"""One int32 array a step carries all that the host has to say; unpacked inside the step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.types import Bucket, Limits, Row, StepPlan


class Fields(NamedTuple):
    """A step's inputs for one data group, as arrays. R rows, T tokens, N new pages a row.

    Attributes:
        slots: int32 [R]; out of range for padding rows.
        starts: int32 [R], position of the first query token; -1: the slot's length.
        q_lens: int32 [R]; 0 for padding rows.
        from_device: int32 [R]; 1: the query token is the slot's last token.
        sample: int32 [R]; 1: sample a token after the last query token.
        page_index: int32 [R], where new pages go in the slot's page table.
        page_count: int32 [R], how many of `new_pages` are real.
        top_k: int32 [R]; -1: all.
        seeds: int32 [R], the bits of an unsigned seed.
        temperature, top_p: float32 [R], carried as bits.
        new_pages: int32 [R, N].
        token_ids: int32 [T], rows one after another; what is from the device is 0.
    """

    slots: Any
    starts: Any
    q_lens: Any
    from_device: Any
    sample: Any
    page_index: Any
    page_count: Any
    top_k: Any
    seeds: Any
    temperature: Any
    top_p: Any
    new_pages: Any
    token_ids: Any


_FLOATS = ("temperature", "top_p")


def field_shapes(bucket: Bucket, limits: Limits) -> Fields:
    """Shape of each field for a bucket. Decode grows a row by a page at most; a prompt by all."""
    new_pages = 1 if bucket.max_q_len == 1 else limits.pages_per_seq
    rows = (bucket.rows,)
    return Fields(*[rows] * 11, new_pages=(bucket.rows, new_pages), token_ids=(bucket.tokens,))


def blob_size(bucket: Bucket, limits: Limits) -> int:
    """int32 values for one data group."""
    return sum(math.prod(shape) for shape in field_shapes(bucket, limits))


def pack(plan: StepPlan, limits: Limits) -> np.ndarray:
    """A plan as int32 [groups, blob_size]."""
    shapes = field_shapes(plan.bucket, limits)
    blob = np.zeros((limits.groups, blob_size(plan.bucket, limits)), np.int32)
    for group, rows in enumerate(plan.groups):
        fields = _views(blob[group], shapes)
        fields.slots[:] = limits.slots
        for r, row in enumerate(rows):
            _write_row(fields, r, row)
    return blob


def unpack(blob: jax.Array, bucket: Bucket, limits: Limits) -> Fields:
    """The fields of one data group's int32 [blob_size], on the device."""
    values, offset = [], 0
    for name, shape in field_shapes(bucket, limits)._asdict().items():
        size = math.prod(shape)
        value = blob[offset : offset + size].reshape(shape)
        floats = name in _FLOATS
        values.append(jax.lax.bitcast_convert_type(value, jnp.float32) if floats else value)
        offset += size
    return Fields(*values)


def _views(blob: np.ndarray, shapes: Fields) -> Fields:
    """Fields as views of a host blob: writing to them writes the blob."""
    values, offset = [], 0
    for name, shape in shapes._asdict().items():
        size = math.prod(shape)
        value = blob[offset : offset + size].reshape(shape)
        values.append(value.view(np.float32) if name in _FLOATS else value)
        offset += size
    return Fields(*values)


def _write_row(fields: Fields, r: int, row: Row) -> None:
    first = int(fields.q_lens[:r].sum())
    fields.slots[r] = row.slot
    fields.starts[r] = row.start
    fields.q_lens[r] = row.q_len
    fields.from_device[r] = row.token_ids is None
    fields.sample[r] = row.sample
    fields.page_index[r] = row.page_index
    fields.page_count[r] = len(row.new_pages)
    fields.new_pages[r, : len(row.new_pages)] = row.new_pages
    fields.top_k[r] = row.sampling.top_k
    fields.seeds[r] = np.uint32(row.sampling.seed).view(np.int32)
    fields.temperature[r] = row.sampling.temperature
    fields.top_p[r] = row.sampling.top_p
    if row.token_ids is not None:
        fields.token_ids[first : first + row.q_len] = row.token_ids
