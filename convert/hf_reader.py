"""Reads HF safetensors: which tensors a checkpoint holds, and their bytes.

Tensors are read by `pread` straight into their place in a caller's array, so that memory holds
nothing else: pages of a memory map would count as this process's own.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  teaches numpy the names bfloat16 and float8_e4m3fn
import numpy as np

from glmjax.checkpoint import MANIFEST
from glmjax.config import ModelConfig
from glmjax.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",  # powers of two, as scales
}
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file.

    Attributes:
        name: HF name.
        file: the file that holds it.
        offset: where its bytes begin there.
        size_bytes: how many there are.
        shape: as stored.
        dtype: numpy name, or the safetensors name of a dtype that glmjax does not read.
    """

    name: str
    file: Path
    offset: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Source:
    """An HF checkpoint.

    Attributes:
        folder: where it lies.
        config: its config.json.
        tensors: by name, those that the index lists and their files hold.
        unindexed: names in the files that the index does not list.
        files: its safetensors files.
    """

    folder: Path
    config: ModelConfig
    tensors: dict[str, Tensor]
    unindexed: tuple[str, ...]
    files: tuple[Path, ...]


def open_source(folder: str | Path) -> Source:
    """Read config, index and headers of an HF checkpoint.

    Raises:
        CheckpointError: not an HF checkpoint, files missing, truncated or damaged (all of them in
            one message).
        ConfigError: config.json is not that of a model glmjax serves.
    """
    folder = Path(folder)
    _check_folder(folder)
    config = ModelConfig.from_hf(folder)
    weight_map = _weight_map(folder)
    names = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    held = _read_headers(folder, names)
    if not weight_map:
        return Source(folder, config, held[SINGLE], (), (folder / SINGLE,))
    tensors = {n: held[file][n] for n, file in weight_map.items() if n in held[file]}
    unindexed = sorted(name for file in names for name in held[file] if name not in weight_map)
    return Source(folder, config, tensors, tuple(unindexed), tuple(folder / n for n in names))


def read_into(tensor: Tensor, out: np.ndarray) -> None:
    """Read a tensor's bytes into `out`: same dtype, same number of elements, any strides.

    Raises:
        CheckpointError: the file ended early.
    """
    with open(tensor.file, "rb", buffering=0) as file:
        _announce(file.fileno(), tensor)
        offset = tensor.offset
        for block in _contiguous_blocks(out):
            _read_block(file.fileno(), tensor, offset, block)
            offset += block.nbytes


def read_array(tensor: Tensor) -> np.ndarray:
    """A tensor as a new array in its own shape and dtype. Raises as `read_into` does."""
    out = np.empty(tensor.shape, tensor.dtype)
    read_into(tensor, out)
    return out


def read_row_blocks(tensor: Tensor, counts: Iterable[int]) -> Iterator[np.ndarray]:
    """The rows of a tensor [rows, columns], as many at a time as `counts` says, which add up.

    Raises as `read_into` does.
    """
    with open(tensor.file, "rb", buffering=0) as file:
        _announce(file.fileno(), tensor)
        offset = tensor.offset
        for count in counts:
            rows = np.empty((count, tensor.shape[-1]), tensor.dtype)
            _read_block(file.fileno(), tensor, offset, rows.reshape(-1).view(np.uint8))
            offset += rows.nbytes
            yield rows


def _announce(descriptor: int, tensor: Tensor) -> None:
    """Let the system fetch the whole tensor at once; read a piece at a time, a disk idles."""
    if hasattr(os, "posix_fadvise"):  # not on macOS
        os.posix_fadvise(descriptor, tensor.offset, tensor.size_bytes, os.POSIX_FADV_WILLNEED)


