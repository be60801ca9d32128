"""Choosing experts: sigmoid scores, and a bias that steers the choice but not the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
) -> tuple[jax.Array, jax.Array]:
    """Choose `top_k` experts a token (HF Glm4MoeTopkRouter; DeepSeek-V3, arXiv 2412.19437).

    Args:
        logits: float32 [T, E].
        bias: float32 [E], `e_score_correction_bias`.

    Returns:
        ids int32 [T, top_k], and weights float32 [T, top_k] from the unbiased scores. Ties go to
        the lowest expert.
    """
    scores = jax.nn.sigmoid(logits)
    choice = _mask_groups(scores + bias, n_group, topk_group)
    ids = jax.lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return ids, weights * scaling_factor


def _mask_groups(choice: jax.Array, n_group: int, topk_group: int) -> jax.Array:
    """-inf outside the best `topk_group` groups; a group's score is the sum of its two best."""
    if n_group == topk_group:
        return choice
    grouped = choice.reshape(*choice.shape[:-1], n_group, -1)
    group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    best = jax.lax.top_k(group_scores, topk_group)[1]
    keep = jnp.any(jnp.arange(n_group) == best[..., None], axis=-2)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(choice.shape)
