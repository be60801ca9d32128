"""What is minimised: next-token loss, MTP loss, sequence-level balance loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.model.decoder import Decoder
from glmjax.model.layers import embed
from glmjax.model.moe import Routing
from glmjax.model.mtp import MTP
from glmjax.sharding import psum_data
from glmjax.train.sequences import Sequences

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainBatch:
    """Packed conversations, all [R, S].

    Attributes:
        tokens, segments, positions: int32, as `glmjax.train.data.packing.Packed`.
        trained: bool, tokens that are the model's to write.
    """

    tokens: jax.Array
    segments: jax.Array
    positions: jax.Array
    trained: jax.Array


@dataclass(frozen=True)
class LossWeights:
    """How the parts are weighed; the next-token loss on the model's own tokens counts 1."""

    prompt: float
    mtp: float
    balance: float


def total_loss(
    params: Params, batch: TrainBatch, config: ModelConfig, weights: LossWeights
) -> tuple[jax.Array, Metrics]:
    """This device's part of the loss, and of the metrics: both are to be summed over devices.

    Args:
        params: {"model": tree of `Decoder`, "mtp": tree of `MTP`}.

    Returns:
        The loss float32 [], and metrics: means of the losses and of the tokens guessed right
        among the model's own, and the choices of each expert, float32 [L, E] and [1, E].
    """
    decoder = nnx.merge(nnx.graphdef(Decoder(config)), nnx.State(params["model"]))
    block = nnx.merge(nnx.graphdef(MTP(config)), nnx.State(params["mtp"]))
    layout = Sequences(batch.segments, batch.positions)
    hidden, _, routings = decoder(batch.tokens.reshape(-1), None, layout)
    main, metrics = _prediction(decoder, hidden, batch, 1, weights.prompt)

    following = jnp.roll(batch.tokens, -1, axis=1).reshape(-1)
    embedded = embed(following, decoder.embed_tokens.get_value())
    drafted, _, mtp_routing = block(embedded, hidden, None, layout, config.num_hidden_layers)
    mtp, mtp_metrics = _prediction(decoder, drafted, batch, 2, weights.prompt)
    metrics |= {f"mtp_{name}": value for name, value in mtp_metrics.items()}

    both = [*routings, mtp_routing]
    balance = sum((balance_loss(r, batch.segments.shape[0]) for r in both), jnp.zeros(()))
    balance = balance / psum_data(jnp.ones(()))
    metrics |= {"balance": balance, "load": loads(routings), "mtp_load": loads([mtp_routing])}
    return main + weights.mtp * mtp + weights.balance * balance, metrics


def _prediction(
    decoder: Decoder, hidden: jax.Array, batch: TrainBatch, ahead: int, prompt_weight: float
) -> tuple[jax.Array, Metrics]:
    """Weighted mean loss of predicting the token `ahead` places on, and metrics."""
    targets = jnp.roll(batch.tokens, -ahead, axis=1).reshape(-1)
    known, trained = (x.reshape(-1) for x in _targets(batch, ahead))
    weight = jnp.where(trained, 1.0, prompt_weight) * known
    logits = decoder.logits(hidden)
    losses = (
        jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[:, None], 1)[:, 0]
    )
    right = trained & (logits.argmax(-1) == targets)
    count = jnp.maximum(psum_data(jnp.sum(trained)), 1)
    metrics = {
        "loss": jnp.sum(losses * trained) / count,
        "accuracy": jnp.sum(right) / count,
    }
    return jnp.sum(losses * weight) / jnp.maximum(psum_data(jnp.sum(weight)), 1e-6), metrics


def _targets(batch: TrainBatch, ahead: int) -> tuple[jax.Array, jax.Array]:
    """Whether the token `ahead` belongs to the same conversation, and is the model's; [R, S]."""
    inside = jnp.arange(batch.tokens.shape[1]) < batch.tokens.shape[1] - ahead
    same = jnp.roll(batch.segments, -ahead, axis=1) == batch.segments
    known = inside & same & (batch.segments > 0)
    return known, known & jnp.roll(batch.trained, -ahead, axis=1)


def balance_loss(routing: Routing, rows: int) -> jax.Array:
    """Mean over rows of sum_e f_e P_e (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    f_e is the share of the choices that fell on expert e, times the number of experts, P_e the
    mean of the normalised scores; 1 when both are even.
    """
    experts = routing.scores.shape[-1]
    chosen = jax.nn.one_hot(routing.ids, experts).sum(1).reshape(rows, -1, experts)
    scores = routing.scores / routing.scores.sum(-1, keepdims=True)
    scores = scores.reshape(rows, -1, experts)
    valid = chosen.sum(-1, keepdims=True) > 0
    share = experts * chosen.sum(1) / jnp.maximum(chosen.sum((1, 2)), 1)[:, None]
    mean_score = (scores * valid).sum(1) / jnp.maximum(valid.sum(1), 1)
    return jnp.mean(jnp.sum(share * mean_score, axis=-1))


def loads(routings: list[Routing]) -> jax.Array:
    """How often each expert was chosen, float32 [layers, E]; padding counts nowhere."""
    experts = routings[0].scores.shape[-1]
    return jnp.stack([jax.nn.one_hot(r.ids, experts).sum((0, 1)) for r in routings])
