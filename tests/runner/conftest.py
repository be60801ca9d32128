"""Runners on the device: few, since compiling one takes seconds, and shared by all tests.

An engine leaves nothing in a runner that the next one could see; tests that give it other weights
put the old ones back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from oracle import Oracle
from tiny import TINY, TINY_SEED, tiny_params

from glmjax.bundled import converted
from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.plans import Bucket
from glmjax.runner.runner import DeviceRunner
from glmjax.runner.weights import load, load_mtp
from glmjax.scheduler.drafting import Drafting
from glmjax.scheduler.limits import make_limits
from glmjax.sharding import make_mesh

CHUNK_ROWS = 2
NANO_DRAFTS = 3


def few(slots: int, chunk: int, drafts: int) -> tuple[Bucket, ...]:
    """As few shapes as a scheduler can live with: decoding, and everything at once."""
    decode = {Bucket(slots, n, 0, 0) for n in (0, drafts)}
    return (*sorted(decode), Bucket(slots, drafts, CHUNK_ROWS, chunk))


@pytest.fixture(scope="session")
def make_runner():
    """A runner of TINY by mesh, dtype and sizes."""

    def make(
        mesh: str = "1",
        dtype: str = "float32",
        pages: int = 200,
        slots: int = 4,
        seed: int = TINY_SEED,
        drafts: int = 0,
        chunk: int = 8,
        max_seq_len: int = 64,
        deterministic: bool = False,
        kv: str = "auto",
    ):
        config = replace(TINY, dtype=dtype, deterministic=deterministic)
        shape = MeshConfig.parse(mesh)
        cache = CacheConfig(page_size=4, num_pages=pages, dtype=kv)
        scheduler = SchedulerConfig(
            max_running_requests=slots,
            chunked_prefill_size=chunk,
            max_seq_len=max_seq_len,
            speculative_num_steps=drafts,
        )
        limits = make_limits(config, shape, cache, scheduler)
        limits = replace(limits, buckets=few(limits.slots, chunk, drafts))
        devices = make_mesh(shape)
        params = tiny_params(devices, seed, config)
        mtp = params["mtp"] if drafts else None
        kv_dtype = cache.stored_dtype(config)
        return DeviceRunner(config, params["model"], devices, limits, mtp, kv_dtype)

    return make


@pytest.fixture(scope="session")
def plain(make_runner) -> DeviceRunner:
    """In float32 on one device, without drafts."""
    return make_runner()


@pytest.fixture(scope="session")
def drafting(make_runner) -> DeviceRunner:
    """The same model with two drafts."""
    return make_runner(drafts=2)


@pytest.fixture(scope="session")
def split(make_runner) -> DeviceRunner:
    """The same on two data groups of two tensor-parallel devices, with two drafts."""
    return make_runner("2x2", drafts=2)


@pytest.fixture
def always_drafting(monkeypatch):
    """However long a step that drafts takes on this machine."""
    monkeypatch.setattr(Drafting, "pays", lambda *_: True)


@pytest.fixture(scope="session")
def make_params():
    """The parameters that `make_runner` makes for a seed, on one device."""
    return lambda seed: tiny_params(make_mesh(MeshConfig()), seed)


@pytest.fixture(scope="session")
def oracle(make_params) -> Oracle:
    """Of the model of `plain`, `drafting` and `split`."""
    return Oracle(make_params(TINY_SEED))


class Nano(NamedTuple):
    """The bundled model in float32, and runners of it with drafts and without."""

    folder: Path
    config: ModelConfig
    drafting: DeviceRunner
    plain: DeviceRunner


@pytest.fixture(scope="session")
def nano(tmp_path_factory) -> Nano:
    """With chunks of 64 tokens and of 48, so that prompts are cut at other places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder = converted()
    mesh = make_mesh(MeshConfig())
    config, params = load(folder, mesh, "float32")
    mtp = load_mtp(folder, mesh, "float32")

    def make(chunk: int, drafts: int) -> DeviceRunner:
        scheduler = SchedulerConfig(4, max_seq_len=512, speculative_num_steps=drafts)
        limits = make_limits(config, MeshConfig(), CacheConfig(), scheduler)
        limits = replace(limits, buckets=few(limits.slots, chunk, drafts))
        return DeviceRunner(config, params, mesh, limits, mtp if drafts else None)

    return Nano(folder, config, make(64, NANO_DRAFTS), make(48, 0))
