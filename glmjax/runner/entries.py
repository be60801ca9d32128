"""What a sequence brings that is too large for a step's blob: written to the state beforehand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from glmjax.model.spec import ParamSpec, abstract
from glmjax.plans import Limits
from glmjax.runner.sampling import enter_row, table_row
from glmjax.runner.state import DeviceState
from glmjax.sharding import named_sharding, place, placement, shard_map
from glmjax.types import SamplingParams

Write = Callable[[DeviceState, jax.Array], DeviceState]


def enter_pages(state: DeviceState, entry: jax.Array) -> DeviceState:
    """Write int32 [1 + W], a slot and its page table; a slot out of range is dropped."""
    table = state.page_table.at[entry[0]].set(entry[1:], mode="drop")
    return replace(state, page_table=table)


def enter_tables(state: DeviceState, entry: jax.Array) -> DeviceState:
    """Write int32 [1 + n], a slot and what `table_row` made for it."""
    return replace(state, tables=enter_row(state.tables, entry[0], entry[1:]))


class Entries:
    """The two programs, compiled.

    Args:
        mesh, limits: of the runner.
        state: for where its parts lie.
    """

    def __init__(self, mesh: Mesh, limits: Limits, state: DeviceState):
        self._limits = limits
        self._sharding = named_sharding(mesh, ("groups", None))
        self._width = state.page_table.shape[1]
        row = table_row(None, SamplingParams(), limits.vocab_size)
        self._enter_pages = self._compile(enter_pages, self._width, mesh, state)
        self._enter_tables = self._compile(enter_tables, len(row), mesh, state)

    def pages(self, state: DeviceState, group: int, slot: int, pages: np.ndarray) -> DeviceState:
        """Make `pages`, int32 [n], the beginning of a slot's page table."""
        return self._enter_pages(state, self._entry(group, slot, pages, self._width))

    def tables(self, state: DeviceState, group: int, slot: int, row: np.ndarray) -> DeviceState:
        """Make `row` what changes a slot's logits."""
        return self._enter_tables(state, self._entry(group, slot, row, len(row)))

    def _entry(self, group: int, slot: int, values: np.ndarray, size: int) -> jax.Array:
        entries = np.zeros((self._limits.groups, 1 + size), np.int32)
        entries[:, 0] = self._limits.slots  # out of range
        entries[group, 0] = slot
        entries[group, 1 : 1 + len(values)] = values
        return place(entries, self._sharding)

    def _compile(self, write: Write, size: int, mesh: Mesh, state: DeviceState) -> Any:
        specs, entry = (
            placement(state),
            ParamSpec((self._limits.groups, 1 + size), "int32", ("groups", None)),
        )

        def step(state: DeviceState, entries: jax.Array) -> DeviceState:
            return write(state, entries[0])

        mapped = shard_map(step, mesh, in_axes=(specs, entry.axes), out_axes=specs)
        return jax.jit(mapped, donate_argnums=0).lower(state, abstract(entry, mesh)).compile()
