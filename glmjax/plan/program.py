"""What a program compiled for GPUs does, apart from its results: memory, copies, calls, launches.

All of it is read from what XLA says when it compiles. Launches are those of the text: a loop's body
counts once, however often it runs, and both branches of a condition count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from glmjax.config import ModelConfig
from glmjax.plan.abstract import abstract_params, abstract_state
from glmjax.plan.launches import Launch, parse
from glmjax.plan.target import COMPILE_OPTIONS
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
FP8_GEMM = "__cublas$lt$matmul$f8"

_NOT_LAUNCHED = {"kAsyncStart", "kAsyncDone"}
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\(")
_CALLS = re.compile(r"\bcalls=%([\w.\-]+)")
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_STRATEGY = re.compile(r'"kernel_strategy":"KERNEL_STRATEGY_(\w+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


class Op(NamedTuple):
    """An instruction of the optimised program that writes to memory.

    Attributes:
        kind: HLO's name of it, such as "copy"; of a fusion, that of its result.
        name: this one's.
        size_bytes: of the largest array that it makes, on one device.
        detail: a custom call's target, or the kernel that XLA chose for a collective.
    """

    kind: str
    name: str
    size_bytes: int
    detail: str = ""


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
) -> Program:
    """One bucket's step of a model for a mesh of GPUs, described or real, with no weights.

    Args:
        model: with the `kernels` to use; KV heads as released, repeated here as `mesh` needs them.
        options: XLA's, beside COMPILE_OPTIONS.
    """
    params = abstract_params(model, mesh, limits.num_drafts > 0)
    state = abstract_state(model, mesh, limits)
    model = model.replicated(tensor_size(mesh))
    return compile_program(lower_step(model, limits, bucket, mesh, params, state), options)


def compile_program(
    lowered: jax.stages.Lowered, options: Mapping[str, str | bool] | None = None
) -> Program:
    """Compile a program that was lowered for GPUs; `options` beside COMPILE_OPTIONS."""
    with TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder}
        compiled = lowered.compile(compiler_options={**COMPILE_OPTIONS, **(options or {}), **dump})
        [file] = Path(folder).glob("*.thunk_sequence.txt")
        launched = parse(file.read_text("utf-8"))
    return Program(compiled, report(compiled, launched))


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


def operations(text: str) -> Iterator[Op]:
    """The instructions of optimised HLO that run by themselves; a fusion is its result."""
    bodies = _computations(text)
    lines = [line for body in bodies.values() for line in body]
    fused = {_called(line) for line in lines if " fusion(" in line}
    for name, body in bodies.items():
        if name not in fused:
            for line in body:
                yield from _ops(line, bodies)


def size_bytes(shape: str) -> int:
    """Bytes of the largest array in an HLO shape: "(f32[8,4]{1,0}, s8[16]{0})" -> 128."""
    sizes = [0]
    for _, bits, dims in _ARRAY.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * int(bits or 8) // 8)
    return max(sizes)


def _ops(line: str, bodies: dict[str, list[str]]) -> Iterator[Op]:
    match = _INSTRUCTION.match(line)
    if match is None:
        return
    _, name, shape, kind = match.groups()
    if kind == "fusion":
        for inner in _results(bodies.get(_called(line), [])):
            yield Op(inner.kind, name, inner.size_bytes)
    elif not kind.endswith("-done"):
        detail = _TARGET.search(line) or _STRATEGY.search(line)
        found = detail.group(1) if detail else ""
        yield Op(kind.removesuffix("-start"), name, size_bytes(shape), found)


def _results(body: list[str]) -> list[Op]:
    """What makes the results of a fused computation: its root, or the members of that."""
    ops = {}
    for line in body:
        if match := _INSTRUCTION.match(line):
            root, name, shape, kind = match.groups()
            ops[name] = Op(kind, name, size_bytes(shape))
            if root and kind == "tuple":
                members = line[match.end() :].split(")")[0]
                return [ops[member] for member in re.findall(r"%([\w.\-]+)", members)]
            if root:
                return [_before_bitcasts(name, ops, line)]
    return []


def _before_bitcasts(name: str, ops: dict[str, Op], line: str) -> Op:
    """The root itself, or what it only sees as another shape."""
    if ops[name].kind == "bitcast":
        operand = re.search(r"bitcast\(%([\w.\-]+)\)", line)
        return ops[operand.group(1)] if operand else ops[name]
    return ops[name]


def _computations(text: str) -> dict[str, list[str]]:
    """Name of each computation -> its lines."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match.group(2), [])
        else:
            current.append(line)
    return bodies


def _called(line: str) -> str:
    match = _CALLS.search(line)
    return match.group(1) if match else ""
