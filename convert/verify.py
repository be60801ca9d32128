"""Rereads a converted folder and compares every tensor with its source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp

from convert.plan import Array, Piece, Plan
from convert.report import collapse
from glmjax.checkpoint import PARAMS, Manifest
from glmjax.errors import CheckpointError


class Verified(NamedTuple):
    """What was compared."""

    tensors: int
    size_bytes: int


def verify(plan: Plan, folder: Path, manifest: Manifest, advance: Callable[[int], Any]) -> Verified:
    """Compare `folder` with what `plan` would write, bit for bit, a group in memory at a time.

    Args:
        plan: made from the source, with the dtype of `manifest`.
        advance: told of bytes compared.

    Raises:
        CheckpointError: tensors differ, all of them named; or the folder cannot be read.
    """
    if manifest != plan.manifest:
        raise CheckpointError(
            f"{folder} was not made from this checkpoint: {_difference(plan, manifest)}"
        )
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


def _difference(plan: Plan, manifest: Manifest) -> str:
    ours, theirs = plan.manifest.arrays, manifest.arrays
    paths = [p for p in sorted(ours | theirs) if ours.get(p) != theirs.get(p)]
    return f"it differs at {', '.join(paths[:5]) or 'dtype, MTP block or quantised leaves'}"


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
