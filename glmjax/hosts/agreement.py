"""What must be the same on every host, and what is not."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from glmjax.checkpoint import MANIFEST

INSTALLED = Path(__file__).parents[2]  # where glmjax/ and pallas_kernels/ are
PROGRAMS = ("glmjax", "pallas_kernels")

Options = Mapping[str, str]


def agreement(options: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """What must be the same on every host, by names for people.

    Args:
        options: of the command line, by name.
        folder: the converted model, of which the description is compared and not the weights.
    """
    sources = [f for name in PROGRAMS for f in sorted((INSTALLED / name).rglob("*.py"))]
    return {name: str(value) for name, value in options.items()} | {
        "the version of JAX": version("jax"),
        "the version of jaxlib": version("jaxlib"),
        "the source of glmjax": _digest(INSTALLED, sources),
        "the model's glmjax.json and config.json": _digest(
            folder, [folder / MANIFEST, folder / "config.json"]
        ),
    }


def _digest(folder: Path, files: list[Path]) -> str:
    """Of what files within `folder` are called there, and hold."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(folder).as_posix().encode())
        with contextlib.suppress(OSError):  # told by who needs the file
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def difference(index: int, theirs: Options, ours: Options) -> str | None:
    """What host `index` has otherwise than host 0, in words; None: nothing."""
    for name in ours.keys() | theirs.keys():
        there, here = theirs.get(name, "unknown"), ours.get(name, "unknown")
        if there != here:
            return (
                f"the hosts disagree: {name} is {there} on host {index} and {here} on host 0; "
                "start every host with the same options and the same model"
            )
    return None
