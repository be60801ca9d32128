"""Mixture of experts: router, routed experts, and the shared expert beside them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from glmjax.config import ModelConfig
from glmjax.errors import ConfigError
from glmjax.model.layers import swiglu
from glmjax.model.quant import Activation, QuantArray, Weight
from glmjax.model.spec import param
from glmjax.sharding import tensor_index
from pallas_kernels.linear import dot
from pallas_kernels.moe import grouped_mlp
from pallas_kernels.router import route

EXPERT_ROWS = 4  # of each expert at a time, where products have one shape


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What one layer's router decided. A step that does not use it computes nothing for it.

    Attributes:
        scores: float32 [T, E], sigmoid, without the correction bias.
        ids: int32 [T, k], the chosen experts; E for padding.
    """

    scores: jax.Array
    ids: jax.Array


class MoE(nnx.Module):
    """Sparse MLP. Routed experts are scaled by the router, the shared expert is not.

    Devices have a part of each expert's width or, with `expert_parallel`, a part of the experts.
    The shared expert is cut by width in either case.
    """

    def __init__(self, config: ModelConfig):
        c, dtype = config, config.dtype
        self.config = config
        experts, width, hidden = c.n_routed_experts, c.moe_intermediate_size, c.hidden_size
        shared = c.shared_intermediate_size
        self.gate = param((experts, hidden), dtype, ("experts", "embed"))
        shards, part = ("expert_shards", None) if c.expert_parallel else ("experts", "expert_mlp")
        self.experts_gate_up_proj = param(
            (experts, 2, width, hidden), dtype, (shards, None, part, "embed")
        )
        self.experts_down_proj = param((experts, hidden, width), dtype, (shards, "embed", part))
        self.shared_gate_up_proj = param((2, shared, hidden), dtype, (None, "mlp", "embed"))
        self.shared_down_proj = param((hidden, shared), dtype, ("embed", "mlp"))

    def __call__(
        self, x: Activation, vectors: dict[str, jax.Array], valid: jax.Array
    ) -> tuple[jax.Array, Routing]:
        """x [T, D] -> [T, D], still to be summed over tensor-parallel devices, and the choices."""
        backend = self.config.kernels
        logits = self._logits(x.rows)
        ids, weights = self._route(logits, vectors["e_score_correction_bias"], valid)
        gate_up, gate_up_scale, block = _parts(self.experts_gate_up_proj.get_value())
        down, down_scale, down_block = _parts(self.experts_down_proj.get_value())
        if (gate_up.dtype, block) != (down.dtype, down_block):
            raise ConfigError(
                f"experts' gate and up are {gate_up.dtype} in blocks of {block}, down is "
                f"{down.dtype} in blocks of {down_block}: expected the same; convert the BF16 "
                "release with --quantize fp8"
            )
        shared = self.shared_gate_up_proj.get_value(), self.shared_down_proj.get_value()
        out = grouped_mlp(
            x.rows,
            self._local(ids, gate_up.shape[0]),
            weights,
            gate_up,
            down,
            gate_up_scale,
            down_scale,
            shared=swiglu(x, *shared, backend),
            quantized=x.quantized if block is None else None,
            block=block,
            ways=self.config.n_routed_experts // gate_up.shape[0],
            rows=EXPERT_ROWS if self.config.deterministic else None,
            backend=backend,
        )
        return out, Routing(jax.nn.sigmoid(logits), ids)

    def _local(self, ids: jax.Array, experts: int) -> jax.Array:
        """`ids` among the `experts` that this device has; that number for those of other devices.

        The sum after the MLP, which there is anyway, adds up what the devices' experts made.
        """
        if not self.config.expert_parallel:
            return ids
        local = ids - tensor_index() * experts
        return jnp.where((local >= 0) & (local < experts), local, experts)

    def inputs(self) -> tuple[Weight, ...]:
        """The weights that a layer's norm is multiplied with."""
        return self.experts_gate_up_proj.get_value(), self.shared_gate_up_proj.get_value()

    def _logits(self, x: jax.Array) -> jax.Array:
        """Float32 [T, E]. Products of bfloat16 are exact in float32; a GPU's TF32 is ruled out."""
        gate = self.gate.get_value()
        if self.config.kernels.kernels and gate.dtype == jnp.bfloat16:
            return dot("td,ed->te", x, gate)
        return jnp.einsum(
            "td,ed->te",
            x.astype(jnp.float32),
            gate.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )

    def _route(
        self, logits: jax.Array, bias: jax.Array, valid: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Expert ids and float32 weights [T, k]; tokens that are not valid have ids of E."""
        c = self.config
        return route(
            logits,
            bias,
            valid=valid,
            backend=c.kernels,
            top_k=c.num_experts_per_tok,
            n_group=c.n_group,
            topk_group=c.topk_group,
            norm_topk_prob=c.norm_topk_prob,
            scaling_factor=c.routed_scaling_factor,
        )


def _parts(weight: Weight) -> tuple[jax.Array, jax.Array | None, int | None]:
    if isinstance(weight, QuantArray):
        return weight.values, weight.scale, weight.block
    return weight, None, None
