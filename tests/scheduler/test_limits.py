"""What a deployment can hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.bench.synthetic import default_config
from glmjax.config import CacheConfig, MeshConfig, SchedulerConfig
from glmjax.errors import ConfigError
from glmjax.releases import release
from glmjax.scheduler.limits import describe, make_limits

# 4 layers x 2 x 8 heads x 32 dims x 4 bytes = 8,192 bytes a token, and an MTP block of 2,048
MODEL = default_config()
PLAIN = SchedulerConfig(1, speculative_num_steps=0)


def test_every_request_at_full_length_when_memory_allows():
    limits = make_limits(MODEL, MeshConfig(2, 4), CacheConfig(16), SchedulerConfig(5))
    assert (limits.groups, limits.slots, limits.page_size) == (2, 3, 16)
    assert limits.pages == 3 * 256 + 1
    assert limits.max_seq_len == 4096
    assert max(bucket.rows for bucket in limits.buckets) == 3
    assert limits.chunk_tokens == 256
    assert limits.num_drafts == 3


@given(
    pages=st.integers(3, 600),
    tensor=st.sampled_from([1, 2, 4, 8]),
    page_size=st.sampled_from([1, 16]),
    drafts=st.sampled_from([0, 1, 3]),
)
def test_pages_fill_the_memory_of_a_device_and_no_more(pages, tensor, page_size, drafts):
    page_bytes = (8192 + 2048 * (drafts > 0)) * page_size // tensor
    cache = CacheConfig(page_size, memory_bytes=pages * page_bytes + page_bytes - 1)
    scheduler = SchedulerConfig(speculative_num_steps=drafts)
    limits = make_limits(MODEL, MeshConfig(1, tensor), cache, scheduler)
    assert limits.pages == pages
    assert limits.max_seq_len == min(4096, (pages - 1) * page_size)


@pytest.mark.parametrize(
    ("dtype", "stored", "share"),
    [("auto", "float32", 1), ("bfloat16", "bfloat16", 2), ("fp8_e4m3", "float8_e4m3fn", 4)],
)
def test_narrower_kv_makes_more_pages_of_the_same_memory(dtype, stored, share):
    cache = CacheConfig(16, memory_bytes=20 * 8192 * 16, dtype=dtype)
    limits = make_limits(MODEL, MeshConfig(1, 2), cache, PLAIN)
    assert limits.pages == 20 * 2 * share
    many = replace(limits, pages=2**14 * share)
    line = describe(MODEL, MeshConfig(), many, cache.stored_dtype(MODEL))
    assert f"{2**14 * share} {stored} KV pages of 16 tokens (2.00 GiB a device)" in line


def test_a_device_holds_one_kv_head_of_those_that_are_repeated():
    """8 KV heads over 16 devices take as much of each as over 8."""
    for model in (MODEL, MODEL.replicated(16)):
        limits = make_limits(model, MeshConfig(1, 16), CacheConfig(16, memory_bytes=2**18), PLAIN)
        assert limits.pages == 2**18 // (8192 // 8 * 16)
        many = replace(limits, pages=2**16)
        assert "(1.00 GiB a device)" in describe(model, MeshConfig(1, 16), many)


def test_the_longest_sequence_is_what_is_asked_else_what_is_held_and_trained():
    def longest(num_pages: int, asked: int | None) -> int:
        scheduler = SchedulerConfig(max_seq_len=asked)
        return make_limits(MODEL, MeshConfig(), CacheConfig(16, num_pages), scheduler).max_seq_len

    assert [longest(9, None), longest(9, 100), longest(999, None)] == [128, 100, 4096]
    with pytest.raises(ConfigError, match="the model's context is 4096"):
        longest(999, 4097)
    with pytest.raises(ConfigError, match=r"holds 128 positions, but .* up to 129"):
        longest(9, 129)


def test_the_log_says_what_cut_the_context():
    cut = make_limits(MODEL, MeshConfig(), CacheConfig(16, num_pages=9), SchedulerConfig())
    whole = make_limits(MODEL, MeshConfig(), CacheConfig(16), SchedulerConfig())
    assert "longest sequence 128 of the model's 4096" in describe(MODEL, MeshConfig(), cut)
    assert describe(MODEL, MeshConfig(), whole).endswith("longest sequence 4096")


def test_chunks_are_no_longer_than_a_sequence():
    limits = make_limits(MODEL, MeshConfig(), CacheConfig(16, num_pages=3), SchedulerConfig())
    assert limits.chunk_tokens == 32


def test_too_little_memory_for_one_page_of_a_sequence():
    cache = CacheConfig(16, memory_bytes=2 * 8192 * 16 - 1)
    with pytest.raises(ConfigError, match="a KV page takes 131072 bytes a device, but the pool"):
        make_limits(MODEL, MeshConfig(), cache, PLAIN)
    with pytest.raises(ConfigError, match="a KV page takes 163840 bytes"):
        make_limits(MODEL, MeshConfig(), cache, SchedulerConfig())


def test_a_mesh_that_does_not_divide():
    model = release("zai-org/GLM-4.5")
    with pytest.raises(ConfigError, match="tensor parallel 3 does not divide"):
        make_limits(model, MeshConfig(1, 3), CacheConfig(), SchedulerConfig())
