"""The folder a conversion works in until it is done: locked, resumable, renamed at the end."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert.hf_reader import INDEX, Source
from convert.orbax_writer import TEMPORARY, sync
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
logger = logging.getLogger("convert.partial")

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def check_target(target: Path, overwrite: bool) -> None:
    """Raise CheckpointError when a conversion must not write to `target`."""
    if target.is_symlink() or target.is_mount():
        raise CheckpointError(
            f"{target} is a link or a mount point, which cannot be replaced by a finished folder; "
            "name a folder that is not there yet"
        )
    replaced = _replaced(target)
    if replaced.exists() and any(replaced.iterdir()) and not (replaced / MANIFEST).exists():
        raise CheckpointError(f"{replaced} is needed for the work, but holds other files; move it")
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
def open_partial(target: Path, wanted: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """Make, or go on with, the folder in which a conversion to `target` works. Locks it.

    Args:
        wanted: the `fingerprint`; what was made from another one is removed.

    Yields:
        The folder, and a line about what was found there, or "".

    Raises:
        CheckpointError: another conversion is at work there, it holds something else, or what is
            there is quantised otherwise than `wanted`.
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
        note = _resume_or_clear(folder, state, wanted)
        yield folder, note


def fingerprint(source: Source, manifest: Manifest, quantize: str | None = None) -> dict[str, Any]:
    """What must be the same for a conversion to go on: the source, and what is to be written."""
    choice = {"quantize": quantize} if quantize else {}  # absent before there was a choice
    stats = {file.name: file.stat() for file in source.files}
    return choice | {
        "layout": VERSION,
        "config": _digest(source.folder / "config.json"),
        "index": _digest(source.folder / INDEX),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "manifest": hashlib.sha256(repr(manifest).encode()).hexdigest(),
    }


def recorded_choice(folder: Path) -> str | None:
    """How the conversion in `folder` quantises, as `fingerprint` was told."""
    try:
        return _choice((folder / CONVERSION).read_text("utf-8"))
    except OSError:
        return None


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
    for path in (*filter(Path.is_file, folder.iterdir()), folder / PARAMS, folder):
        sync(path)
    replaced = _replaced(target)
    _remove_conversion(replaced)
    if (target / MANIFEST).exists():
        target.rename(replaced)
    folder.rename(target)  # an empty folder gives way
    sync(target.parent)
    _remove_conversion(replaced)


def _replaced(target: Path) -> Path:
    """Where an older conversion waits to be removed."""
    return target.with_name(target.name + ".replaced")


def _remove_conversion(folder: Path) -> None:
    """Remove a conversion, its manifest last: interrupted, the rest is still known as one."""
    if (folder / MANIFEST).exists():
        _empty(folder, keep=MANIFEST)
        shutil.rmtree(folder)


def _empty(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if path.name != keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check_space(folder: Path, needed_bytes: int) -> None:
    """Raise CheckpointError unless the disk of `folder` has room for `needed_bytes`."""
    if shutil.disk_usage(folder).free < needed_bytes:
        raise CheckpointError(_disk_full(folder, os.strerror(errno.ENOSPC), needed_bytes))


@contextmanager
def disk_errors(folder: Path, group_bytes: dict[str, int]) -> Iterator[None]:
    """Say of a full disk how much is still to be written and how much is free.

    Args:
        folder: where the conversion works.
        group_bytes: sizes of all groups.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        groups = folder / PARAMS
        needed = sum(size for group, size in group_bytes.items() if not (groups / group).exists())
        raise CheckpointError(_disk_full(folder, str(error.strerror), needed)) from error


def _disk_full(folder: Path, reason: str, needed_bytes: int) -> str:
    place = folder if folder.exists() else folder.parent
    return (
        f"cannot write to {folder}: {reason}. {needed_bytes:,} bytes are still to be written, "
        f"{shutil.disk_usage(place).free:,} are free on that disk. Make room and run the same "
        "command again; it goes on where it stopped"
    )


def _lock(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(
            f"another conversion is writing to {folder}; wait for it, or choose another folder"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked (%s): start no second conversion", folder, error)


def _resume_or_clear(folder: Path, state: Any, wanted: dict[str, Any]) -> str:
    """Keep what is in `folder` if it was made from the same source, else empty it."""
    state.seek(0)
    text = state.read()
    wanted_text = json.dumps(wanted, indent=1) + "\n"
    if text == wanted_text:
        return f"going on with what is in {folder}" if (folder / PARAMS).exists() else ""
    if text and (folder / PARAMS).exists():  # without text, clearing it was interrupted
        _check_choice(folder, _choice(text), wanted.get("quantize"))
    # Forget what was there before removing it: half of it must never pass for the whole.
    _write_state(state, "")
    (folder / MANIFEST).unlink(missing_ok=True)
    _empty(folder, keep=CONVERSION)
    _write_state(state, wanted_text)
    return f"{folder} was made from another source or dtype: starting again" if text else ""


def _choice(text: str) -> str | None:
    """The choice in the text of a conversion.json; None where that is not whole."""
    try:
        return json.loads(text).get("quantize")
    except (ValueError, AttributeError):
        return None


def _check_choice(folder: Path, found: str | None, wanted: str | None) -> None:
    """Hours of work are not thrown away for an option forgotten on the second command line."""
    if found != wanted:
        made, asked = (
            f"with --quantize {c}" if c else "without --quantize" for c in (found, wanted)
        )
        raise CheckpointError(
            f"{folder} is a conversion {made} that was interrupted, and this one is {asked}: run "
            f"the first command again to finish it, or remove {folder} to start anew"
        )


def _write_state(state: Any, text: str) -> None:
    state.truncate(0)
    state.write(text)
    state.flush()
    os.fsync(state.fileno())


def _digest(file: Path) -> str | None:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
