"""What a launch does on the devices, as data: made from a plan, run, or sent to other hosts.

On the wire a command is seven int32, its kind and its numbers, and then raw int32 arrays, all in
little-endian order. Bytes can only become numbers, so what a stranger sends runs nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from glmjax.errors import GlmjaxError
from glmjax.plans import Bucket, Limits, StepPlan
from glmjax.runner.blob import blob_size, constrained, early_pages, mask_shape, masks, pack
from glmjax.runner.sampling import table_row
from glmjax.types import MAX_END_IDS, MAX_LOGIT_BIAS

HEADER = struct.Struct("<7i")  # kind, five numbers, how many values follow
PAGES, TABLES, STEP = 1, 2, 3  # kinds


class EnterPages(NamedTuple):
    """Make `pages`, int32 [n], the beginning of a slot's page table."""

    group: int
    slot: int
    pages: np.ndarray


class EnterTables(NamedTuple):
    """Make `row`, int32 [n] as `table_row` has it, what changes a slot's logits."""

    group: int
    slot: int
    row: np.ndarray


class Step(NamedTuple):
    """Run a bucket's program.

    Attributes:
        bucket: which.
        blob: int32 [groups, n], as `pack` has it.
        masks: uint32 [groups, S, words]; None: everything is allowed.
        logprobs, prompt_logprobs: which outputs are wanted on the host.
    """

    bucket: Bucket
    blob: np.ndarray
    masks: np.ndarray | None
    logprobs: bool
    prompt_logprobs: bool


Entry = EnterPages | EnterTables


class Launch(NamedTuple):
    """What a plan has the devices do, in this order."""

    entries: tuple[Entry, ...]
    step: Step


class WireError(GlmjaxError):
    """Bytes from another host that are no command of this glmjax."""


def entries_of(plan: StepPlan, limits: Limits) -> Iterator[Entry]:
    """What a plan's chunks bring that a step's blob has no room for."""
    for group, rows in enumerate(plan.groups):
        for row in rows.chunks:
            if pages := early_pages(row, plan.bucket, limits):
                yield EnterPages(group, row.slot, np.array(pages, np.int32))
            if row.history is not None:
                values = table_row(row.history, row.sampling, limits.vocab_size)
                yield EnterTables(group, row.slot, values)


def launch_of(plan: StepPlan, limits: Limits) -> Launch:
    """The commands of a plan."""
    allowed = masks(plan, limits) if constrained(plan) else None
    outputs = plan.logprobs, plan.prompt_logprobs
    step = Step(plan.bucket, pack(plan, limits), allowed, *outputs)
    return Launch(tuple(entries_of(plan, limits)), step)


def row_size(vocab_size: int) -> int:
    """Values that `table_row` makes."""
    return vocab_size + 2 * MAX_LOGIT_BIAS + MAX_END_IDS + 1


def encode(launch: Launch) -> bytes:
    """A launch as bytes."""
    entries = (part for entry in launch.entries for part in _entry_parts(entry))
    return b"".join((*entries, *_step_parts(launch.step)))


def decode(data: bytes, limits: Limits) -> Launch:
    """The launch of bytes that `encode` made for a runner of `limits`.

    Raises:
        WireError: they are truncated, or no launch for such a runner.
    """
    entries, view = list[Entry](), memoryview(data)
    while True:
        head, values, view = _read(view)
        if head[0] == STEP:
            break
        entries.append(_entry(head, values, limits))
    if view:
        raise WireError(f"{len(view)} bytes after the step of a launch")
    return Launch(tuple(entries), _step(head, values, limits))


def _entry_parts(entry: Entry) -> tuple[bytes | memoryview, ...]:
    kind = PAGES if isinstance(entry, EnterPages) else TABLES
    group, slot, values = entry
    return HEADER.pack(kind, group, slot, 0, 0, 0, values.size), _raw(values)


def _step_parts(step: Step) -> tuple[bytes | memoryview, ...]:
    wanted = step.logprobs + 2 * step.prompt_logprobs + 4 * (step.masks is not None)
    arrays = [step.blob] if step.masks is None else [step.blob, step.masks]
    head = HEADER.pack(STEP, *step.bucket, wanted, sum(array.size for array in arrays))
    return head, *map(_raw, arrays)


def _raw(values: np.ndarray) -> memoryview:
    little = values.astype(f"<{values.dtype.kind}4", copy=False)
    return np.ascontiguousarray(little).data.cast("B")


def _read(view: memoryview) -> tuple[tuple[int, ...], np.ndarray, memoryview]:
    """The first command's header and values, and what comes after it."""
    if len(view) < HEADER.size:
        raise WireError(f"a command of {len(view)} bytes, expected {HEADER.size} or more")
    head = HEADER.unpack_from(view)
    end = HEADER.size + 4 * head[-1]
    if not HEADER.size <= end <= len(view):
        raise WireError(f"a command of {end} bytes in all, of which {len(view)} are here")
    values = np.frombuffer(view[HEADER.size : end], "<i4").astype(np.int32, copy=False)
    return head, values, view[end:]


def _entry(head: tuple[int, ...], values: np.ndarray, limits: Limits) -> Entry:
    kind, group, slot, *zeros, size = head
    fits = {PAGES: size <= limits.pages_per_seq, TABLES: size == row_size(limits.vocab_size)}
    place = group in range(limits.groups) and slot in range(limits.slots)
    if not (fits.get(kind) and place) or any(zeros):
        raise WireError(f"no command for this runner begins with {head}")
    return (EnterPages if kind == PAGES else EnterTables)(group, slot, values)


def _step(head: tuple[int, ...], values: np.ndarray, limits: Limits) -> Step:
    bucket, wanted = Bucket(*head[1:5]), head[5]
    if bucket not in limits.buckets or not 0 <= wanted < 8:
        raise WireError(f"no step of this runner begins with {head}")
    blob = limits.groups, blob_size(bucket, limits)
    shape = mask_shape(bucket, limits) if wanted & 4 else (0,)
    cut = blob[0] * blob[1]
    if len(values) != cut + np.prod(shape):
        raise WireError(f"{len(values)} values for {bucket}, expected {cut + np.prod(shape)}")
    allowed = values[cut:].view(np.uint32).reshape(shape) if wanted & 4 else None
    return Step(bucket, values[:cut].reshape(blob), allowed, bool(wanted & 1), bool(wanted & 2))
