"""The kernels' gate: what they compile to at official shapes, held to a table; no GPU is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import triton as plgpu

from glmjax.aot import kernels, launches, target
from glmjax.aot.kernels import Built
from glmjax.config import MeshConfig
from pallas_kernels.backend import Backend
from pallas_kernels.official import AIR, BF16, FP8, LARGE, Case, all_cases, grouped_cases
from pallas_kernels.triton import launch

pytestmark = pytest.mark.aot

BACKEND = Backend("mosaic")
MB = 1_000_000
# 1408 is 11 * 128: few tiles divide its quarters and eighths. All of a split that is `WHOLE` is
# compiled, of the others what the experts do.
SPLITS = (AIR.tensor(4), AIR.tensor(8), AIR.expert(8))
SPLITS += (LARGE.tensor(1), LARGE.tensor(8), LARGE.expert(8))
WHOLE = (AIR.tensor(1), LARGE.tensor(8))


class Expected(NamedTuple):
    """What a case may compile to.

    Attributes:
        registers: of a thread, at most: what was seen, in the steps of 8 that they are dealt in.
        tensor: the matrix instructions, those and no others.
        launches: exactly so many.
        temp_bytes: memory in between, at most.
    """

    registers: int
    tensor: tuple[str, ...] = ()
    launches: int = 1
    temp_bytes: int = 1024  # where results are several, their addresses


# The first pattern that is found in "op case" holds. Experts' widths of 176 and 352 have products
# that only Triton can say. Decode attention has too few rows for wgmma.
EXPECTED = {
    r"^grouped_matmul air tp8 float8.* gate_up, (8|64) ": Expected(72, ("HMMA",)),
    r"^grouped_matmul air tp8 float8.* down, (8|64) ": Expected(72, ("HMMA",)),
    r"^grouped_matmul air tp8 float8.* down": Expected(160, ("HMMA",)),
    r"^grouped_matmul air tp8 bfloat16.* gate_up, (8|64) ": Expected(72, ("HMMA",)),
    r"^grouped_matmul .*float8.* 2048 tokens": Expected(168, ("QGMMA",)),
    r"^grouped_matmul .* ep8 float8.* 64 tokens": Expected(80, ("QGMMA",)),
    r"^grouped_matmul .*float8": Expected(40, ("QGMMA",)),
    r"^grouped_matmul .*bfloat16.* 2048 tokens": Expected(168, ("HGMMA",)),
    r"^grouped_matmul .* ep8 bfloat16.* 64 tokens": Expected(80, ("HGMMA",)),
    r"^grouped_matmul .*bfloat16": Expected(48, ("HGMMA",)),
    r"^paged_attention .* 1 of": Expected(128, ("HMMA",), 2, 4 * MB),
    r"^paged_attention .* 4 of": Expected(144, ("HGMMA",), 2, 16 * MB),
    r"^paged_attention": Expected(176, ("HGMMA",), 2, 32 * MB),
    r"^align .* 2048 tokens": Expected(72, launches=2),
    r"^align": Expected(72),
    r"^route": Expected(88, launches=2, temp_bytes=4 * 2048),
    r"^(gather_rows|combine|silu_mul)": Expected(32),
    r"^(add_rms_norm|rotate_and_store|quantize_rows)": Expected(48),
}


def name_of(case: Case) -> str:
    return f"{case.op} {case.label}"


def cases() -> list[Case]:
    """Those that the gate compiles."""
    experts = [case for case in all_cases(BACKEND, SPLITS) if case.op == "grouped_matmul"]
    others = [case for case in all_cases(BACKEND, WHOLE, (8, 2048)) if case.op != "grouped_matmul"]
    return [*experts, *others]


def pattern_of(case: Case) -> str:
    return next(pattern for pattern in EXPECTED if re.search(pattern, name_of(case)))


def faults(built: Built, expected: Expected) -> Iterator[str]:
    """What is not as expected, in words."""
    for kernel in built.kernels:
        if kernel.registers > expected.registers:
            yield f"{kernel.name}: {kernel.registers} registers, at most {expected.registers}"
        if kernel.stack_bytes or kernel.spills:
            yield f"{kernel.name}: stack {kernel.stack_bytes} bytes, {kernel.spills} spills"
    tensor = kernels.tensor_cores(built.kernels)
    if tensor != list(expected.tensor):
        yield f"multiplies with {tensor}, expected {list(expected.tensor)}"
    if len(built.launches) != expected.launches:
        yield f"launches {[launch.name for launch in built.launches]}, not {expected.launches}"
    if built.temp_bytes > expected.temp_bytes:
        yield f"{built.temp_bytes:,} temporary bytes, at most {expected.temp_bytes:,}"


def donated_bytes(case: Case) -> int:
    """Bytes of the inputs that are updated in place."""
    inputs = case.abstract()
    return sum(inputs[i].size * inputs[i].dtype.itemsize for i in case.donate)


@pytest.fixture(scope="module")
def h100() -> Any:
    return target.described_mesh("h100", MeshConfig(1, 1))


@pytest.mark.parametrize("case", cases(), ids=name_of)
def test_a_kernel_compiles_as_expected(case: Case, h100):
    found = kernels.build(case, BACKEND, h100)
    assert list(faults(found, EXPECTED[pattern_of(case)])) == []
    assert found.alias_bytes == donated_bytes(case)


# The gate can fail

SUM = Expected(48)  # of a kernel that multiplies no matrices


def built(mesh: Any, function: Any, *shapes: Any, options: Any = target.COMPILE_OPTIONS) -> Built:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return kernels.compiled(launches.lower_for(mesh, function, inputs), options)


def test_every_expectation_is_of_some_case():
    assert {pattern_of(case) for case in cases()} == EXPECTED.keys()


def too_wide(x):
    """The softmax of 8,192 numbers by one warp, 256 a thread."""

    def kernel(x_ref, out_ref):
        x = jnp.exp(x_ref[...] - jnp.max(x_ref[...], axis=1)[:, None])
        out_ref[...] = x / jnp.sum(x, axis=1)[:, None]

    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return launch(kernel, [x], [shape], grid=(1,), name="add_rms_norm", warps=1)


def test_a_kernel_that_spills_does_not_compile(h100):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"[Ss]pill"):
        built(h100, too_wide, ((2, 4096), jnp.float32))


def test_a_kernel_that_spills_is_reported(h100):
    options = target.COMPILE_OPTIONS | {"xla_gpu_fail_ptx_compilation_on_register_spilling": False}
    found = built(h100, too_wide, ((2, 4096), jnp.float32), options=options)
    text = "\n".join(faults(found, SUM))
    assert re.search(r"add_rms_norm: 255 registers, at most", text)
    assert re.search(r"add_rms_norm: stack [1-9]\d* bytes, [1-9]\d* spills", text)


def test_experts_through_triton_are_reported(h100):
    backend = Backend("triton")
    case = next(grouped_cases(LARGE.tensor(8), 8, FP8, backend))
    text = "\n".join(faults(kernels.build(case, backend, h100), EXPECTED[pattern_of(case)]))
    assert "multiplies with ['HMMA'], expected ['QGMMA']" in text


def widened(x, w):
    """An FP8 product that multiplies in bfloat16."""

    def kernel(x_ref, w_ref, out_ref):
        x, w = (ref[...].astype(jnp.bfloat16) for ref in (x_ref, w_ref))
        out_ref[...] = plgpu.dot(x, w, trans_b=True)

    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), jnp.float32)
    return launch(kernel, [x, w], [shape], grid=(1,), name="grouped_decode", warps=4)


def test_an_fp8_product_in_bfloat16_is_reported(h100):
    found = built(h100, widened, ((64, 64), FP8), ((64, 64), FP8))
    text = "\n".join(faults(found, Expected(80, ("QGMMA",))))
    assert re.search(r"multiplies with \['H(G)?MMA'\], expected \['QGMMA'\]", text)


def test_an_fp8_product_of_xla_in_bfloat16_is_reported(h100):
    def function(x, w):
        return x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)

    found = built(h100, function, ((64, 256), FP8), ((256, 128), FP8))
    text = "\n".join(faults(found, Expected(80, ("QGMMA",))))
    assert "multiplies with []" in text
    assert "temporary bytes" in text  # the weights, widened


def test_a_scan_that_copies_weights_is_reported(h100):
    def function(x, layers):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0]

    found = built(h100, function, ((8, 1024), jnp.bfloat16), ((4, 1024, 1024), jnp.bfloat16))
    assert found.temp_bytes >= 1024 * 1024 * 2  # a layer's weights
    assert any("temporary bytes" in fault for fault in faults(found, SUM))


def test_a_launch_too_many_is_reported(h100):
    def copy(x_ref, out_ref):
        out_ref[...] = x_ref[...]

    def function(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        for _ in range(2):
            [x] = launch(copy, [x], [shape], grid=(1,), name="copy")
        return x

    [fault] = faults(built(h100, function, ((128,), jnp.float32)), SUM)
    assert fault == "launches ['copy', 'copy'], not 1"


def test_a_pool_that_is_not_donated_is_not_aliased(h100):
    case = next(case for case in cases() if case.donate)
    found = kernels.build(replace(case, donate=()), BACKEND, h100)
    assert found.alias_bytes == 0 < donated_bytes(case)


def test_launches_have_names_and_shared_memory():
    text = (
        "001: kCustomKernel [source       | next=002 (1)] count grid: [160, 1, 1]"
        " threads: [128, 1, 1]  shared_memory: 16 bytes\n"
        "002: kWhile        [prev=001 (1) | sink        ] kWhile\n"
        "    003: kCopy     [prev=002 (1) | sink        ] kCopy\n"
    )
    assert launches.parse(text) == [("kCustomKernel", "count", 16), ("kCopy", "kCopy", 0)]


# The table


def test_a_roofline_is_the_larger_of_two_times():
    few, many = (next(grouped_cases(LARGE.tensor(1), n, FP8, BACKEND)) for n in (1, 8192))
    weights = 8 * 2 * LARGE.width * LARGE.hidden  # one token's experts, a byte a weight
    assert kernels.roofline_us(few, "h100") == pytest.approx(1e6 * weights / 3.35e12, rel=0.01)
    assert kernels.roofline_us(few, "h200") == pytest.approx(1e6 * weights / 4.8e12, rel=0.01)
    products = 8192 * 8 * 2 * 2 * LARGE.width * LARGE.hidden
    assert kernels.roofline_us(many, "h100") == pytest.approx(1e6 * products / 1978.9e12)
    assert kernels.precision(next(grouped_cases(LARGE, 8, BF16, BACKEND))) == "bfloat16"


def test_the_command_prints_a_table(capsys):
    assert kernels.main(["--cases", "^route 355b tp8, 8 tokens"]) == 0
    head, _, line = capsys.readouterr().out.splitlines()
    row = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert row["case"] == "355b tp8, 8 tokens"
    assert row["kernels"] == "wrapped_convert, route"
    assert (row["launches"], row["stack"], row["spills"]) == ("2", "0", "0")


def test_the_command_can_leave_the_compiler_out(capsys):
    arguments = ["--no-compile", "--json", "--tokens", "3", "--cases", "^combine 355b tp8 bfloat16"]
    assert kernels.main(arguments) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row.keys() == {"op", "case", "MB", "GFLOP", "roofline us"}
    assert row["MB"] == pytest.approx((3 * 8 + 3 + 3) * 5120 * 2 / 1e6)


def test_a_case_that_does_not_compile_is_a_row_and_a_status(monkeypatch, capsys, caplog):
    def refuse(backend, *inputs):
        raise NotImplementedError("no such kernel")

    case = next(case for case in cases() if case.op == "route")
    monkeypatch.setattr(kernels, "all_cases", lambda backend: [replace(case, run=refuse)])
    assert kernels.main([]) == 1
    assert "| no such kernel |" in capsys.readouterr().out
    assert "does not compile" in caplog.text


def test_no_cases_is_a_status():
    assert kernels.main(["--no-compile", "--cases", "^no such thing"]) == 1
