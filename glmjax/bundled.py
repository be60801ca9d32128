"""glm-nano, the small trained model that comes with glmjax and is served when none is named."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from convert.hf_to_orbax import convert
from glmjax.checkpoint import VERSION
from glmjax.devices import cache_folder, prepare
from glmjax.errors import CheckpointError, GlmjaxError

log = logging.getLogger(__name__)

NAME = "glm-nano"
ASSET = Path(__file__).parent / "assets" / NAME
_DIGEST_CHARS = 12


def converted(devices: int = 1, apart: bool = False) -> Path:
    """The bundled model, converted into the cache folder at first use.

    Args:
        devices: how many will serve. Converting starts JAX, which then has what it has.
        apart: convert in a process of its own, where JAX may not start in this one yet.

    Returns:
        A folder named glm-nano. The one around it is named after what was converted, so that a
        newer glmjax never serves what an older one left.

    Raises:
        CheckpointError: this installation has no bundled model, the cache cannot be written, or the
            process of its own ended early.
    """
    if not (ASSET / "config.json").is_file():
        raise CheckpointError(
            f"no model was named, and the bundled {NAME} is not there: {ASSET} holds no "
            "config.json. Install glmjax anew, or name a folder that convert/hf_to_orbax.py wrote "
            "(--model; in Python: model=)"
        )
    home = cache_folder() / f"{NAME}-{_digest(ASSET)}"
    if not home.exists() and apart:
        _convert_apart(home)
    if not home.exists():
        prepare(devices)
        _convert(home)
    log.info(
        "serving the bundled %s, a 5M-parameter model trained by glmjax to show that everything "
        "works; give --model for a real one",
        NAME,
    )
    return home / NAME


def _convert_apart(home: Path) -> None:
    """Make `home` in another process, which then had JAX, and this one not."""
    child = multiprocessing.get_context("spawn").Process(target=_converted_or_exit)
    child.start()
    child.join()
    if not home.exists():
        raise CheckpointError(
            f"the bundled {NAME} was not converted: the process that does it ended with exit code "
            f"{child.exitcode}. What it said is above; below 0 it is the signal that killed it, "
            "and -9 mostly means that memory ran out. Or name a converted folder with --model"
        )


def _converted_or_exit() -> None:
    """For a process of its own: an error for people is its last word, without a stack."""
    try:
        converted()
    except GlmjaxError as error:
        sys.exit(str(error))


def _convert(home: Path) -> None:
    """Make `home` in one rename; of processes that do so at once, the first one's stays."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{home.name}.", dir=home.parent) as private:
            made = Path(private) / home.name
            convert(ASSET, made / NAME)
            _rename_unless_there(made, home)
    except OSError as error:
        raise CheckpointError(
            f"the bundled {NAME} cannot be converted into {home.parent}: {error}. Set GLMJAX_CACHE "
            "to a folder that can be written"
        ) from error


def _rename_unless_there(made: Path, home: Path) -> None:
    try:
        made.rename(home)
    except OSError:
        if not home.exists():
            raise


def _digest(folder: Path) -> str:
    """Of the files of a folder, and of the layout that they are converted to."""
    digest = hashlib.sha256(f"layout {VERSION}".encode())
    for file in sorted(filter(Path.is_file, folder.iterdir())):
        digest.update(file.name.encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:_DIGEST_CHARS]
