"""What is read out of compiled kernels is what was put in."""

from __future__ import annotations

import struct
from collections import Counter

import cramjam
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from described import compile_kernel
from glmjax.aot import cubins

pytestmark = pytest.mark.aot


def matmul(m: int, dtype=jnp.bfloat16):
    """A kernel of one tensor-core product [m, 128] x [128, m], as Triton compiles it."""

    def kernel(x, y, out):
        out[...] = plgpu.dot(x[...], y[...])

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((m, m), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        name=f"product_{m}",
    )
    shapes = jax.ShapeDtypeStruct((m, 128), dtype), jax.ShapeDtypeStruct((128, m), dtype)
    return compile_kernel(call, *shapes)


def test_a_products_kernel_uses_tensor_cores_and_no_stack():
    [kernel] = cubins.kernels(matmul(64))
    assert kernel.name == "product_64"
    assert kernel.tensor_core.keys() == {"HGMMA"}
    assert 16 <= kernel.registers <= 255
    assert kernel.stack_bytes == 0
    assert kernel.spills == 0


def test_a_sum_uses_none():
    [kernel] = cubins.kernels(compile_kernel(lambda x: x * 2 + 1, jnp.zeros((1024, 8))))
    assert kernel.tensor_core == {}
    assert kernel.opcodes["STG"]


def test_every_kernel_of_a_program_is_found_once():
    def both(x, y):
        return jnp.sort(x, axis=-1), jnp.tanh(y) + 1

    found = cubins.kernels(compile_kernel(both, jnp.zeros((4, 64)), jnp.zeros(4096)))
    assert sorted(k.name.rstrip("_0123456789") for k in found) == ["loop_add_fusion", "sort"]


def test_a_stack_is_seen():
    usage = " Function hungry:\n  REG:255 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:528\n"
    code = ".text.hungry:\n  /*0000*/  STL [R1], R2 ;\n  /*0010*/ @!P0 LDL.64 R4, [R1+0x8] ;\n"
    [kernel] = cubins.parse(usage, code)
    assert (kernel.registers, kernel.stack_bytes, kernel.shared_bytes) == (255, 24, 1024)
    assert kernel.spills == 2


def test_opcodes_with_predicates_and_suffixes():
    code = "\n".join(
        [
            "        /*0000*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;",
            "        /*0010*/              @!UPT UIADD3 URZ, URZ, URZ, URZ ;",
            "        /*0020*/              @P0 EXIT ;",
            "        /*0030*/                   QGMMA.64x32x32.F32.E4M3.E4M3 R24, R4, gdesc[UR4] ;",
            ".L_x_0:",
        ]
    )
    assert cubins.opcodes(code) == Counter(HGMMA=1, UIADD3=1, EXIT=1, QGMMA=1)


# The file that cubins lie in, written here by the published description of its format


def varint(value: int) -> bytes:
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def chunk(records: list[bytes], snappy: bool) -> bytes:
    """A simple chunk: kind of compression, size of the sizes, sizes, values."""
    sizes, values = b"".join(varint(len(r)) for r in records), b"".join(records)
    if snappy:
        sizes, values = (
            varint(len(part)) + bytes(cramjam.snappy.compress_raw(part)) for part in (sizes, values)
        )
    data = (b"s" if snappy else b"\0") + varint(len(sizes)) + sizes + values
    return header(b"r", len(data), len(records)) + data


def header(kind: bytes, size: int, records: int = 0) -> bytes:
    return b"\1" * 8 + struct.pack("<Q", size) + b"\2" * 8 + kind + bytes(7) + bytes(8)


def file_of(chunks: list[bytes]) -> bytes:
    """Chunks in blocks of 64 KiB, the first chunk being the file's signature."""
    stream = header(b"s", 0) + b"".join(chunks)
    body = (1 << 16) - 24
    blocks = [stream[i : i + body] for i in range(0, len(stream), body)]
    starts = [bytes.fromhex("83af70d10d884a3f"), *[b"\3" * 8] * (len(blocks) - 1)]
    return b"".join(s + bytes(16) + b for s, b in zip(starts, blocks, strict=True))


def elf(size: int, machine: int = 190) -> bytes:
    """The header of an ELF file whose section headers, one, end at `size`."""
    start = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HH", 2, machine)
    places = struct.pack("<IQQQ", 1, 0, 64, size - 64)
    return (start + places + struct.pack("<I6H", 0, 64, 56, 1, 64, 1, 0)).ljust(size, b"\7")


@given(
    sizes=st.lists(st.integers(200, 90_000), min_size=1, max_size=5),
    snappy=st.booleans(),
    apart=st.booleans(),
)
def test_cubins_come_back_from_any_file(sizes, snappy, apart):
    cubin_files = [elf(size) for size in sizes]
    records = [b"name" + cubin + b"rest" for cubin in cubin_files]
    groups = [[record] for record in records] if apart else [records]
    file = file_of([chunk(group, snappy) for group in groups])
    assert cubins.cubins(b"before" + file + b"after") == cubin_files


def test_other_elf_files_are_left():
    file = file_of([chunk([elf(300, machine=62), elf(400)], snappy=True)])
    assert cubins.cubins(file) == [elf(400)]


def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="no Riegeli file"):
        cubins.cubins(b"something else")
    odd = chunk([elf(300)], snappy=False).replace(b"\0" * 15 + b"\0", b"\0" * 15 + b"b", 1)
    with pytest.raises(ValueError, match="expected Snappy"):
        cubins.cubins(file_of([odd]))
