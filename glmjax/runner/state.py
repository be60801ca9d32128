"""What stays on the device between steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.model.attention import KVPool, kv_specs
from glmjax.model.spec import ParamSpec, abstract
from glmjax.plans import Limits
from glmjax.runner.sampling import SCALARS, Tables, table_specs
from pallas_kernels.paged_attention import table_width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DeviceState:
    """State of all slots; donated to each step, which returns it anew.

    Slots and pages are split over data groups: a step sees its own group's, numbered from 0.

    Attributes:
        last_token: int32 [slots], the token to compute next in decode.
        drafts: int32 [slots, num_drafts or 1], what may follow it.
        seq_lens: int32 [slots], positions whose KV is in the pool.
        page_table: int32 [slots, W].
        scalars: int32 [slots, len(SCALARS)], how each slot samples.
        tables: penalties, bias and barred tokens of each slot.
        kv: the pool; with drafting its last layer is the draft layer's.
    """

    last_token: Any
    drafts: Any
    seq_lens: Any
    page_table: Any
    scalars: Any
    tables: Tables
    kv: KVPool


def state_specs(model: ModelConfig, limits: Limits, kv_dtype: str) -> DeviceState:
    """ParamSpecs of the state, whole: all data groups together."""
    slots, pages = limits.groups * limits.slots, limits.groups * limits.pages
    width = table_width(limits.pages_per_seq, limits.page_size)
    layers = model.num_hidden_layers + (limits.num_drafts > 0)
    return DeviceState(
        last_token=ParamSpec((slots,), "int32", ("slots",)),
        drafts=ParamSpec((slots, max(limits.num_drafts, 1)), "int32", ("slots", None)),
        seq_lens=ParamSpec((slots,), "int32", ("slots",)),
        page_table=ParamSpec((slots, width), "int32", ("slots", None)),
        scalars=ParamSpec((slots, len(SCALARS)), "int32", ("slots", None)),
        tables=table_specs(slots, model.vocab_size),
        kv=kv_specs(model, layers, pages, limits.page_size, kv_dtype),
    )


def make_state(specs: DeviceState, mesh: Mesh) -> DeviceState:
    """Zeros, each device its own part."""
    targets = abstract(specs, mesh)
    shardings = jax.tree.map(lambda target: target.sharding, targets)

    def zeros() -> DeviceState:
        return jax.tree.map(lambda target: jnp.zeros(target.shape, target.dtype), targets)

    return jax.jit(zeros, out_shardings=shardings)()
