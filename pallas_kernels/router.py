"""Choosing experts: sigmoid scores, and a bias that steers the choice but not the weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import router_triton
from pallas_kernels.backend import REF, Backend


def route(
    logits: jax.Array,
    bias: jax.Array,
    *,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scaling_factor: float,
    valid: jax.Array | None = None,
    backend: Backend = REF,
) -> tuple[jax.Array, jax.Array]:
    """Choose `top_k` experts a token (HF Glm4MoeTopkRouter; DeepSeek-V3, arXiv 2412.19437).

    One kernel where all groups take part; groups that compete are chosen by plain jax.numpy on any
    backend.

    Args:
        logits: float32 [T, E].
        bias: float32 [E], `e_score_correction_bias`.
        valid: bool [T]; the others are padding, whose ids are E. None: all are.

    Returns:
        ids int32 [T, top_k], and weights float32 [T, top_k] from the unbiased scores. Ties go to
        the lowest expert.
    """
    valid = jnp.ones(logits.shape[0], bool) if valid is None else valid
    if backend.kernels and n_group == topk_group:
        return router_triton.route(
            logits,
            bias,
            valid,
            top_k=top_k,
            norm=norm_topk_prob,
            scaling=scaling_factor,
            interpret=backend.interpret,
        )
    scores = jax.nn.sigmoid(logits)
    choice = _mask_groups(scores + bias, n_group, topk_group)
    ids = jax.lax.top_k(choice, top_k)[1]
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if norm_topk_prob:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return jnp.where(valid[:, None], ids, logits.shape[1]), weights * scaling_factor


def _mask_groups(choice: jax.Array, n_group: int, topk_group: int) -> jax.Array:
    """-inf outside the best `topk_group` groups; a group's score is the sum of its two best."""
    if n_group == topk_group:
        return choice
    grouped = choice.reshape(*choice.shape[:-1], n_group, -1)
    group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
    best = jax.lax.top_k(group_scores, topk_group)[1]
    keep = jnp.any(jnp.arange(n_group) == best[..., None], axis=-2)
    return jnp.where(keep[..., None], grouped, -jnp.inf).reshape(choice.shape)
