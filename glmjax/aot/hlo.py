"""Reading the text of an optimised HLO module: which instructions run, and what they write."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\(([^)]*)\)")
_CALLS = re.compile(r"\bcalls=%([\w.\-]+)")
_DETAIL = re.compile(r'custom_call_target="([^"]+)"|"kernel_strategy":"KERNEL_STRATEGY_(\w+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_ENTRY = "ENTRY"


class Op(NamedTuple):
    """An instruction that runs by itself and writes to memory.

    Attributes:
        kind: HLO's name of it, such as "copy"; of a fusion, that of its result.
        name: this one's.
        size_bytes: of the largest array that it makes, on one device.
        detail: a custom call's target, or the kernel that XLA chose for a collective.
        argument_bytes: of the largest argument of the program that it reads itself; 0: it reads
            none. What loops and conditions are passed does not count.
    """

    kind: str
    name: str
    size_bytes: int
    detail: str = ""
    argument_bytes: int = 0


class _Instruction(NamedTuple):
    name: str
    kind: str
    shape: str
    operands: tuple[str, ...]
    is_root: bool
    line: str


_Body = dict[str, _Instruction]


def operations(text: str) -> Iterator[Op]:
    """The instructions of a module; a fusion stands for what makes its results."""
    bodies = _computations(text)
    fused = {_called(i) for body in bodies.values() for i in body.values() if i.kind == "fusion"}
    arguments = _argument_bytes(bodies.get(_ENTRY, {}))
    for name, body in bodies.items():
        read = arguments if name == _ENTRY else {}
        for instruction in () if name in fused else body.values():
            largest = max((read.get(operand, 0) for operand in instruction.operands), default=0)
            for op in _ops(instruction, bodies):
                yield op._replace(argument_bytes=largest)


def size_bytes(shape: str) -> int:
    """Bytes of the largest array in an HLO shape: "(f32[8,4]{1,0}, s8[16]{0})" -> 128."""
    sizes = [0]
    for _, bits, dims in _ARRAY.findall(shape):
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        sizes.append(count * int(bits or 8) // 8)
    return max(sizes)


def _ops(instruction: _Instruction, bodies: dict[str, _Body]) -> Iterator[Op]:
    kind, name = instruction.kind, instruction.name
    if kind == "fusion":
        for result in _results(bodies.get(_called(instruction), {})):
            yield Op(result.kind, name, size_bytes(result.shape))
    elif not kind.endswith("-done"):
        detail = _DETAIL.search(instruction.line)
        found = (detail.group(1) or detail.group(2)) if detail else ""
        yield Op(kind.removesuffix("-start"), name, size_bytes(instruction.shape), found)


def _results(body: _Body) -> list[_Instruction]:
    """What makes the results of a fused computation: its root, or the members of that."""
    [root] = [i for i in body.values() if i.is_root] or [None]
    if root is None:
        return []
    results = [body[name] for name in root.operands] if root.kind == "tuple" else [root]
    return [_before_bitcasts(result, body) for result in results]


def _before_bitcasts(instruction: _Instruction, body: _Body) -> _Instruction:
    while instruction.kind == "bitcast":
        instruction = body[instruction.operands[0]]
    return instruction


def _argument_bytes(entry: _Body) -> dict[str, int]:
    """Bytes of each argument, by its name and by those of the same memory in other shapes."""
    found: dict[str, int] = {}
    for name, instruction in entry.items():
        if instruction.kind == "parameter":
            found[name] = size_bytes(instruction.shape)
        elif instruction.kind == "bitcast" and instruction.operands[0] in found:
            found[name] = found[instruction.operands[0]]
    return found


def _computations(text: str) -> dict[str, _Body]:
    """Each computation by its name, the one that starts as "ENTRY"."""
    bodies: dict[str, _Body] = {}
    current: _Body = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = bodies.setdefault(_ENTRY if header.group(1) else header.group(2), {})
        elif found := _INSTRUCTION.match(line):
            root, name, shape, kind, operands = found.groups()
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            current[name] = _Instruction(name, kind, shape, names, bool(root), line)
    return bodies


def _called(instruction: _Instruction) -> str:
    match = _CALLS.search(instruction.line)
    return match.group(1) if match else ""
