"""What a compiled program runs on the GPU: its kernels' registers, stack and machine instructions.

A serialised program is a Riegeli file (https://github.com/google/riegeli, "Riegeli/records file
format"): chunks of records, in blocks of 64 KiB that each begin with a header. In its records lie
cubins, which are ELF files. NVIDIA's cuobjdump and nvdisasm read those.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cramjam  # pyright: ignore[reportMissingImports]  the extra "aot" has it
import jax
from jax.experimental import serialize_executable

from glmjax.aot.target import tool

_FILE_START = bytes.fromhex("83af70d10d884a3f")  # the hash that begins the first block's header
_BLOCK, _BLOCK_HEADER = 1 << 16, 24
_CHUNK_HEADER = struct.Struct("<8xQ8xB15x")  # hash, size, hash, type, number of records, size
_SIMPLE, _SIGNATURE, _METADATA, _PADDING = b"rsmp"
_RAW, _SNAPPY = b"\0s"

_ELF_MAGIC = b"\x7fELF\x02\x01\x01"
_ELF_HEADER = struct.Struct("<18xH12xQQ6xHHHH2x")  # machine, tables' places, sizes and lengths
_CUDA = 190

_RESOURCES = re.compile(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_FUNCTION = re.compile(r"^\.text\.(\S+):$", re.MULTILINE)
_OPCODE = re.compile(
    r"^\s+(?:/\*\w+\*/)?\s*\{?\s*(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)[. ;]", re.MULTILINE
)

TENSOR_CORE = ("QGMMA", "HGMMA", "IGMMA", "QMMA", "HMMA", "IMMA")


@dataclass(frozen=True)
class Kernel:
    """One function of a GPU program.

    Attributes:
        name: its symbol.
        registers: of a thread, 32 bits each.
        stack_bytes: of a thread.
        shared_bytes: of a block, as far as the code fixes them; a launch may add its own.
        opcodes: how often each machine instruction stands in the code, by its name up to the
            first dot: {"HGMMA": 8, "LDG": 4, ...}.
    """

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]

    @property
    def spills(self) -> int:
        """Instructions that load from a thread's own memory or store there."""
        return self.opcodes["LDL"] + self.opcodes["STL"]

    @property
    def tensor_core(self) -> dict[str, int]:
        """Instructions of the tensor cores: QGMMA takes FP8, HGMMA BF16 (HMMA before Hopper)."""
        return {name: self.opcodes[name] for name in TENSOR_CORE if self.opcodes[name]}


def kernels(compiled: jax.stages.Compiled) -> list[Kernel]:
    """The kernels of a program compiled for GPUs; those of libraries (cublasLt) are not in it.

    Raises:
        ConfigError: cuobjdump or nvdisasm is not installed.
        ValueError: a form of serialised program that this does not read.
    """
    serialised, _, _ = serialize_executable.serialize(compiled)
    different = dict.fromkeys(cubins(serialised))
    return [kernel for cubin in different for kernel in read_cubin(cubin)]


def cubins(serialised: bytes) -> list[bytes]:
    """The cubins in a serialised program. Raises ValueError as `kernels` does."""
    start = serialised.find(_FILE_START)
    if start < 0:
        raise ValueError("the serialised program holds no Riegeli file")
    return [elf for records in _records(serialised[start:]) for elf in _elves(records)]


def read_cubin(cubin: bytes) -> list[Kernel]:
    """Disassemble one cubin. Raises ConfigError as `kernels` does."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "-res-usage", file)
        code = _run("nvdisasm", "-c", file)
    return parse(usage, code)


def parse(usage: str, code: str) -> list[Kernel]:
    """Kernels from what `cuobjdump -res-usage` and `nvdisasm -c` say of one cubin."""
    functions = {name: opcodes(text) for name, text in _functions(code)}
    return [
        Kernel(name, int(registers), int(stack), int(shared), functions.get(name, Counter()))
        for name, registers, stack, shared in _RESOURCES.findall(usage)
    ]


def opcodes(code: str) -> Counter[str]:
    """How often each instruction stands in disassembled code."""
    return Counter(_OPCODE.findall(code))


def _run(program: str, option: str, file: Path) -> str:
    command = [str(tool("nvidia.cu13", f"bin/{program}")), option, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _functions(code: str) -> Iterator[tuple[str, str]]:
    """Name and code of every function."""
    _, *parts = _FUNCTION.split(code)
    return zip(parts[::2], parts[1::2], strict=True)


def _records(file: bytes) -> Iterator[bytes]:
    """The decompressed records of each chunk of a Riegeli file, which something else may follow."""
    blocks = range(0, len(file), _BLOCK)
    stream = b"".join(file[start + _BLOCK_HEADER : start + _BLOCK] for start in blocks)
    place = 0
    while place + _CHUNK_HEADER.size <= len(stream):
        size, kind = _CHUNK_HEADER.unpack_from(stream, place)
        place += _CHUNK_HEADER.size
        if kind == _SIMPLE:
            yield _decompressed(stream[place : place + size])
        elif kind not in (_SIGNATURE, _METADATA, _PADDING):
            return
        place += size


def _decompressed(chunk: bytes) -> bytes:
    """The records of a simple chunk: compression, length of their sizes, sizes, records."""
    sizes, start = _varint(chunk, 1)
    records = chunk[start + sizes :]
    if chunk[0] == _RAW:
        return records
    if chunk[0] == _SNAPPY:
        _, start = _varint(records, 0)
        return bytes(cramjam.snappy.decompress_raw(records[start:]))
    raise ValueError(f"a serialised program compressed by {chr(chunk[0])!r}, expected Snappy")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while data[place] & 0x80:
        value |= (data[place] & 0x7F) << shift
        place, shift = place + 1, shift + 7
    return value | data[place] << shift, place + 1


def _elves(records: bytes) -> Iterator[bytes]:
    """Every CUDA ELF file in `records`: one of its two tables of headers comes last."""
    for match in re.finditer(re.escape(_ELF_MAGIC), records):
        start = match.start()
        machine, *tables = _ELF_HEADER.unpack_from(records, start)
        programs, sections, program_size, program_count, section_size, section_count = tables
        if machine == _CUDA:
            ends = programs + program_size * program_count, sections + section_size * section_count
            yield records[start : start + max(ends)]
