"""What a deployment can hold: slots, pages and buckets, from its configs. Pure arithmetic."""

from __future__ import annotations

from glmjax.config import (
    DEFAULT_POOL_BYTES,
    CacheConfig,
    MeshConfig,
    ModelConfig,
    SchedulerConfig,
)
from glmjax.errors import ConfigError
from glmjax.plans import Limits
from glmjax.scheduler.buckets import make_buckets
from glmjax.scheduler.pages import pages_for

MIN_SEQ_LEN = 2  # a prompt of one token and its answer


def make_limits(
    model: ModelConfig, mesh: MeshConfig, cache: CacheConfig, scheduler: SchedulerConfig
) -> Limits:
    """Shapes for a deployment.

    The longest sequence is what was asked for, else the model's context if the pool holds that.
    With drafting (`speculative_num_steps` above 0) the model must have an MTP block.

    Raises:
        ConfigError: the mesh does not fit the model, the pool is too small for one sequence, or
            the model's context for what was asked.
    """
    mesh.check(model)
    slots = -(-scheduler.max_running_requests // mesh.data)
    context = model.max_position_embeddings
    wanted = scheduler.max_seq_len or context
    if wanted > context:
        raise ConfigError(f"max_seq_len is {wanted}, but the model's context is {context}")
    enough = slots * pages_for(wanted, cache.page_size) + 1
    drafts = scheduler.speculative_num_steps
    pages = cache.num_pages or min(enough, _pages_in(model, mesh, cache, drafts > 0))
    seq_len = min(wanted, (pages - 1) * cache.page_size)
    least = scheduler.max_seq_len or MIN_SEQ_LEN
    if seq_len < least:
        raise ConfigError(
            f"the KV pool holds {seq_len} positions, but sequences are to have up to {least}; give "
            "the pool more memory or ask for shorter sequences"
        )
    return Limits(
        groups=mesh.data,
        slots=slots,
        pages=pages,
        page_size=cache.page_size,
        max_seq_len=seq_len,
        num_drafts=drafts,
        vocab_size=model.vocab_size,
        buckets=make_buckets(slots, min(scheduler.chunked_prefill_size, seq_len), drafts),
    )


def describe(
    model: ModelConfig, mesh: MeshConfig, limits: Limits, kv_dtype: str | None = None
) -> str:
    """One line for the log: what runs at once, and what bounds the longest sequence.

    `kv_dtype` is what K and V are stored as; None: the model's dtype.
    """
    kv_dtype = kv_dtype or model.dtype
    size_bytes = pool_bytes(model, mesh, limits, kv_dtype)
    line = (
        f"{limits.groups} x {limits.slots} sequences at once, {limits.groups} x {limits.pages} "
        f"{kv_dtype} KV pages of {limits.page_size} tokens ({size_bytes / 2**30:.2f} GiB a "
        f"device), longest sequence {limits.max_seq_len}"
    )
    cut = limits.max_seq_len == (limits.pages - 1) * limits.page_size
    context = model.max_position_embeddings
    if cut and limits.max_seq_len < context:
        line += f" of the model's {context}: the KV pool holds no longer one"
    return line


def pool_bytes(model: ModelConfig, mesh: MeshConfig, limits: Limits, kv_dtype: str) -> int:
    """Bytes of all keys and values on one device."""
    token_bytes = _token_bytes(model, mesh, kv_dtype, limits.num_drafts > 0)
    return limits.pages * limits.page_size * token_bytes


def _pages_in(model: ModelConfig, mesh: MeshConfig, cache: CacheConfig, drafting: bool) -> int:
    """Pages that fit the memory of one device, which holds some KV heads of every page."""
    token_bytes = _token_bytes(model, mesh, cache.stored_dtype(model), drafting)
    page_bytes = token_bytes * cache.page_size
    pool_bytes = cache.memory_bytes or DEFAULT_POOL_BYTES
    pages = pool_bytes // page_bytes
    if pages < 2:
        raise ConfigError(
            f"a KV page takes {page_bytes} bytes a device, but the pool has {pool_bytes}; "
            "give it more memory or use a larger mesh"
        )
    return pages


def _token_bytes(model: ModelConfig, mesh: MeshConfig, kv_dtype: str, drafting: bool) -> int:
    """Bytes of K and V for one position on one device, which holds at least one KV head."""
    whole = model.replicated(mesh.tensor).kv_bytes_per_token(kv_dtype, drafting)
    return whole // mesh.tensor