def _contiguous_blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Flat byte views whose concatenation is `array`."""
    if array.flags.c_contiguous:
        yield array.reshape(-1).view(np.uint8)
    else:
        for part in array:
            yield from _contiguous_blocks(part)


def _read_block(descriptor: int, tensor: Tensor, offset: int, block: np.ndarray) -> None:
    done = 0
    while done < block.nbytes:
        count = os.preadv(descriptor, [block[done:].data], offset + done)
        if count == 0:
            raise CheckpointError(f"{tensor.file} ended within {tensor.name}; download it again")
        done += count


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder; expected a downloaded HF checkpoint with config.json and "
            f"{INDEX} or {SINGLE}"
        )
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is converted already; serve it as it is")
    if not ((folder / INDEX).exists() or (folder / SINGLE).exists()):
        raise CheckpointError(
            f"{folder} has neither {INDEX} nor {SINGLE}; expected an HF checkpoint in safetensors "
            "form. Download it whole, or save it as safetensors"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name; empty without an index."""
    file = folder / INDEX
    if not file.exists():
        return {}
    try:
        weight_map = json.loads(file.read_text("utf-8"))["weight_map"]
        valid = bool(weight_map) and all(isinstance(v, str) for v in weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error!r}); download it again") from None
    if not valid:
        raise CheckpointError(f"{file} has no usable weight_map; download it again")
    return weight_map


def _read_headers(folder: Path, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """File name -> its tensors. Raises one CheckpointError for all damaged files."""
    held, faults = {}, []
    for name in names:
        try:
            held[name] = {tensor.name: tensor for tensor in read_header(folder / name)}
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(
            f"{folder} is not complete; download these files again:\n  " + "\n  ".join(faults)
        )
    return held


def read_header(file: Path) -> list[Tensor]:
    """The tensors of one safetensors file.

    Raises:
        CheckpointError: missing, not safetensors, or shorter than its header says.
    """
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, max(size - 8, 0)):
                raise ValueError(f"{size} bytes, header of {length}")
            raw = json.loads(stream.read(length))
        return _tensors(file, raw, 8 + length, size)
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error}); a Git LFS pointer, perhaps?"
        ) from None


def _tensors(file: Path, raw: dict[str, Any], start: int, file_bytes: int) -> list[Tensor]:
    entries = {name: entry for name, entry in raw.items() if name != "__metadata__"}
    promised = start + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if promised > file_bytes:
        raise CheckpointError(
            f"{file} is truncated: {file_bytes} bytes, its header promises {promised}"
        )
    return [_tensor(file, name, entry, start) for name, entry in entries.items()]


def _tensor(file: Path, name: str, entry: dict[str, Any], start: int) -> Tensor:
    begin, end = entry["data_offsets"]
    shape, stored = tuple(entry["shape"]), str(entry["dtype"])
    known, dtype = stored in DTYPES, DTYPES.get(stored, stored)
    if begin < 0 or (known and end - begin != math.prod(shape) * np.dtype(dtype).itemsize):
        raise ValueError(f"offsets of {name} do not fit its shape")
    return Tensor(name, file, start + begin, end - begin, shape, dtype)


def read_cast(tensor: Tensor, out: np.ndarray) -> None:
    """Read a tensor into `out`, of the same number of elements, in out's dtype."""
    if tensor.dtype == out.dtype.name:
        read_into(tensor, out)
    else:
        out[...] = read_array(tensor).reshape(out.shape)


def read_scales(scale: Tensor, block_rows: int, out: np.ndarray) -> None:
    """Read scales [ceil(rows / block_rows), blocks] into float32 `out` [..., blocks] of all rows.

    Repeating them along the rows lets any part of the rows stand alone.
    """
    rows = out.size // out.shape[-1]
    values = read_array(scale).astype(np.float32)
    out[...] = np.repeat(values, block_rows, axis=0)[:rows].reshape(out.shape)


def read_dequantised(
    tensor: Tensor, scale: Tensor, block: tuple[int, int], out: np.ndarray
) -> None:
    """Read values times scales, multiplied in float32 and rounded once, into `out`.

    Args:
        block: rows and columns that share a scale.
    """
    values = read_array(tensor).astype(np.float32)
    rows, columns = values.shape
    scales = np.repeat(read_array(scale).astype(np.float32), block[0], axis=0)[:rows]
    values *= np.repeat(scales, block[1], axis=1)[:, :columns]
    out[...] = values.reshape(out.shape)
