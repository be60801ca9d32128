"""One int32 array a step carries all that the host has to say; unpacked inside the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from glmjax.plans import Bucket, ChunkRow, GroupRows, Limits, StepPlan
from glmjax.runner.sampling import SCALARS, pack_scalars


class Fields(NamedTuple):
    """A step's inputs for one data group, as int32 arrays.

    R rows of a kind, N new pages a row, T tokens of chunks.

    Attributes:
        wanted: [3]; whether logprobs, prompt logprobs and constraints are.
        slots: [R decode]; out of range for padding rows.
        drafts: [R decode], drafts to verify.
        page_index, page_count: [R decode], where new pages go, and how many there are.
        new_pages: [R decode, N].
        chunk_slots: [R chunks]; out of range for padding rows.
        starts: [R chunks], position of a chunk's first token.
        q_lens: [R chunks]; 0 for padding rows.
        sample: [R chunks]; 1: sample a token after the last.
        next_tokens: [R chunks], the token that follows where none is sampled.
        plain: [R chunks]; 1: a first chunk of a sequence with nothing in the tables.
        chunk_page_index, chunk_page_count: [R chunks].
        chunk_new_pages: [R chunks, N].
        scalars: [R chunks, len(SCALARS)].
        token_ids: [T], chunks one after another.
    """

    wanted: Any
    slots: Any
    drafts: Any
    page_index: Any
    page_count: Any
    new_pages: Any
    chunk_slots: Any
    starts: Any
    q_lens: Any
    sample: Any
    next_tokens: Any
    plain: Any
    chunk_page_index: Any
    chunk_page_count: Any
    chunk_new_pages: Any
    scalars: Any
    token_ids: Any


def new_pages(bucket: Bucket, limits: Limits) -> tuple[int, int]:
    """New pages that a decode row and a chunk may bring. A cached prefix goes a way of its own."""
    # A step moves on by its drafts and one; what is reserved ahead can grow by as much again.
    decode = -(-3 * (limits.num_drafts + 1) // limits.page_size) + 1
    chunk = -(-bucket.chunk_tokens // limits.page_size) + decode
    return min(decode, limits.pages_per_seq), min(chunk, limits.pages_per_seq)


def field_shapes(bucket: Bucket, limits: Limits) -> Fields:
    """Shape of each field for a bucket."""
    decode, chunk = new_pages(bucket, limits)
    rows, chunks = (bucket.rows,), (bucket.chunk_rows,)
    return Fields(
        wanted=(3,),
        slots=rows,
        drafts=rows,
        page_index=rows,
        page_count=rows,
        new_pages=(*rows, decode),
        chunk_slots=chunks,
        starts=chunks,
        q_lens=chunks,
        sample=chunks,
        next_tokens=chunks,
        plain=chunks,
        chunk_page_index=chunks,
        chunk_page_count=chunks,
        chunk_new_pages=(*chunks, chunk),
        scalars=(*chunks, len(SCALARS)),
        token_ids=(bucket.chunk_tokens,),
    )


def blob_size(bucket: Bucket, limits: Limits) -> int:
    """int32 values for one data group."""
    return sum(math.prod(shape) for shape in field_shapes(bucket, limits))


def pack(plan: StepPlan, limits: Limits) -> np.ndarray:
    """A plan as int32 [groups, blob_size].

    Raises:
        ValueError: a row has more new pages than `new_pages` says.
    """
    shapes = field_shapes(plan.bucket, limits)
    blob = np.zeros((limits.groups, blob_size(plan.bucket, limits)), np.int32)
    wanted = (plan.logprobs, plan.prompt_logprobs, constrained(plan))
    for group, rows in enumerate(plan.groups):
        fields = split(blob[group], shapes)
        fields.wanted[:] = wanted
        fields.slots[:] = fields.chunk_slots[:] = limits.slots
        _write_decode(fields, rows)
        _write_chunks(fields, rows)
    return blob


def constrained(plan: StepPlan) -> bool:
    """Whether any row has a mask."""
    return any(
        any(row.masks is not None for row in group.decode)
        or any(row.mask is not None for row in group.chunks)
        for group in plan.groups
    )


def masks(plan: StepPlan, limits: Limits) -> np.ndarray:
    """Masks of all places of a plan, uint32 [groups, S, words], ones where nothing is barred.

    Places are those of `StepResult.logprobs`.
    """
    bucket = plan.bucket
    words = np.full(mask_shape(bucket, limits), 2**32 - 1, np.uint32)
    for g, rows in enumerate(plan.groups):
        for r, row in enumerate(rows.decode):
            if row.masks is not None:
                first = r * (bucket.drafts + 1)
                words[g, first : first + len(row.masks)] = row.masks
        for c, row in enumerate(rows.chunks, bucket.rows * (bucket.drafts + 1)):
            if row.mask is not None:
                words[g, c] = row.mask[0]
    return words


def mask_shape(bucket: Bucket, limits: Limits) -> tuple[int, int, int]:
    """[groups, S, words] of a bucket."""
    places = bucket.rows * (bucket.drafts + 1) + bucket.chunk_rows
    return limits.groups, places, -(-limits.vocab_size // 32)


def split(values: Any, shapes: Fields) -> Fields:
    """The fields of one data group's int32 [blob_size]; in numpy they are views of it."""
    fields, offset = [], 0
    for shape in shapes:
        size = math.prod(shape)
        fields.append(values[offset : offset + size].reshape(shape))
        offset += size
    return Fields(*fields)


def unpack(blob: jax.Array, bucket: Bucket, limits: Limits) -> Fields:
    """The fields of one data group's int32 [blob_size], on the device."""
    return split(blob, field_shapes(bucket, limits))


def _write_decode(fields: Fields, group: GroupRows) -> None:
    rows, n = group.decode, len(group.decode)
    if not n:
        return
    fields.slots[:n] = [row.slot for row in rows]
    fields.drafts[:n] = [row.drafts for row in rows]
    fields.page_index[:n] = [row.page_index for row in rows]
    for r, row in enumerate(rows):
        if row.new_pages:
            _write_pages(fields.new_pages, fields.page_count, r, row.new_pages)


def _write_chunks(fields: Fields, group: GroupRows) -> None:
    first = 0
    for c, row in enumerate(group.chunks):
        end = first + len(row.token_ids)
        fields.chunk_slots[c] = row.slot
        fields.starts[c] = row.start
        fields.q_lens[c] = len(row.token_ids)
        fields.sample[c] = row.sample
        fields.next_tokens[c] = row.next_token
        fields.plain[c] = row.page_index == 0 and row.history is None
        fields.scalars[c] = pack_scalars(row.sampling, row.min_len)
        fields.token_ids[first:end] = row.token_ids
        beyond = len(row.new_pages) - fields.chunk_new_pages.shape[1]
        index = row.page_index + max(beyond, 0)
        fields.chunk_page_index[c] = index
        pages = row.new_pages[index - row.page_index :]
        _write_pages(fields.chunk_new_pages, fields.chunk_page_count, c, pages)
        first = end


def early_pages(row: ChunkRow, bucket: Bucket, limits: Limits) -> tuple[int, ...]:
    """The pages of a chunk that the blob has no room for: the first ones."""
    return row.new_pages[: max(len(row.new_pages) - new_pages(bucket, limits)[1], 0)]


def _write_pages(places: np.ndarray, counts: np.ndarray, r: int, pages: Sequence[int]) -> None:
    if len(pages) > places.shape[1]:
        raise ValueError(f"{len(pages)} new pages in a row of {places.shape[1]}")
    places[r, : len(pages)] = pages
    counts[r] = len(pages)
