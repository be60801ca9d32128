"""Chunks divide their arrays, fit every mesh, and are neither tiny nor huge."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.chunking import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, chunk_shape, tensor_parts
from glmjax.config import MeshConfig
from glmjax.model.decoder import Decoder
from glmjax.model.mtp import MTP
from glmjax.model.spec import ParamSpec, specs_of
from glmjax.releases import KNOWN_MODELS
from glmjax.sharding import partition_spec

extents = st.integers(1, 3000)
axes = st.lists(st.tuples(extents, st.booleans()), min_size=1, max_size=3)


@given(axes, st.integers(0, 2), st.sampled_from(["float32", "float8_e4m3fn"]), st.integers(1, 48))
def test_chunks_divide_their_array(extents, sharded, dtype, parts):
    shape = tuple(extent for extent, _ in extents)
    names = tuple("mlp" if i == sharded else None for i in range(len(shape)))
    chunks = chunk_shape(ParamSpec(shape, dtype, names), parts)
    assert all(n % c == 0 for n, c in zip(shape, chunks, strict=True))
    if sharded < len(shape):
        assert parts % (shape[sharded] // chunks[sharded]) == 0 or too_large(shape, chunks, dtype)


def too_large(shape, chunks, dtype):
    return math.prod(shape) * np.dtype(dtype).itemsize > MAX_CHUNK_BYTES


@pytest.mark.parametrize("name", ["zai-org/GLM-4.5", "zai-org/GLM-4.5-Air"])
@pytest.mark.parametrize(
    ("tensor", "expert_parallel"),
    [*((n, False) for n in (1, 2, 4, 8, 16)), *((n, True) for n in (2, 4, 8))],
)
def test_a_device_reads_whole_chunks_of_its_part(name, tensor, expert_parallel):
    config = replace(KNOWN_MODELS[name], num_hidden_layers=5)
    mesh = MeshConfig(tensor=tensor, expert_parallel=expert_parallel)
    mesh.check(config)
    parts = tensor_parts(config)
    run = replace(config, expert_parallel=expert_parallel)
    for stored, spec in zip(all_specs(config), all_specs(run), strict=True):
        chunks = chunk_shape(stored, parts)
        size = math.prod(chunks) * np.dtype(spec.dtype).itemsize
        assert size <= MAX_CHUNK_BYTES
        for extent, chunk, axis in zip(spec.shape, chunks, partition_spec(spec.axes), strict=True):
            if axis is not None and spec.size_bytes >= parts * MIN_CHUNK_BYTES:
                assert extent // tensor % chunk == 0
                assert extent // chunk >= 8


def all_specs(config) -> list[ParamSpec]:
    return jax.tree.leaves([specs_of(Decoder(config)), specs_of(MTP(config))])


def test_experts_are_cut_into_few_files():
    """Each expert apart would be 461,000 files of the 355B model."""
    config = KNOWN_MODELS["zai-org/GLM-4.5"]
    parts = tensor_parts(config)
    experts = [spec for spec in all_specs(config) if spec.axes[0] == "experts"]
    counts = [math.prod(np.floor_divide(s.shape, chunk_shape(s, parts))) for s in experts]
    assert len(experts) == 3 * 90, "gate and up, down, and the router"
    assert max(counts) == 8 * 16
    assert sum(counts) < 25_000


def test_small_arrays_stay_whole():
    assert chunk_shape(ParamSpec((64, 64), "float32", ("mlp", None)), 16) == (64, 64)


def test_parts_follow_unusual_kv_heads():
    config = replace(KNOWN_MODELS["zai-org/GLM-4.5"], num_key_value_heads=6)
    assert tensor_parts(config) == 48  # meshes of 1, 2, 3 and 6 read whole chunks
