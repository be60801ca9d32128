"""What a deployment can hold: slots, pages and buckets, from its configs. Pure arithmetic."""

from __future__ import annotations

from glmjax.config import CacheConfig, MeshConfig, ModelConfig, SchedulerConfig
from glmjax.errors import ConfigError
from glmjax.scheduler.buckets import decode_buckets, prefill_buckets
from glmjax.scheduler.pages import pages_for
from glmjax.types import Limits


def make_limits(
    model: ModelConfig, mesh: MeshConfig, cache: CacheConfig, scheduler: SchedulerConfig
) -> Limits:
    """Shapes for a deployment.

    Raises:
        ConfigError: the mesh does not fit the model, or too little memory for one sequence.
    """
    mesh.check(model)
    slots = -(-scheduler.max_running_requests // mesh.data)
    context = model.max_position_embeddings
    seq_len = min(scheduler.max_seq_len or context, context)
    wanted = slots * pages_for(seq_len, cache.page_size) + 1
    pages = cache.num_pages or min(wanted, _pages_in(model, mesh, cache))
    seq_len = min(seq_len, (pages - 1) * cache.page_size)
    return Limits(
        groups=mesh.data,
        slots=slots,
        pages=pages,
        page_size=cache.page_size,
        max_seq_len=seq_len,
        decode_buckets=decode_buckets(slots),
        prefill_buckets=prefill_buckets(slots, min(scheduler.chunked_prefill_size, seq_len)),
    )


def _pages_in(model: ModelConfig, mesh: MeshConfig, cache: CacheConfig) -> int:
    """Pages that fit the memory of one device, which holds 1 / tensor of every page."""
    page_bytes = model.kv_bytes_per_token() * cache.page_size // mesh.tensor
    pages = cache.memory_bytes // page_bytes
    if pages < 2:
        raise ConfigError(
            f"a KV page takes {page_bytes} bytes a device, but the pool has {cache.memory_bytes}; "
            "give it more memory or use a larger mesh"
        )
    return pages
