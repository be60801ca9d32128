"""What one program takes of kernels that need whole rows, because they reduce along them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

PROGRAM_ELEMENTS = 1024  # short rows share a program until it has so many
WARP_ELEMENTS = 512  # 16 a thread: two 128-bit loads of bfloat16
MOST_WARPS = 16


class RowTile(NamedTuple):
    """A program's share: `rows` rows of `width` places, both powers of two, and its warps."""

    rows: int
    width: int
    warps: int

    def grid(self, rows: int) -> tuple[int]:
        return (pl.cdiv(rows, self.rows),)

    def places(self) -> tuple[jax.Array, jax.Array]:
        """This program's row numbers [rows, 1] and columns [1, width], int32."""
        first = pl.program_id(0) * self.rows
        rows = first + jnp.arange(self.rows, dtype=jnp.int32)
        return rows[:, None], jnp.arange(self.width, dtype=jnp.int32)[None, :]


def row_tile(columns: int) -> RowTile:
    """The tile for rows of so many columns."""
    width = pl.next_power_of_2(columns)
    rows = max(PROGRAM_ELEMENTS // width, 1)
    return RowTile(rows, width, min(max(rows * width // WARP_ELEMENTS, 1), MOST_WARPS))
