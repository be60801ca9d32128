"""What the kernels are at the official models' shapes, compiled for a GPU that need not be there.

`python -m glmjax.aot.kernels --help`. docs/kernels.md quotes its tables.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from tqdm import tqdm

from glmjax.aot import cubins, target
from glmjax.aot.hardware import GPUS
from glmjax.aot.launches import Launch, lower_for, with_launches
from glmjax.config import MeshConfig
from glmjax.errors import GlmjaxError
from glmjax.tables import show
from pallas_kernels.backend import NAMES, REF, Backend
from pallas_kernels.official import Case, all_cases

log = logging.getLogger(__name__)

NUMBERS = ("launches", "stack", "spills", "MB", "GFLOP", "roofline us")

MOSAIC_SUFFIX = "_mosaic_gpu_kernel"  # of the symbols of all of Mosaic's kernels

Row = dict[str, Any]


@dataclass(frozen=True)
class Built:
    """What a case compiled to.

    Attributes:
        launches: all that one call launches, in order.
        kernels: the GPU code in it.
        alias_bytes, temp_bytes: results that are inputs updated in place; memory in between.
    """

    launches: tuple[Launch, ...]
    kernels: tuple[cubins.Kernel, ...]
    alias_bytes: int
    temp_bytes: int


def build(case: Case, backend: Backend, mesh: Mesh) -> Built:
    """Compile a case for the first device of a mesh, described or real."""
    return compiled(lower(case, backend, mesh))


def lower(case: Case, backend: Backend, mesh: Mesh) -> jax.stages.Lowered:
    """A case's program, its donated inputs included."""
    return lower_for(mesh, lambda *x: case.run(backend, *x), case.abstract(), case.donate)


def compiled(
    lowered: jax.stages.Lowered, options: Mapping[str, Any] = target.COMPILE_OPTIONS
) -> Built:
    """Compile, and read what came out."""
    executable, launches = with_launches(lowered, options)
    memory = executable.memory_analysis()
    assert memory is not None
    return Built(
        launches,
        tuple(cubins.kernels(executable)),
        memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
    )


def roofline_us(case: Case, device: str) -> float:
    """Microseconds that memory or arithmetic take at least: the larger of the two."""
    gpu = GPUS[device]
    peak = gpu.flops_per_s(precision(case))
    return 1e6 * max(case.read_bytes / gpu.memory_bytes_per_s, case.flops / peak)


def precision(case: Case) -> str:
    """What a case multiplies: FP8 where both factors, its first inputs, are; else bfloat16."""
    factors = jax.tree.leaves(case.abstract())[:2]
    fp8 = all(factor.dtype == jnp.float8_e4m3fn for factor in factors)
    return "float8_e4m3fn" if fp8 else "bfloat16"


def row_of(built: Built) -> Row:
    """What was made of a case, by column of the table."""
    kernels = built.kernels
    shared = {launch.name: launch.shared_bytes for launch in built.launches}
    return {
        "kernels": [kernel.name.removesuffix(MOSAIC_SUFFIX) for kernel in kernels],
        "launches": len(built.launches),
        "registers": [kernel.registers for kernel in kernels],
        "shared bytes": [shared.get(kernel.name, kernel.shared_bytes) for kernel in kernels],
        "stack": max((kernel.stack_bytes for kernel in kernels), default=0),
        "spills": sum(kernel.spills for kernel in kernels),
        "tensor cores": tensor_cores(kernels),
    }


def arithmetic(case: Case, device: str) -> Row:
    """What a case asks for, by column of the table."""
    return {
        "MB": case.read_bytes / 1e6,
        "GFLOP": case.flops / 1e9,
        "roofline us": roofline_us(case, device),
    }


def tensor_cores(kernels: Sequence[cubins.Kernel]) -> list[str]:
    """Kinds of matrix instructions that there are."""
    return sorted({name for kernel in kernels for name in kernel.tensor_core})


