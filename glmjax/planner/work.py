"""What one device does in one step: its operations, and what crosses devices. Pure arithmetic.

Of a step it follows what `GroupStep` computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from glmjax.aot.abstract import fp8_leaves
from glmjax.config import MeshConfig, ModelConfig
from glmjax.errors import ConfigError
from glmjax.planner.ops import EH_PROJ, LEAVES, Op, Part, Queries, item_bytes, places_of

LOGIT_BYTES = 4  # float32


@dataclass(frozen=True)
class Work:
    """One step of one device.

    Attributes:
        ops: its operations.
        sum_bytes: arrays that are summed over the tensor-parallel devices (all-reduce).
        join_bytes: arrays that are joined from their parts (all-gather), each device having all.
    """

    ops: tuple[Op, ...]
    sum_bytes: float
    join_bytes: float

    def wire_bytes(self, devices: float) -> float:
        """What each of `devices` that hold the parts sends, and receives, at least.

        2 (n - 1) / n of a sum, (n - 1) / n of what is joined, as in rings; a switch that adds up
        by itself would halve sums.
        """
        return (devices - 1) / devices * (2 * self.sum_bytes + self.join_bytes)


def step_work(
    model: ModelConfig,
    mesh: MeshConfig,
    kv_dtype: str,
    queries: Sequence[Queries],
    *,
    sampled: int,
    drafts: int | None = None,
    quantized: Collection[str] | None = None,
) -> Work:
    """A step of one data group, for that of its devices that has most to do.

    Args:
        model: as released, KV heads not repeated.
        mesh: its `expert_parallel` counts, the model's does not.
        kv_dtype: of K and V, by numpy's name.
        queries: the group's sequences.
        sampled: places that get logits: each query of a sequence that decodes or verifies, one of
            a chunk.
        drafts: None: no MTP block is held; 0: it writes its K and V only; else drafts made for each
            sequence, by a pass of the block over all tokens and one over a token each for every
            draft beyond the first.
        quantized: leaves in FP8, as for `param_specs`; None: as in an official release.

    Raises:
        ConfigError: the mesh does not divide the model, or drafts of a model without MTP block.
    """
    mesh.check(model)
    if drafts is not None and not model.num_nextn_predict_layers:
        raise ConfigError("this model has no MTP block to draft with: plan without drafting")
    fp8 = _fp8(model, None if quantized is None else frozenset(quantized))
    part = Part(model.replicated(mesh.tensor), mesh.tensor, mesh.expert_parallel, kv_dtype)
    passes, seqs = _mtp_passes(queries, drafts), sum(q.seqs for q in queries)
    block = [op for run in passes for op in part.mtp(run, fp8, keys_only=not drafts)]
    block += [part.head(seqs)] * (drafts or 0)
    ops = [*part.main(queries, fp8), part.head(sampled), *map(_named_mtp, block)]
    sums = (1 + 2 * model.num_hidden_layers) * places_of(queries)  # rows of [T, D]
    sums += sum(places_of(run) for run in passes) * (3 if drafts else 1)
    joins = sampled + seqs * (drafts or 0)  # rows of logits
    row_bytes = model.hidden_size * item_bytes(model.dtype)
    return Work(tuple(ops), sums * row_bytes, joins * model.vocab_size * LOGIT_BYTES)


def _mtp_passes(queries: Sequence[Queries], drafts: int | None) -> list[Sequence[Queries]]:
    """Query tokens of each pass of the MTP block, as if all that was drafted were accepted."""
    if drafts is None:
        return []
    further = [
        [Queries(q.seqs, 1, q.context + q.tokens + i) for q in queries]
        for i in range(max(drafts - 1, 0))
    ]
    return [queries, *further]


def _named_mtp(op: Op) -> Op:
    return replace(op, name=f"MTP {op.name}")


@lru_cache(maxsize=64)
def _fp8(model: ModelConfig, quantized: frozenset[str] | None) -> frozenset[str]:
    """Leaves that are in FP8, by path."""
    if model.quant is None:
        return frozenset()
    if quantized is not None:
        return quantized
    roots = [f"layers/{i}/" for i in range(model.num_hidden_layers)]
    moe = [i >= model.first_k_dense_replace for i in range(model.num_hidden_layers)]
    blocks = [*zip(roots, moe, strict=True), ("mtp/layer/", True)]
    leaves = {root + leaf for root, moe in blocks for leaf in LEAVES[moe]}
    return frozenset(fp8_leaves(model, model.quant, leaves | {EH_PROJ}))
