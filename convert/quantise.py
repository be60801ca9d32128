"""Quantises BF16 weights as the official FP8 releases are: E4M3, a scale for each output channel.

Rows are read a few at a time, so that the float32 form of a matrix is never whole in memory. Values
and scales are two arrays on disk; each is made by a pass of its own over the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from convert.hf_reader import Tensor, read_row_blocks
from glmjax.errors import CheckpointError

FP8 = ml_dtypes.float8_e4m3fn
FP8_MAX = 448.0
BLOCK_ELEMENTS = 1 << 20
_LEAST_NORMAL = np.finfo(np.float32).tiny


def row_scales(rows: np.ndarray) -> np.ndarray:
    """Scales float32 [n, 1] of `rows` float32 [n, in]: max|w| / 448, 1 where that is nothing.

    A scale below float32's normal numbers counts as nothing: it would have lost its precision.
    """
    scales = np.abs(rows).max(-1, keepdims=True) / np.float32(FP8_MAX)
    return np.where(scales < _LEAST_NORMAL, np.float32(1), scales)


def quantised(rows: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """`rows` [n, in] over `scales` [n, 1], clamped and rounded to nearest even: float8_e4m3fn."""
    ratios = rows / scales
    return np.clip(ratios, -FP8_MAX, FP8_MAX, out=ratios).astype(FP8)


def read_quantised(tensor: Tensor, out: np.ndarray) -> None:
    """Read a float tensor [rows, in] into float8_e4m3fn `out` [..., in] of as many elements.

    Raises:
        CheckpointError: the file ended early, or a weight is infinite or no number.
    """
    for rows, part in _parts(tensor, out):
        part[...] = quantised(rows, row_scales(rows))


def read_row_scales(tensor: Tensor, out: np.ndarray) -> None:
    """Read the scales of a float tensor [rows, in] into float32 `out` [..., 1] of all rows.

    Raises as `read_quantised` does.
    """
    for rows, part in _parts(tensor, out):
        part[...] = row_scales(rows)


def _parts(tensor: Tensor, out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Some rows at a time in float32, and where in `out` they belong: a view [n, columns]."""
    parts = list(_row_views(out, max(1, BLOCK_ELEMENTS // tensor.shape[-1])))
    blocks = read_row_blocks(tensor, map(len, parts))
    for stored, part in zip(blocks, parts, strict=True):
        rows = stored.astype(np.float32)
        if not np.isfinite(rows).all():
            raise CheckpointError(
                f"{tensor.file}: {tensor.name} holds infinities or NaN, which FP8 cannot scale; "
                "download it again, or convert it without --quantize"
            )
        yield rows, part


def _row_views(out: np.ndarray, most: int) -> Iterator[np.ndarray]:
    """Views [n, columns] of up to `most` rows, in C order, that make up `out`."""
    if out.ndim > 2 and not out.flags.c_contiguous:
        for part in out:
            yield from _row_views(part, most)
    else:
        rows = out.reshape(-1, out.shape[-1])
        yield from (rows[first : first + most] for first in range(0, len(rows), most))
