"""What a step sends back: packed on the device, unpacked on the host.

Log probabilities of n places are one float32 array [n, 1 + 2 N]: the token's own, the likeliest
ids as bits, theirs; N = MAX_LOGPROBS.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from glmjax.plans import Bucket, LogprobArrays, StepResult
from glmjax.runner.logprobs import Logprobs
from glmjax.types import MAX_LOGPROBS

BLOCK = 64  # prompt tokens whose logits are held at once


def pack_logprobs(values: Logprobs) -> jax.Array:
    """[n], [n, N], [n, N] -> float32 [n, 1 + 2 N]."""
    chosen, ids, top = values
    bits = jax.lax.bitcast_convert_type(ids, jnp.float32)
    return jnp.concatenate([chosen[:, None], bits, top], axis=1)


def prompt_logprobs(
    wanted: jax.Array,
    known: Callable[[jax.Array, jax.Array], jax.Array],
    hidden: jax.Array,
    following: jax.Array,
) -> jax.Array:
    """Of the tokens that follow a chunk's, packed; zeros, and nothing computed, unless `wanted`.

    Args:
        wanted: bool [].
        known: states [n, D] and the int32 [n] that follow to float32 [n, 1 + 2 N].
        hidden: [T, D].
        following: int32 [T].

    Returns:
        float32 [T, 1 + 2 N].
    """
    tokens = hidden.shape[0]

    def compute() -> jax.Array:
        size = min(BLOCK, tokens)
        missing = -tokens % size
        states = jnp.pad(hidden, ((0, missing), (0, 0))).reshape(-1, size, hidden.shape[1])
        ids = jnp.pad(following, (0, missing)).reshape(-1, size)
        found = jax.lax.map(lambda block: known(*block), (states, ids))
        return found.reshape(-1, 1 + 2 * MAX_LOGPROBS)[:tokens]

    zeros = jnp.zeros((tokens, 1 + 2 * MAX_LOGPROBS), jnp.float32)
    return jax.lax.cond(wanted, compute, lambda: zeros) if tokens else zeros


def unpack_result(
    rows: np.ndarray, bucket: Bucket, probs: np.ndarray | None, prompt: np.ndarray | None
) -> StepResult:
    """A step's outputs on the host.

    Args:
        rows: int32 [groups, R, 2 D + 3], as `make_step` describes.
        probs, prompt: float32 [groups, n, 1 + 2 N]; None: not asked for.
    """
    counts, broken, tokens, drafts = np.split(rows, [1, 2, 3 + bucket.drafts], axis=2)
    return StepResult(
        tokens,
        counts[..., 0],
        drafts,
        broken[..., 0] > 0,
        None if probs is None else _arrays(probs),
        None if prompt is None else _arrays(prompt),
    )


def _arrays(packed: np.ndarray) -> LogprobArrays:
    chosen, ids, top = np.split(packed, [1, 1 + MAX_LOGPROBS], axis=2)
    return LogprobArrays(chosen[..., 0], np.ascontiguousarray(ids).view(np.int32), top)
