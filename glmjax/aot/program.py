"""What a program compiled for GPUs does, apart from its results: memory, copies, calls, launches.

All of it is read from what XLA says when it compiles. Launches are those of the text: a loop's body
counts once, however often it runs, and both branches of a condition count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from glmjax.aot.abstract import abstract_params, abstract_state
from glmjax.aot.hlo import Op, operations
from glmjax.aot.launches import Launch, compile_listed
from glmjax.aot.target import COMPILE_OPTIONS
from glmjax.config import ModelConfig
from glmjax.plans import Bucket, Limits
from glmjax.runner.compiled import lower_step
from glmjax.runner.kv_heads import tensor_size

MOVES = {"copy", "slice", "dynamic-slice", "transpose", "concatenate", "convert", "pad", "gather"}
COLLECTIVES = {
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
}
TRITON_KERNEL = "__gpu$xla.gpu.triton"
FP8_GEMM = "__cublas$lt$matmul$f8"

_NOT_LAUNCHED = {"kAsyncStart", "kAsyncDone"}


@dataclass(frozen=True)
class Report:
    """What one device does and holds when it runs a program.

    Attributes:
        argument_count: arrays passed.
        argument_bytes, alias_bytes, temp_bytes: of arguments, of results that are arguments updated
            in place, and of memory in between.
        moves: arrays that are made only to copy, cut, join or convert others.
        sorts: what sorts.
        collectives: what crosses devices.
        calls: how often each custom call target stands in the program.
        launches: what is started on the device, in order.
    """

    argument_count: int
    argument_bytes: int
    alias_bytes: int
    temp_bytes: int
    moves: tuple[Op, ...]
    sorts: tuple[Op, ...]
    collectives: tuple[Op, ...]
    calls: Counter[str]
    launches: tuple[Launch, ...]

    @property
    def fp8_gemms(self) -> int:
        """Calls of cublasLt that multiply FP8 with FP8."""
        return self.calls[FP8_GEMM]

    def large_moves(self, size_bytes: int) -> list[Op]:
        """Moves that make an array of `size_bytes` or more."""
        return [op for op in self.moves if op.size_bytes >= size_bytes]

    def counts(self) -> Counter[str]:
        """How many collectives there are of each kind."""
        return Counter(op.kind for op in self.collectives)


class Program(NamedTuple):
    """A compiled program and what it does."""

    compiled: jax.stages.Compiled
    report: Report


def compile_step(
    model: ModelConfig,
    mesh: Mesh,
    limits: Limits,
    bucket: Bucket,
    options: Mapping[str, str | bool] | None = None,
    kv_dtype: str | None = None,
    quantized: Collection[str] | None = None,
) -> Program:
    """One bucket's step of a model for a mesh of GPUs, described or real, with no weights.

    Args:
        model: with the `kernels` to use; KV heads as released, repeated here as `mesh` needs them.
        options: XLA's, beside COMPILE_OPTIONS.
        kv_dtype: of K and V; None: the model's dtype.
        quantized: leaves in FP8, as for `param_specs`.
    """
    params = abstract_params(model, mesh, limits.num_drafts > 0, quantized)
    state = abstract_state(model, mesh, limits, kv_dtype)
    model = model.replicated(tensor_size(mesh))
    return compile_program(lower_step(model, limits, bucket, mesh, params, state), options)


def compile_program(
    lowered: jax.stages.Lowered, options: Mapping[str, str | bool] | None = None
) -> Program:
    """Compile a program that was lowered for GPUs; `options` beside COMPILE_OPTIONS.

    Raises:
        RuntimeError: a kernel's code was lost before XLA could compile it.
    """
    check_kernels(lowered)
    compiled, launched = compile_listed(lowered, {**COMPILE_OPTIONS, **(options or {})})
    return Program(compiled, report(compiled, launched))


def check_kernels(lowered: jax.stages.Lowered) -> None:
    """Raise RuntimeError where a Triton kernel has no code in HLO: XLA would crash on it.

    With jaxlib 0.10.2 the conversion from StableHLO does that to kernels called before certain
    functions of arrays without elements, such as `jnp.roll` of none.
    """
    program: Any = lowered.compiler_ir("hlo")
    calls = [line for line in program.as_hlo_text().splitlines() if TRITON_KERNEL in line]
    lost = [line for line in calls if "backend_config={" not in line]
    if lost:
        raise RuntimeError(
            f"{len(lost)} of {len(calls)} Triton kernels lost their code on the way to XLA; look "
            f"for operations on arrays of no elements after: {lost[0].strip()[:120]}"
        )


def report(compiled: jax.stages.Compiled, launched: list[Launch]) -> Report:
    """What `compiled` does, given what it launches."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    ops = list(operations(text))
    return Report(
        argument_count=len(jax.tree.leaves(compiled.args_info)),
        argument_bytes=memory.argument_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        moves=tuple(op for op in ops if op.kind in MOVES),
        sorts=tuple(op for op in ops if op.kind == "sort" or "Sort" in op.detail),
        collectives=tuple(op for op in ops if op.kind in COLLECTIVES),
        calls=Counter(op.detail for op in ops if op.kind == "custom-call"),
        launches=tuple(launch for launch in launched if launch.kind not in _NOT_LAUNCHED),
    )
