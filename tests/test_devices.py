"""Which implementation of the operations serves on which devices."""

from __future__ import annotations

import pytest

from glmjax.config import CacheConfig, MeshConfig
from glmjax.devices import kernel_backend, mesh_for
from glmjax.errors import ConfigError
from glmjax.llm import LLM


@pytest.mark.parametrize(
    ("choice", "name", "interpret"),
    [("auto", "ref", True), ("ref", "ref", True), ("mosaic", "mosaic", True)],
)
def test_kernels_on_a_cpu_are_asked_for_and_interpreted(choice, name, interpret):
    backend = kernel_backend(choice, mesh_for(MeshConfig()))
    assert (backend.name, backend.interpret) == (name, interpret)


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="'cuda', expected one of auto, ref, triton, mosaic"):
        kernel_backend("cuda", mesh_for(MeshConfig()))


def test_pages_that_kernels_cannot_tile_are_refused():
    with pytest.raises(ConfigError, match="page_size 24"):
        LLM(kernels="triton", cache=CacheConfig(page_size=24, num_pages=8))