def measure(
    cases: Sequence[Case], backend: Backend, device: str, *, compiling: bool = True
) -> Iterator[Row]:
    """A row for each case. Programs that are the same are compiled once.

    Args:
        compiling: False leaves what takes a compiler out.
    """
    mesh = target.described_mesh(device, MeshConfig(1, 1)) if compiling else None
    known: dict[str, Built] = {}
    bar = tqdm(cases, "compiling", unit="case", disable=None if compiling else True)
    for i, case in enumerate(bar, 1):
        found = _found(case, backend, mesh, known) if mesh else {}
        yield {"op": case.op, "case": case.label, **found, **arithmetic(case, device)}
        if bar.disable and compiling and i % 20 == 0:
            log.info("compiled %d of %d cases", i, len(cases))


def _found(case: Case, backend: Backend, mesh: Mesh, known: dict[str, Built]) -> Row:
    try:
        return row_of(_once(known, lower(case, backend, mesh)))
    except Exception as error:  # what a lowering raises can be anything; the others go on
        log.exception("%s %s does not compile", case.op, case.label)
        return {"error": str(error)}


def _once(known: dict[str, Built], lowered: jax.stages.Lowered) -> Built:
    text = lowered.as_text()
    if text not in known:
        known[text] = compiled(lowered)
    return known[text]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table, a line for each row, with the columns of all."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    rule = ["--:" if column in NUMBERS else "---" for column in columns]
    body = [[show(row.get(column, "")) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, rule, *body])


EPILOG = """columns:
  registers, shared bytes, stack, spills
                of each kernel, a thread's, a block's, a thread's, and reads and writes of it
  tensor cores  QGMMA multiplies FP8; HGMMA (of a warp group) and HMMA BF16
  MB, GFLOP     what the operation must move and compute at least
  roofline us   estimated: the larger of MB / memory bandwidth and GFLOP / tensor cores' peak

Nothing runs: a roofline is arithmetic, no time of a kernel.

examples:
  python -m glmjax.aot.kernels --cases "grouped_matmul 355b tp8 .* 64 tokens"
  python -m glmjax.aot.kernels --backend triton --cases "^(route|align)" --json
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.aot.kernels",
        description="Compile every kernel at the official models' shapes for a GPU, which need not"
        " be there, and print what came out as a markdown table.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--device", choices=GPUS, default="h100", help="default: %(default)s")
    kernels = [name for name in NAMES if name != REF.name]
    p.add_argument("--backend", choices=kernels, default="mosaic", help="default: %(default)s")
    p.add_argument(
        "--cases", type=re.compile, metavar="REGEX", help='of "op case", as in the table'
    )
    p.add_argument(
        "--tokens", type=positive, nargs="+", metavar="N", help="of the cases; default: 8 64 2048"
    )
    p.add_argument("--no-compile", action="store_true", help="only MB, GFLOP and roofline")
    p.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    return p


def positive(text: str) -> int:
    """A whole number above 0."""
    if (number := int(text)) < 1:
        raise ValueError(f"{number} is not above 0")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where something did not compile, or nothing was found; 2: wrong setup."""
    args = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    backend = Backend(args.backend, device=args.device)
    try:
        tokens = {"tokens": tuple(args.tokens)} if args.tokens else {}
        cases = chosen(all_cases(backend, **tokens), args.cases)
        rows = list(measure(cases, backend, args.device, compiling=not args.no_compile))
    except GlmjaxError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(rows, indent=1) if args.json else markdown(rows))
    return 0 if rows and not any("error" in row for row in rows) else 1


def chosen(cases: Sequence[Case], pattern: re.Pattern[str] | None) -> list[Case]:
    """Those whose "op label" the pattern is found in; None: all."""
    return [c for c in cases if pattern is None or pattern.search(f"{c.op} {c.label}")]


if __name__ == "__main__":
    sys.exit(main())
