"""Rereads a converted folder and compares every tensor with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from convert.plan import Array, Piece, Plan
from convert.report import collapse
from glmjax.checkpoint import PARAMS, Converted, StoredArray, check_files
from glmjax.errors import CheckpointError


class Verified(NamedTuple):
    """What was compared."""

    tensors: int
    size_bytes: int


def verify(plan: Plan, converted: Converted, advance: Callable[[int], Any]) -> Verified:
    """Compare a folder with what `plan` would write, bit for bit, a group in memory at a time.

    Args:
        plan: made from the source, with the dtype that is stored.
        advance: told of bytes compared.

    Raises:
        CheckpointError: tensors differ, all of them named; or the folder cannot be read.
    """
    folder = converted.folder
    others = _other_arrays(plan.manifest.arrays, converted.manifest.arrays)
    if others:
        raise CheckpointError(
            f"{folder} was not made from this checkpoint: {len(others)} arrays have no counterpart "
            f"of their shape and dtype there, such as {others[0]}"
        )
    check_files(converted, plan.groups)
    wrong = [
        name
        for group, arrays in plan.groups.items()
        for name in _wrong_tensors(folder / PARAMS / group, arrays, advance)
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} differs from its source in {len(wrong)} tensors:\n  "
            + "\n  ".join(collapse(wrong))
            + "\nConvert again with --overwrite"
        )
    arrays = plan.manifest.arrays.values()
    tensors = {piece.tensor for g in plan.groups.values() for a in g.values() for piece in a.pieces}
    return Verified(len(tensors), sum(array.size_bytes for array in arrays))


def _other_arrays(ours: dict[str, StoredArray], theirs: dict[str, StoredArray]) -> list[str]:
    """Paths whose shape or dtype differ, or that only one side has."""
    kinds = [{path: (a.shape, a.dtype) for path, a in arrays.items()} for arrays in (ours, theirs)]
    return sorted({path for path, _ in kinds[0].items() ^ kinds[1].items()})


def _wrong_tensors(
    folder: Path, arrays: dict[str, Array], advance: Callable[[int], Any]
) -> Iterator[str]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = {key: ocp.RestoreArgs(restore_type=np.ndarray) for key in arrays}
        try:
            restored = checkpointer.restore(
                folder.absolute(), args=ocp.args.PyTreeRestore(restore_args=args)
            )
        except Exception as error:  # Orbax raises bare Exceptions for files it cannot read
            raise CheckpointError(f"{folder} cannot be read: {error}") from error
    for key, array in arrays.items():
        for piece in array.pieces:
            if not _same_bits(restored[key][piece.index], piece):
                yield piece.tensor
        advance(array.stored.size_bytes)


def _same_bits(part: np.ndarray, piece: Piece) -> bool:
    expected = np.empty(part.shape, part.dtype)
    piece.fill(expected)
    unsigned = f"u{part.dtype.itemsize}"
    return np.array_equal(part.view(unsigned), expected.view(unsigned))
