"""Rows of packed conversations, in the place where serving has its paged batch."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from pallas_kernels.backend import Backend
from pallas_kernels.packed_attention import packed_attention
from pallas_kernels.rope import Rotation, rotate


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sequences:
    """A `glmjax.model.attention.Layout` of R rows with S tokens each, T = R * S.

    Attributes:
        segments: int32 [R, S], which conversation of its row a token belongs to; 0: padding.
        row_positions: int32 [R, S], place within the conversation.
    """

    segments: jax.Array
    row_positions: jax.Array

    @property
    def positions(self) -> jax.Array:
        """int32 [T]."""
        return self.row_positions.reshape(-1)

    @property
    def valid(self) -> jax.Array:
        """bool [T]; false for padding."""
        return self.segments.reshape(-1) > 0

    def attend(
        self,
        qkv: jax.Array,
        rotation: Rotation,
        kv: None,
        layer: jax.Array,
        scale: float,
        backend: Backend,
    ) -> tuple[jax.Array, None]:
        """qkv [T, K, G + 2, h] -> [T, H, h]; there is no pool to write."""
        del kv, layer, backend
        q, k, v = rotate(qkv, rotation)
        q_rows, k_rows, v_rows = (x.reshape(*self.segments.shape, *x.shape[1:]) for x in (q, k, v))
        out = packed_attention(q_rows, k_rows, v_rows, self.segments, scale=scale)
        return out.reshape(q.shape), None
