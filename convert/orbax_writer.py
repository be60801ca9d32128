"""Writes a group of arrays as an Orbax checkpoint, in chunks of our choice and in little memory.

Orbax would hold a whole group, copy it, and choose the chunks itself. Its documented extension, a
TypeHandler for our own kind of leaf, lets us read an array from the source while the one before it
is written; Orbax keeps the metadata and makes a finished group appear in one rename.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from convert.plan import Array
from glmjax.checkpoint import StoredArray

THREADS = 4
BLOCK_BYTES = 1 << 17
TEMPORARY = "*.orbax-checkpoint-tmp*"
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

Advance = Callable[[int], Any]


class _Pools(NamedTuple):
    """Threads of their own for each, so that none waits for what another has queued."""

    readers: ThreadPoolExecutor
    writers: ThreadPoolExecutor
    syncers: ThreadPoolExecutor


def write_group(folder: Path, arrays: Mapping[str, Array], advance: Advance) -> None:
    """Write `arrays`, by key, as the Orbax checkpoint `folder`, which appears when it is whole.

    Memory holds at most three of the arrays.

    Args:
        advance: told of bytes written, as they are.

    Raises:
        CheckpointError: a source file ended early.
        OSError: the disk refused.
    """
    with _pools() as pools, _quiet_orbax(), _system_errors():
        registry = type_handlers.create_type_handler_registry(
            (Array, _ArrayHandler(pools, advance)), (jax.Array, type_handlers.ArrayHandler())
        )
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays)))


class _ArrayHandler(type_handlers.NumpyHandler):
    """Streams an `Array` to disk; to whoever restores it, it is a numpy array like any other."""

    def __init__(self, pools: _Pools, advance: Advance):
        super().__init__()
        self._pools = pools
        self._advance = advance

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        """Write before returning, for the sake of memory. No futures are left."""
        syncs: list[Future[None]] = []
        arrays = _read_ahead(values, self._pools.readers)
        for info, (stored, whole) in zip(infos, arrays, strict=True):
            await info.await_path_creation()
            folder = Path(info.parent_dir) / info.name
            spec = _zarr_spec(folder, stored)
            await ts.open(spec, create=True, context=info.ts_context)
            for file in _write_chunks(folder, stored, whole, self._pools.writers):
                syncs.append(self._pools.syncers.submit(sync, file))
                self._advance(stored.chunk_bytes)
        for pending in syncs:
            pending.result()
        return []


def _read_ahead(
    arrays: Iterable[Array], readers: ThreadPoolExecutor
) -> Iterator[tuple[StoredArray, np.ndarray]]:
    """Read the arrays in turn, each while its predecessor is in use."""
    upcoming = None
    for array in arrays:
        current, upcoming = upcoming, _start_reading(array, readers)
        if current:
            yield _finish_reading(*current)
    if upcoming:
        yield _finish_reading(*upcoming)


def _start_reading(
    array: Array, readers: ThreadPoolExecutor
) -> tuple[StoredArray, np.ndarray, list[Future[None]]]:
    whole = np.empty(array.stored.shape, array.stored.dtype)
    fills = [readers.submit(piece.fill, whole[piece.index]) for piece in array.pieces]
    return array.stored, whole, fills


def _finish_reading(
    stored: StoredArray, whole: np.ndarray, fills: list[Future[None]]
) -> tuple[StoredArray, np.ndarray]:
    for fill in fills:
        fill.result()
    return stored, whole


def _write_chunks(
    folder: Path, stored: StoredArray, whole: np.ndarray, writers: ThreadPoolExecutor
) -> Iterator[Path]:
    """Write every chunk to its file: its elements in C order, which is all of zarr's raw form."""

    def write_chunk(name: str, start: tuple[int, ...]) -> Path:
        part = tuple(slice(s, s + n) for s, n in zip(start, stored.chunks, strict=True))
        with open(folder / name, "wb", buffering=0) as stream:
            for block in _blocks(whole[part]):
                _write_all(stream, np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        return folder / name

    return writers.map(write_chunk, stored.chunk_names(), stored.chunk_starts())


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Parts of about BLOCK_BYTES, in C order: small enough to be copied within a CPU's cache."""
    if array.nbytes <= BLOCK_BYTES:
        yield array
        return
    rows = max(1, BLOCK_BYTES // array[0].nbytes)
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        yield from [part] if rows > 1 or array.ndim == 1 else _blocks(part[0])


def _write_all(stream: FileIO, rest: memoryview) -> None:
    while rest:
        rest = rest[stream.write(rest) :]


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk, so that it is whole after a crash too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _zarr_spec(folder: Path, stored: StoredArray) -> dict[str, Any]:
    return {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "dtype": stored.dtype,
        "metadata": {"shape": stored.shape, "chunks": stored.chunks, "compressor": None},
    }


@contextmanager
def _pools() -> Iterator[_Pools]:
    """Threads that drop what they have not begun when the work fails."""
    pools = _Pools(*(ThreadPoolExecutor(THREADS) for _ in _Pools._fields))
    try:
        yield pools
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _system_errors() -> Iterator[None]:
    """TensorStore raises ValueErrors for what the system says; make them OSErrors again."""
    try:
        yield
    except ValueError as error:
        code = _OS_ERROR.search(str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax warns at every save that there is nothing of OCDBT, which is not used, to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
