"""Whether a kernel does what its oracle does, and how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.backend import REF, Backend
from pallas_kernels.official import Case

COPIES, COPIES_BYTES = 8, 8 << 30
ROUNDS, LEAST_S, MOST_CALLS = 5, 0.02, 1000
EPS = 2.0**-8  # of bfloat16: what every operation rounds to somewhere
MAX_ROUNDINGS, MAX_CHANGED = 4.0, 1e-3
MAX_RMS, MAX_RMS_FP8 = 0.01, 0.03  # a scale that is one rounding off moves many FP8 values

Copy = tuple[dict[int, Any], dict[int, Any]]  # donated inputs by place, and the others


class Difference(NamedTuple):
    """The worst of all outputs.

    Attributes:
        roundings: largest difference of floats, in roundings of their dtype (at least bfloat16's)
            at the largest value expected.
        rms: root mean square of the differences, as a share of that of what is expected.
        changed: share of integers that are not what is expected.
        wrong: whether that is more than rounding explains.
    """

    roundings: float = 0.0
    rms: float = 0.0
    changed: float = 0.0
    wrong: bool = False

    def worst(self, other: Difference) -> Difference:
        """The larger of each."""
        floats = (max(a, b) for a, b in zip(self[:-1], other[:-1], strict=True))
        return Difference(*floats, wrong=self.wrong or other.wrong)


def difference(case: Case, inputs: Sequence[Any], got: Any, want: Any) -> Difference:
    """Compare outputs of a case, but for what its contract leaves undefined."""
    pairs = zip(*(jax.tree.leaves(_defined(case.op, inputs, x)) for x in (got, want)), strict=True)
    found = Difference()
    for one, other in pairs:
        found = found.worst(_compare(one, other))
    return found


def _defined(op: str, inputs: Sequence[Any], out: Any) -> Any:
    """Outputs without the blocks in which there are no rows."""
    if op == "grouped_matmul":
        blocks = inputs[2].shape[0]
        return out[: int(inputs[3][0]) * (out.shape[0] // blocks)]
    if op == "align":
        return out._replace(experts=out.experts[: int(out.num_blocks[0])])
    return out


def _compare(got: jax.Array, want: jax.Array) -> Difference:
    if got.shape != want.shape or got.dtype != want.dtype:
        raise ValueError(f"{got.dtype}{got.shape}, expected {want.dtype}{want.shape}")
    if not want.size:
        return Difference()
    if not jnp.issubdtype(want.dtype, jnp.floating):
        changed = float(jnp.mean(got != want))
        return Difference(changed=changed, wrong=changed > MAX_CHANGED)
    largest, size, rms = map(float, _distances(got, want))
    roundings = largest / (max(float(jnp.finfo(want.dtype).eps), EPS) * (size or 1.0))
    limit = MAX_RMS_FP8 if want.dtype.itemsize == 1 else MAX_RMS
    return Difference(roundings, rms, wrong=not (roundings <= MAX_ROUNDINGS and rms <= limit))


@jax.jit
def _distances(got: jax.Array, want: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest distance, largest value, and the distances' share of the values (both RMS)."""
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    apart = jnp.nan_to_num(jnp.abs(got - want), nan=jnp.inf)
    norm = jnp.sqrt(jnp.mean(want**2))
    return apart.max(), jnp.abs(want).max(), jnp.sqrt(jnp.mean(apart**2)) / jnp.maximum(norm, 1e-30)


class Program:
    """One compiled program that runs a case on several copies of its inputs, one after another.

    So what launching costs is shared by the copies, and they do not find their weights in the L2
    cache: what was read last was another copy's.

    Args:
        case, backend: what to run, and how.
        copies: how many; None: as many as COPIES and COPIES_BYTES allow.
    """

    def __init__(self, case: Case, backend: Backend, copies: int | None = None):
        self.case = case
        one = _by_donation(case, case.abstract())
        self.count = copies or copies_of(_bytes(one))

        def run(given: list[Any], kept: list[Any]) -> list[Any]:
            return [case.run(backend, *_in_order(copy)) for copy in zip(given, kept, strict=True)]

        lowered = jax.jit(run, donate_argnums=0).lower(*_columns([one] * self.count))
        self._compiled = lowered.compile()

    def inputs(self, seed: int = 0) -> list[Copy]:
        """Each copy's: random, and different."""
        make = jax.jit(self.case.inputs)
        return [
            _by_donation(self.case, make(key))
            for key in jax.random.split(jax.random.key(seed), self.count)
        ]

    def __call__(self, copies: list[Copy]) -> list[Any]:
        """Outputs of each copy; donated inputs in `copies` are replaced by what became of them."""
        outputs = self._compiled(*_columns(copies))
        copies[:] = [
            (_became(given, out), kept) for (given, kept), out in zip(copies, outputs, strict=True)
        ]
        return outputs

    def seconds(self, copies: list[Copy], rounds: int = ROUNDS, least_s: float = LEAST_S) -> float:
        """How long one copy takes."""
        return seconds(lambda: self(copies), rounds, least_s) / self.count

    def check(self, copies: list[Copy]) -> Difference:
        """Compare the first copy with the oracle."""
        inputs = _in_order(copies[0])
        with jax.default_matmul_precision("highest"):  # a GPU's float32 may be TF32
            want = jax.jit(lambda *inputs: self.case.run(REF, *inputs))(*inputs)
        return difference(self.case, inputs, self(copies)[0], want)


def _columns(copies: list[Copy]) -> list[list[dict[int, Any]]]:
    return [list(column) for column in zip(*copies, strict=True)]


def _by_donation(case: Case, inputs: Sequence[Any]) -> Copy:
    """Inputs by place: those that are donated, and the others."""
    places = range(len(inputs))
    given = {i: inputs[i] for i in places if i in case.donate}
    return given, {i: inputs[i] for i in places if i not in case.donate}


def _in_order(copy: Copy) -> list[Any]:
    given, kept = copy
    both = given | kept
    return [both[i] for i in range(len(both))]


def _became(given: dict[int, Any], out: Any) -> dict[int, Any]:
    """What is updated in place is the last of the outputs."""
    leaves = jax.tree.leaves(out)
    return dict(zip(given, leaves[len(leaves) - len(given) :], strict=True))


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def copies_of(input_bytes: int) -> int:
    """How many copies of inputs of this size fit, at least one."""
    return min(COPIES, max(1, COPIES_BYTES // max(input_bytes, 1)))


def seconds(
    call: Callable[[], Any],
    rounds: int = ROUNDS,
    least_s: float = LEAST_S,
    most_calls: int = MOST_CALLS,
) -> float:
    """Median time of a call, of rounds of as many calls as take `least_s` together."""
    jax.block_until_ready(call())
    wanted = math.ceil(least_s / max(_round(call, 1), 1e-9))
    calls = min(max(wanted, 1), most_calls)
    return median(_round(call, calls) for _ in range(rounds)) / calls


def _round(call: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    out = None
    for _ in range(calls):
        out = call()
    jax.block_until_ready(out)  # of one stream: the last is the last to end
    return time.perf_counter() - began
