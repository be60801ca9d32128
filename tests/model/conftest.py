"""Random checkpoints of tests/cases.py, converted and restored as a user's would be."""

from __future__ import annotations

from functools import cache

import pytest

from cases import CASES, SEED
from convert.hf_to_orbax import convert
from glmjax.bench.synthetic import write_checkpoint
from glmjax.config import MeshConfig
from glmjax.runner.weights import load, load_mtp
from glmjax.sharding import make_mesh


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a case's HF checkpoint, by name."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def write(name: str):
        write_checkpoint(root / name, CASES[name], seed=SEED, tokenizer=False)
        return root / name

    return write


@pytest.fixture(scope="session")
def load_case(checkpoint, tmp_path_factory):
    """A case's config, mesh and parameters by name and tensor-parallel size, perhaps its MTP's."""
    root = tmp_path_factory.mktemp("converted")

    @cache
    def converted(name: str):
        convert(checkpoint(name), root / name)
        return root / name

    def read(name: str, tensor: int, mtp: bool = False):
        mesh = make_mesh(MeshConfig(tensor=tensor))
        config, params = load(converted(name), mesh)
        extra = (load_mtp(converted(name), mesh),) if mtp else ()
        return config, mesh, params, *extra

    return read
