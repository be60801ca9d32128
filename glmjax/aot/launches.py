"""What a program launches on a GPU, in order, as XLA wrote it down when it compiled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
from jax._src.interpreters import mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.mosaic.python import mosaic_gpu as mosaic_dialect

MOSAIC = "mosaic_gpu_v2"
# "001: kCustomKernel [prev | next] count grid: [160, 1, 1] threads: ... shared_memory: 16 bytes"
LINE = re.compile(r"^\s*\d+: (k\w+)\s+\[[^\]]*\]\s*(\S*)(?:.*shared_memory: (\d+) bytes)?", re.M)
CONTAINERS = {"kSequential", "kCommandBuffer", "kWhile", "kConditional"}


class Launch(NamedTuple):
    """Something that a program starts on the device.

    Attributes:
        kind: XLA's: "kCustomKernel", "kCopy", "kMemset", "kGemm", ...
        name: the kernel's.
        shared_bytes: memory that each of its blocks shares.
    """

    kind: str
    name: str
    shared_bytes: int


def lower_for(
    mesh: Mesh, function: Callable[..., Any], inputs: Any, donate: tuple[int, ...] = ()
) -> jax.stages.Lowered:
    """A function's program for the GPU of a mesh of one, which need not be there.

    Args:
        inputs: trees of abstract arrays.
        donate: inputs that are updated in place.
    """
    sharding = NamedSharding(mesh, PartitionSpec())
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), inputs
    )
    traced = jax.jit(function, donate_argnums=donate).trace(*placed)
    return traced.lower(lowering_platforms=("cuda",))


def with_launches(
    lowered: jax.stages.Lowered, options: Mapping[str, Any]
) -> tuple[jax.stages.Compiled, tuple[Launch, ...]]:
    """Compile one call of each kernel, and list the launches with what Mosaic's share."""
    executable, found = compile_listed(lowered, options)
    return executable, tuple(_named(found, mosaic_shared_bytes(lowered)))


def compile_listed(
    lowered: jax.stages.Lowered, options: Mapping[str, Any]
) -> tuple[jax.stages.Compiled, list[Launch]]:
    """Compile, and read what XLA wrote down that it launches."""
    with TemporaryDirectory() as folder:
        executable = lowered.compile(compiler_options={**options, "xla_dump_to": folder})
        [file] = Path(folder).glob("*.thunk_sequence.txt")
        return executable, parse(file.read_text("utf-8"))


def parse(text: str) -> list[Launch]:
    """Launches of a `thunk_sequence.txt`."""
    found = [Launch(kind, name, int(size or 0)) for kind, name, size in LINE.findall(text)]
    return [launch for launch in found if launch.kind not in CONTAINERS]


def _named(launches: list[Launch], mosaic: list[tuple[str, int]]) -> Iterator[Launch]:
    """XLA does not know the names of Mosaic's kernels, which come in the program's order."""
    names = iter(mosaic)
    for launch in launches:
        yield Launch(launch.kind, *next(names)) if launch.kind == "kCustomCall" else launch


def mosaic_shared_bytes(lowered: jax.stages.Lowered) -> list[tuple[str, int]]:
    """Name and shared memory of each Mosaic kernel of a program: only its own code tells."""
    found = []
    program: Any = lowered.compiler_ir("stablehlo")
    for op in _walk(program.operation):
        if op.name == "stablehlo.custom_call" and MOSAIC in str(op.attributes["call_target_name"]):
            config = ir.DictAttr(op.attributes["mhlo.backend_config"])
            found.append(_shared_bytes(ir.StringAttr(config["module"]).value_bytes))
    return found


def _shared_bytes(bytecode: bytes) -> tuple[str, int]:
    context = mlir.make_ir_context()
    context.allow_unregistered_dialects = True
    mosaic_dialect.register_dialect(context)
    context.load_all_available_dialects()
    with context:
        module = ir.Module.parse(bytecode)
        name = ir.StringAttr(module.operation.attributes["sym_name"]).value
        [launch] = [op for op in _walk(module.operation) if op.name.endswith("gpu.launch")]
        size = launch.operands[-1].owner.attributes["value"]  # the last operand, a constant
        return f"{name}_mosaic_gpu_kernel", ir.IntegerAttr(size).value


def _walk(op: ir.Operation) -> Iterator[ir.Operation]:
    for region in op.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _walk(inner.operation)
