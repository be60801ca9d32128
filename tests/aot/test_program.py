"""A program with a known fault is reported with it, and one without is not."""

from __future__ import annotations

from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import NamedSharding

from described import lower_kernel, mesh_of
from glmjax.aot import cubins
from glmjax.aot.hlo import operations, size_bytes
from glmjax.aot.program import TRITON_KERNEL, Program, check_kernels, compile_program
from glmjax.sharding import gather_tensor, partition_spec, psum_tensor, shard_map

pytestmark = pytest.mark.aot

BF16, FP8 = jnp.bfloat16, jnp.float8_e4m3fn
MIB = 1 << 20


def array(shape: tuple[int, ...], dtype=jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def report_of(fn, *shapes, donate=()):
    return compile_program(lower_kernel(fn, *shapes, donate=donate)).report


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.einsum("tk,nk->tn", x, weight, preferred_element_type=jnp.float32)


def test_a_matrix_of_its_own_is_multiplied_where_it_lies():
    report = report_of(product, array((64, 4096), BF16), array((4096, 4096), BF16))
    assert report.large_moves(MIB) == []
    assert report.calls == {"__cublas$lt$matmul": 1}
    assert report.argument_count == 2
    assert report.argument_bytes == (64 + 4096) * 4096 * 2


def test_a_matrix_of_a_stack_is_copied_and_seen():
    def second(x: jax.Array, weights: jax.Array) -> jax.Array:
        return product(x, weights[1])

    report = report_of(second, array((64, 4096), BF16), array((3, 4096, 4096), BF16))
    [move] = report.large_moves(MIB)
    assert move.kind == "slice"
    assert move.size_bytes == 4096 * 4096 * 2
    assert move.argument_bytes == 3 * 4096 * 4096 * 2
    assert report.temp_bytes >= move.size_bytes


def test_an_fp8_product_is_one():
    report = report_of(product, array((64, 4096), FP8), array((4096, 4096), FP8))
    assert report.fp8_gemms == 1
    assert report.large_moves(MIB) == []


def test_weights_that_are_widened_first_are_seen():
    def widened(x: jax.Array, weight: jax.Array) -> jax.Array:
        return product(x, weight.astype(BF16))

    report = report_of(widened, array((64, 4096), BF16), array((4096, 4096), FP8))
    assert report.fp8_gemms == 0
    assert [move.kind for move in report.large_moves(MIB)] == ["convert"]


def test_a_transposed_copy_is_seen():
    def turned(x: jax.Array) -> jax.Array:
        return jnp.cumsum(x.T.reshape(-1).reshape(x.shape), axis=-1)

    assert report_of(turned, array((2048, 512))).large_moves(MIB)


SPILLS = {"xla_gpu_fail_ptx_compilation_on_register_spilling": False}


@pytest.mark.parametrize("columns", [64, 50_000])
def test_a_sort_is_seen(columns):
    x = array((8, columns))
    assert compile_program(lower_kernel(partial(jnp.sort, axis=-1), x), SPILLS).report.sorts
    assert not report_of(partial(jnp.max, axis=-1), x).sorts


def test_registers_that_spill_are_an_error_and_seen():
    lowered = lower_kernel(partial(jnp.sort, axis=-1), array((8, 50_000)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="register spilling"):
        compile_program(lowered)
    kernels = cubins.kernels(compile_program(lowered, SPILLS).compiled)
    assert any(kernel.spills and kernel.stack_bytes for kernel in kernels)


def test_a_pool_that_is_donated_stays_where_it_is():
    def write(pool: jax.Array, rows: jax.Array, at: jax.Array) -> jax.Array:
        return pool.at[at].set(rows)

    shapes = array((1024, 1024)), array((8, 1024)), array((8,), jnp.int32)
    donated, kept = report_of(write, *shapes, donate=(0,)), report_of(write, *shapes)
    assert donated.alias_bytes == 4 * MIB
    assert donated.large_moves(MIB) == []
    assert kept.alias_bytes == 0
    assert [move.kind for move in kept.large_moves(MIB)] == ["copy"]


def doubled(x: jax.Array) -> jax.Array:
    def kernel(x, out):
        out[...] = x[...] * 2

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=plgpu.CompilerParams(),
        name="doubled",
    )(x)


def test_a_kernel_that_lost_its_code_is_an_error_and_no_crash():
    lowered = lower_kernel(doubled, array((1024,)))
    assert len(compile_program(lowered).report.launches) == 1
    text = lowered.compiler_ir("hlo").as_hlo_text()
    whole = [line for line in text.splitlines() if TRITON_KERNEL in line]
    assert len(whole) == 1
    lost = text.replace(whole[0], whole[0].split(", backend_config=")[0])
    check_kernels(Converted(text))
    with pytest.raises(RuntimeError, match="1 of 1 Triton kernels lost their code"):
        compile_program(Converted(lost))


class Converted:
    """Stands for a lowered program whose HLO is known."""

    def __init__(self, text: str):
        self.text = text

    def compiler_ir(self, dialect: str) -> Converted:
        assert dialect == "hlo"
        return self

    def as_hlo_text(self) -> str:
        return self.text


def test_launches_are_counted():
    def chain(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.tanh(product(jnp.sin(x).astype(BF16), weight))

    report = report_of(chain, array((64, 1024)), array((1024, 1024), BF16))
    assert len(report.launches) == 3
    kinds = Counter(launch.kind for launch in report.launches)
    assert kinds == {"kCustomKernel": 2, "kCublasLtMatmul": 1}


def meeting() -> Program:
    """A sum and a join over 8 devices of [64, 512] parts."""
    mesh = mesh_of("h100", tensor=8)

    def both(x: jax.Array) -> jax.Array:
        return gather_tensor(jnp.sin(psum_tensor(x)))

    spread = (None, "vocab")
    fn = shard_map(both, mesh, (spread,), (None, None))
    sharding = NamedSharding(mesh, partition_spec(spread))
    x = jax.ShapeDtypeStruct((64, 4096), jnp.float32, sharding=sharding)
    return compile_program(jax.jit(fn).trace(x).lower(lowering_platforms=("cuda",)))


def test_what_crosses_devices_is_seen():
    report = meeting().report
    found = sorted((op.kind, op.size_bytes) for op in report.collectives)
    assert found == [("all-gather", 64 * 4096 * 4), ("all-reduce", 64 * 512 * 4)]
    [reduce] = [op for op in report.collectives if op.kind == "all-reduce"]
    assert reduce.detail == "TRITON_ONE_SHOT"


SHAPES = {
    "f32[8,4]{1,0}": 128,
    "(f32[8,4]{1,0}, s8[4194304]{0})": 4194304,
    "f8e4m3fn[3,5]{1,0}": 15,
    "bf16[]": 2,
    "pred[7]{0}": 7,
    "(bf16[2]{0}, /*index=1*/f32[2]{0})": 8,
    "token[]": 0,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes(shape):
    assert size_bytes(shape) == SHAPES[shape]


def test_a_fusions_inner_copies_do_not_count_but_its_results_do():
    text = """HloModule m

%fused (p: f32[4096]) -> (f32[1024], f32[8]) {
  %p = f32[4096]{0} parameter(0)
  %copy.1 = f32[4096]{0} copy(%p)
  %slice.2 = f32[32,32]{1,0} slice(%copy.1), slice={[0:32]}
  %bitcast.8 = f32[1024]{0} bitcast(%slice.2)
  %add.3 = f32[8]{0} add(%p, %p)
  ROOT %tuple.4 = (f32[1024]{0}, f32[8]{0}) tuple(%bitcast.8, %add.3)
}

ENTRY %main (a: f32[4096]) -> f32[1024] {
  %a = f32[4096]{0} parameter(0)
  %bitcast.5 = f32[64,64]{1,0} bitcast(%a)
  %copy.6 = f32[64,64]{0,1} copy(%bitcast.5)
  %copy.7 = f32[64,64]{1,0} copy(%copy.6)
  %fusion.9 = (f32[1024]{0}, f32[8]{0}) fusion(%a), kind=kLoop, calls=%fused
  ROOT %out = f32[1024]{0} get-tuple-element(%fusion.9), index=0
}
"""
    found = {(op.kind, op.name): op for op in operations(text)}
    assert found["slice", "fusion.9"].size_bytes == 4096
    assert found["add", "fusion.9"].size_bytes == 32
    read = {name: op.argument_bytes for (kind, name), op in found.items() if kind == "copy"}
    assert read == {"copy.6": 16384, "copy.7": 0}
