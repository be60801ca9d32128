"""Train a model from a recipe. See `python -m glmjax.train --help`."""

from __future__ import annotations

import argparse
import ctypes
import logging
import sys
from pathlib import Path

from glmjax.devices import prepare
from glmjax.errors import GlmjaxError
from glmjax.train.recipe import read_recipe
from glmjax.train.run import Run

EPILOG = """example:
  python -m glmjax.train recipes/nano.toml

Interrupted, the same command goes on from the last checkpoint. OUT then holds metrics.jsonl (a
line a step), curves.png, checkpoints/, and, in HF's format, the trained model.
"""

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"

# glibc's mallopt: one arena, no mmap, never give memory back, grow by 256 MiB. Steps allocate the
# same large buffers again and again, and the kernel's work for fresh pages slows them visibly.
MALLOC_OPTIONS = {-8: 1, -4: 0, -1: -1, -2: 2**28}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m glmjax.train",
        description="Train a GLM-4.5 model from a recipe, on the CPU, resumably.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("recipe", type=Path, help="a TOML file, such as recipes/nano.toml")
    p.add_argument(
        "--out", type=Path, help="folder of the run; default: runs/ and the recipe's name"
    )
    return p


def keep_memory() -> None:
    """Tell the C library's allocator to keep what it has, where that library is glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for option, value in MALLOC_OPTIONS.items():
            mallopt(option, value)


def main() -> int:
    """Exit status: 0 when trained, 1 when it could not, 130 when interrupted."""
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT, force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    keep_memory()
    try:
        recipe = read_recipe(args.recipe)
        prepare(recipe.devices)
        folder = Run(recipe, args.recipe, args.out or Path("runs") / recipe.name).train()
    except GlmjaxError as error:
        print(f"glmjax.train: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
