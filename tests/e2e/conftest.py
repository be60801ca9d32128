"""A converted checkpoint, and the processes of tests/processes.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cases import SEED
from glmjax.bench.synthetic import default_config, write_checkpoint
from processes import Server, environment, run_command, start_hosts, start_server

__all__ = ["environment", "run_command", "start_hosts", "start_server"]


# Few shapes, since each is a program that takes seconds to compile.
SHAPES = ("--max-running-requests", "8", "--chunked-prefill-size", "64")


@pytest.fixture(scope="session")
def nano(start_server) -> Iterator[Server]:
    """glm-nano, with optimised programs as users have them; tests leave it idle."""
    with start_server(*SHAPES, XLA_FLAGS="") as server:
        yield server


@pytest.fixture(scope="session")
def converted(run_command, tmp_path_factory) -> Path:
    """A random checkpoint, taken through the converter's command line."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "hf", default_config(), seed=SEED, shards=3)
    done = run_command("convert/hf_to_orbax.py", folder / "hf", folder / "tiny", "--verify")
    assert done.returncode == 0, done.stderr
    return folder / "tiny"
