"""Which implementation of the operations serves on which devices."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from glmjax.config import CacheConfig, MeshConfig
from glmjax.devices import kernel_backend, mesh_for
from glmjax.errors import ConfigError
from glmjax.llm import LLM
from glmjax.sharding import crosses_hosts, make_mesh
from pallas_kernels.backend import REF, Backend


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


class Gpu(NamedTuple):
    """What is asked of a device, of GPUs that are not here."""

    device_kind: str
    compute_capability: str
    platform: str = "gpu"


def mesh_of(gpu: Gpu) -> SimpleNamespace:
    return SimpleNamespace(devices=SimpleNamespace(flat=[gpu]))


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (Gpu("NVIDIA H200", "9.0"), Backend("mosaic", device="h200")),
        (Gpu("NVIDIA H100 80GB HBM3", "9.0"), Backend("mosaic", device="h100")),
        (Gpu("NVIDIA A100-SXM4-80GB", "8.0"), REF),
    ],
)
def test_kernels_are_for_hopper(gpu, expected):
    assert kernel_backend("auto", mesh_of(gpu)) == expected


def test_mosaic_elsewhere_is_refused():
    with pytest.raises(ConfigError, match="A100"):
        kernel_backend("mosaic", mesh_of(Gpu("NVIDIA A100", "8.0")))


@dataclass(frozen=True)
class Device:
    """A device of some process."""

    process_index: int
    id: int


def devices_of(*counts: int) -> list[Device]:
    """So many of each process, not in order."""
    pairs = [(p, i) for p, count in enumerate(counts) for i in range(count)]
    return [Device(p, 10 * p + i) for p, i in reversed(pairs)]


@pytest.mark.parametrize(
    ("mesh", "groups"),
    [("2x2", [[0, 0], [1, 1]]), ("4", [[0, 0, 1, 1]]), ("4x1", [[0], [0], [1], [1]])],
)
def test_tensor_groups_lie_within_a_host_where_they_fit(mesh, groups):
    made = make_mesh(MeshConfig.parse(mesh, hosts=2), devices_of(3, 2))
    assert [[d.process_index for d in row] for row in made.devices] == groups
    assert len({d.id for d in made.devices.flat}) == 4
    assert crosses_hosts(made)
    assert not crosses_hosts(make_mesh(MeshConfig(), devices_of(1)))


@pytest.mark.parametrize("counts", [(4,), (3, 1), (2, 2, 2)])
def test_hosts_with_too_few_devices_are_refused(counts):
    with pytest.raises(ConfigError, match="2 devices on each"):
        make_mesh(MeshConfig.parse("4", hosts=2), devices_of(*counts))
