"""What hosts that have unlike much memory take for granted, each alike."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import multihost_utils

from glmjax import build, devices
from glmjax.bundled import ASSET
from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.devices import agreed
from glmjax.planner.deployment import Deployment

MIB = 1 << 20
MESH = cast(Any, SimpleNamespace(is_multi_process=True))
ALONE = cast(Any, SimpleNamespace(is_multi_process=False))
BYTES = st.integers(1, 200 << 30)


def on_all(values: list[int], choose) -> list[int]:
    """What each of several hosts takes."""
    said: list[int] = []

    def gather(own: np.ndarray) -> np.ndarray:
        said.append(int(own))
        return np.array(said)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(multihost_utils, "process_allgather", gather)
        for value in values:  # that all have said theirs before any goes on
            agreed(value, MESH, choose)
        patched.setattr(multihost_utils, "process_allgather", lambda own: np.array(said))
        return [agreed(value, MESH, choose) for value in values]


@given(st.lists(BYTES, min_size=2, max_size=4))
def test_no_host_is_short(values):
    (least, *others), (most, *more) = on_all(values, np.min), on_all(values, np.max)
    assert others == [least] * len(others)
    assert more == [most] * len(more)
    assert min(values) - MIB < least <= min(values)
    assert max(values) <= most < max(values) + MIB


def test_alone_nothing_is_rounded():
    assert agreed(MIB + 1, ALONE, np.min) == agreed(MIB + 1, ALONE, np.max) == MIB + 1


def test_hosts_whose_compilers_differ_have_pools_alike(monkeypatch):
    """As on GPUs, where a host compiles for itself what steps need beside the pool."""
    model = ModelConfig.from_hf(ASSET)
    parts = MeshConfig(), CacheConfig(16), SchedulerConfig(4, chunked_prefill_size=64)
    deployment = Deployment(model, *parts, frozenset())
    most = 900 * MIB
    monkeypatch.setattr(build, "is_cpu", lambda mesh: False)
    monkeypatch.setattr(build, "usable_bytes", lambda mesh: 2 << 30)
    monkeypatch.setattr(
        multihost_utils, "process_allgather", lambda own: np.array([own, most // MIB])
    )
    found = []
    for temp_bytes in (700 * MIB, 500 * MIB + 3, most - 5):
        monkeypatch.setattr(build, "largest_temp_bytes", lambda *_, n=temp_bytes: n)
        found.append(build.sized(deployment, MESH))
    assert found[0] == found[1] == found[2]
    assert found[0][1].temp_bytes == most


def test_usable_bytes_are_the_least_of_all(monkeypatch):
    gpus = [
        SimpleNamespace(memory_stats=lambda n=n: {"bytes_limit": n}) for n in (9 * MIB, 7 * MIB)
    ]
    mesh = cast(Any, SimpleNamespace(is_multi_process=True, local_devices=gpus))
    monkeypatch.setattr(devices, "is_cpu", lambda mesh: False)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array([own, 5]))
    assert devices.usable_bytes(mesh) == 5 * MIB
