"""Bounds of speed: what a deployment could reach if every kernel were perfect. Estimated.

Operations run one after another, each at the full bandwidth of the memory or at the peak of the
tensor cores, whichever takes longer; then what crosses devices, at the full speed of the links. A
real server is slower: kernels reach a part of this, and launches, the latency of every collective,
sampling and the padding of buckets come on top. Nothing here is a promise.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from glmjax.aot.hardware import GPU
from glmjax.config import MeshConfig, ModelConfig
from glmjax.planner.ops import Op, Queries
from glmjax.planner.work import Work, step_work

LIMITS = MEMORY, COMPUTE, LINKS = "memory", "compute", "links"


class Cost(NamedTuple):
    """What one kind of operation takes at least, and what bounds most of that."""

    seconds: float
    limit: str


@dataclass(frozen=True)
class Bound:
    """The least time that a step takes.

    Attributes:
        seconds: of the whole step.
        by: kind of operation -> its part, the longest first.
        shares: "memory", "compute", "links" -> the part of `seconds` that it bounds.
    """

    seconds: float
    by: dict[str, Cost]
    shares: dict[str, float]

    @property
    def limit(self) -> str:
        """What bounds more of the step than anything else."""
        return _largest(self.shares)

    @property
    def share(self) -> float:
        """The part of the step that `limit` bounds."""
        return self.shares[self.limit]


def bound(work: Work, gpu: GPU, mesh: MeshConfig) -> Bound:
    """The least time that the devices of a mesh need for a step.

    Raises:
        ConfigError: the model's dtype has no known peak.
    """
    times: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(LIMITS, 0.0))
    for op in work.ops:
        cost = _cost(op, gpu)
        times[op.name][cost.limit] += cost.seconds
    times["sums"][LINKS] += _links_s(replace(work, join_bytes=0), gpu, mesh)
    times["joined logits"][LINKS] += _links_s(replace(work, sum_bytes=0), gpu, mesh)
    by = {name: Cost(sum(parts.values()), _largest(parts)) for name, parts in times.items()}
    longest = sorted(by.items(), key=lambda item: -item[1].seconds)
    total = sum(cost.seconds for cost in by.values())
    shares = {limit: sum(parts[limit] for parts in times.values()) / total for limit in LIMITS}
    return Bound(total, dict(longest), shares)


def _largest(amounts: dict[str, float]) -> str:
    return max(amounts, key=lambda name: amounts[name])


def _cost(op: Op, gpu: GPU) -> Cost:
    moving_s = op.moved_bytes / gpu.memory_bytes_per_s
    computing_s = op.flops / gpu.flops_per_s(op.precision)
    return Cost(moving_s, MEMORY) if moving_s >= computing_s else Cost(computing_s, COMPUTE)


def _links_s(work: Work, gpu: GPU, mesh: MeshConfig) -> float:
    """Seconds to sum and join over a tensor-parallel group, which may span hosts.

    Over h hosts with d devices of the group each: NVLink carries it between those d, while each of
    the d takes 1 / d of it to the other hosts by its own port. Whichever takes longer bounds.
    """
    hosts = _hosts_of_group(mesh)
    devices = mesh.tensor / hosts
    nvlink_s = work.wire_bytes(devices) / gpu.nvlink_bytes_per_s
    network_s = work.wire_bytes(hosts) / devices / gpu.network_bytes_per_s
    return max(nvlink_s, network_s)


def _hosts_of_group(mesh: MeshConfig) -> int:
    """Hosts over which the widest-spread data group lies."""
    per_host = mesh.devices_per_host
    firsts = range(0, mesh.size, mesh.tensor)
    return max((i + mesh.tensor - 1) // per_host - i // per_host + 1 for i in firsts)


# What a deployment does with requests


@dataclass(frozen=True)
class DecodeBound:
    """A batch that decodes.

    Attributes:
        batch: sequences of the whole mesh.
        step_s: least time of a step.
        tokens_per_s: most tokens, of all sequences together.
        tokens_per_s_user: of each.
        bound: the step's parts, and what bounds it.
    """

    batch: int
    step_s: float
    tokens_per_s: float
    tokens_per_s_user: float
    bound: Bound


@dataclass(frozen=True)
class PrefillBound:
    """Prompts that arrive at once, and nothing else running.

    Attributes:
        batch: prompts over the whole mesh.
        first_s, last_s: least time to the first token of the first prompt, and of the last one.
        tokens_per_s: most prompt tokens, of the whole mesh.
        bound: of the first prompt's last step.
    """

    batch: int
    first_s: float
    last_s: float
    tokens_per_s: float
    bound: Bound


@dataclass(frozen=True)
class DraftingBound:
    """A batch that verifies drafts, beside one of a server without drafting.

    Attributes:
        batch: sequences of the whole mesh.
        decode_s, verify_s: least time of a step without and with drafts.
        ratio: tokens/s with drafting over those without.
        break_even: tokens a sequence must gain a step, the one after its drafts counted, for
            drafting to pay. Above the number of drafts plus 1 it cannot.
    """

    batch: int
    decode_s: float
    verify_s: float
    ratio: float
    break_even: float


def decode_bounds(
    model: ModelConfig,
    mesh: MeshConfig,
    gpu: GPU,
    kv_dtype: str,
    batches: Sequence[int],
    context: float,
    *,
    drafts: int | None = None,
    quantized: Collection[str] | None = None,
) -> list[DecodeBound]:
    """Bounds of steps in which each of a batch of sequences gets one token.

    Args:
        batches: sequences of the whole mesh; the fullest data group sets the pace.
        context: positions that each holds, on average.
        drafts: None: a server without drafting; 0: one that drafts, but not in these steps.
        quantized: as for `step_work`.

    Raises:
        ConfigError: as `step_work` and `bound`.
    """
    step = _steps(model, mesh, gpu, kv_dtype, drafts, quantized)
    rows = []
    for batch in batches:
        seqs = -(-batch // mesh.data)
        found = step((Queries(seqs, 1, context),), seqs)
        rate = batch / found.seconds
        rows.append(DecodeBound(batch, found.seconds, rate, 1 / found.seconds, found))
    return rows


def prefill_bounds(
    model: ModelConfig,
    mesh: MeshConfig,
    gpu: GPU,
    kv_dtype: str,
    prompt_tokens: int,
    chunk: int,
    batches: Sequence[int],
    *,
    drafts: int | None = None,
    quantized: Collection[str] | None = None,
) -> list[PrefillBound]:
    """Bounds of the time to first tokens, with nothing of the prompts cached.

    Args:
        prompt_tokens: of each prompt.
        chunk: prompt tokens a step, a data group: one prompt after another, steps always full.
        batches: prompts that arrive at once, over the whole mesh.
        drafts: what each step drafts behind every chunk; None: a server without drafting.
        quantized: as for `step_work`.

    Raises:
        ConfigError: as `step_work` and `bound`.
    """
    step = _steps(model, mesh, gpu, kv_dtype, drafts, quantized)
    rows = []
    for batch in batches:
        prompts = -(-batch // mesh.data)
        steps = [
            step(queries, sum(q.seqs for q in queries))
            for queries in _chunks(prompts, prompt_tokens, chunk)
        ]
        first = steps[: -(-prompt_tokens // chunk)]
        first_s, last_s = (sum(b.seconds for b in part) for part in (first, steps))
        rate = batch * prompt_tokens / last_s
        rows.append(PrefillBound(batch, first_s, last_s, rate, first[-1]))
    return rows


def drafting_bounds(
    model: ModelConfig,
    mesh: MeshConfig,
    gpu: GPU,
    kv_dtype: str,
    batches: Sequence[int],
    context: float,
    *,
    num_drafts: int,
    accepted_tokens: float,
    quantized: Collection[str] | None = None,
) -> list[DraftingBound]:
    """What drafting gains at most, and what it needs to gain anything.

    Args:
        batches, context: as for `decode_bounds`.
        num_drafts: drafts of each sequence a step, 1 or more.
        accepted_tokens: tokens that a step adds to a sequence on average, the one after its drafts
            counted: 1 to num_drafts + 1. About 2 on real text with 3 drafts.
        quantized: as for `step_work`.

    Raises:
        ConfigError: as `step_work` and `bound`.
    """
    verify = _steps(model, mesh, gpu, kv_dtype, num_drafts, quantized)
    plain = decode_bounds(model, mesh, gpu, kv_dtype, batches, context, quantized=quantized)
    rows = []
    for decode in plain:
        seqs, tokens = -(-decode.batch // mesh.data), num_drafts + 1
        verify_s = verify((Queries(seqs, tokens, context),), seqs * tokens).seconds
        slower = verify_s / decode.step_s
        rows.append(
            DraftingBound(decode.batch, decode.step_s, verify_s, accepted_tokens / slower, slower)
        )
    return rows


def _steps(
    model: ModelConfig,
    mesh: MeshConfig,
    gpu: GPU,
    kv_dtype: str,
    drafts: int | None,
    quantized: Collection[str] | None,
) -> Callable[[tuple[Queries, ...], int], Bound]:
    """(queries, places sampled) -> bound of their step; many steps of a prefill are alike."""

    @cache
    def step(queries: tuple[Queries, ...], sampled: int) -> Bound:
        work = step_work(
            model, mesh, kv_dtype, queries, sampled=sampled, drafts=drafts, quantized=quantized
        )
        return bound(work, gpu, mesh)

    return step


def _chunks(prompts: int, length: int, chunk: int) -> Iterator[tuple[Queries, ...]]:
    """What each step of a data group computes of `prompts` prompts of one length."""
    total = prompts * length
    for start in range(0, total, chunk):
        end = min(start + chunk, total)
        pieces = Counter(
            (max(start - first, 0), min(end - first, length))
            for first in range(start // length * length, end, length)
        )
        yield tuple(Queries(n, end - begin, begin) for (begin, end), n in pieces.items())
