"""The folder a conversion works in until it is done: locked, resumable, renamed at the end."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.hf_reader import INDEX, Source
from convert.orbax_writer import TEMPORARY
from glmjax.checkpoint import (
    CONVERSION,
    MANIFEST,
    PARAMS,
    VERSION,
    Manifest,
    partial_path,
    write_manifest,
)
from glmjax.errors import CheckpointError

COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_target(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError when a conversion must not write to `target`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).exists():
        raise CheckpointError(
            f"{target} exists and is not a converted checkpoint; choose another folder"
        )
    if not overwrite:
        raise CheckpointError(
            f"{target} is converted already; --overwrite converts again and replaces it once the "
            "new one is whole, --verify compares it with the source; or choose another folder"
        )


@contextmanager
def open_partial(target: Path, source: Source, dtype: str | None) -> Iterator[tuple[Path, str]]:
    """Make, or go on with, the folder in which a conversion to `target` works. Locks it.

    Yields:
        The folder, and a line about what was found there, or "".

    Raises:
        CheckpointError: another conversion is at work there, or it holds something else.
    """
    folder = partial_path(target)
    file = folder / CONVERSION
    if folder.exists() and any(folder.iterdir()) and not file.exists():
        raise CheckpointError(
            f"{folder} is needed for the work, but holds other files; remove it, or choose another "
            "folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", encoding="utf-8") as state:
        _lock(state.fileno(), folder)
        note = _resume_or_clear(folder, state, fingerprint(source, dtype))
        yield folder, note


def fingerprint(source: Source, dtype: str | None) -> dict[str, Any]:
    """What must be the same for a conversion to go on: config, index, files, dtype and layout."""
    stats = {file.name: file.stat() for file in source.files}
    return {
        "layout": VERSION,
        "dtype": dtype,
        "config": _digest(source.folder / "config.json"),
        "index": _digest(source.folder / INDEX),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def done_groups(folder: Path) -> set[str]:
    """Groups that are whole. What an interrupted write left is removed."""
    params = folder / PARAMS
    for leftover in params.glob(TEMPORARY):
        shutil.rmtree(leftover)
    return {path.name for path in params.iterdir()} if params.exists() else set()


def copy_files(source: Path, folder: Path) -> list[str]:
    """Copy config, tokenizer and chat template; returns names that were there."""
    present = [name for name in COPIED if (source / name).exists()]
    for name in present:
        shutil.copyfile(source / name, folder / name)
    return present


def finish(folder: Path, target: Path, manifest: Manifest) -> None:
    """Write the manifest, then turn `folder` into `target`, replacing an older conversion."""
    write_manifest(folder, manifest)
    for path in (folder / MANIFEST, folder / PARAMS, folder):
        _sync(path)
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    _sync(target.parent)
    if (replaced / MANIFEST).exists():
        shutil.rmtree(replaced)


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError unless the disk of `folder` has room for `needed_bytes`."""
    if shutil.disk_usage(folder).free < needed_bytes:
        raise CheckpointError(_disk_full(folder, needed_bytes))


@contextmanager
def disk_errors(folder: Path, groups_bytes: Iterable[tuple[Path, int]]) -> Iterator[None]:
    """Turn what the system and TensorStore say about a full disk into a CheckpointError.

    Args:
        groups_bytes: the groups to write in all, and their sizes.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        if not _is_disk_full(error):
            raise
        needed = sum(size for path, size in groups_bytes if not path.exists())
        raise CheckpointError(_disk_full(folder, needed)) from error


def _is_disk_full(error: BaseException) -> bool:
    """TensorStore puts the errno's name into the text of a ValueError."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(f"{errno.errorcode[code]}]" in str(error) for code in _FULL)


def _disk_full(folder: Path, needed_bytes: int) -> str:
    free = shutil.disk_usage(folder).free
    return (
        f"the disk of {folder} is full: {needed_bytes:,} bytes are still to be written, {free:,} "
        "are free (a quota may allow less). Make room and run the same command again; it goes on "
        "where it stopped"
    )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"another conversion is writing to {folder}; wait for it, or choose another folder"
        ) from None


def _resume_or_clear(folder: Path, state: Any, wanted: dict[str, Any]) -> str:
    """Keep what is in `folder` if it was made from the same source, else empty it."""
    state.seek(0)
    text = state.read()
    wanted_text = json.dumps(wanted, indent=1) + "\n"
    if text == wanted_text:
        return f"going on with {folder}"
    for path in folder.iterdir():
        if path.name != CONVERSION:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    state.truncate(0)
    state.write(wanted_text)
    state.flush()
    os.fsync(state.fileno())
    return f"{folder} was made from another source or dtype: starting again" if text else ""


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
