"""One device's operations in a step: the bytes that each moves, and its products.

It is the least that any kernels can do: weights, K and V are moved once, buckets are not padded.
Left out are activations and the residual stream (small beside weights), sampling, penalties and log
probabilities.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from glmjax.config import ModelConfig
from glmjax.planner.routing import busiest_load, mean_load

FP8 = "float8_e4m3fn"
SCALE_BYTES = 4  # float32, as is the correction bias

ATTENTION = ("self_attn/qkv_proj", "self_attn/o_proj")
DENSE = ("mlp/gate_up_proj", "mlp/down_proj")
EXPERTS = ("mlp/experts_gate_up_proj", "mlp/experts_down_proj")
SHARED = ("mlp/shared_gate_up_proj", "mlp/shared_down_proj")
LEAVES = {False: ATTENTION + DENSE, True: ATTENTION + EXPERTS + SHARED}  # by "is it a MoE layer"
EH_PROJ = "mtp/eh_proj"
PROJECTIONS = "attention projections"


class Queries(NamedTuple):
    """Sequences of one data group that have alike query tokens in a step.

    Attributes:
        seqs: how many.
        tokens: query tokens of each: 1 to decode, D + 1 to verify D drafts, a chunk of a prompt.
        context: positions that each holds before them, on average.
    """

    seqs: int
    tokens: int
    context: float

    @property
    def places(self) -> int:
        """Query tokens in all."""
        return self.seqs * self.tokens

    @property
    def positions(self) -> float:
        """Positions whose K and V are moved: those held are read, new ones written."""
        return self.seqs * (self.context + self.tokens)

    @property
    def pairs(self) -> float:
        """(query, key) pairs of causal attention."""
        return self.places * (self.context + (self.tokens + 1) / 2)


@dataclass(frozen=True)
class Op:
    """One operation of one device, or equal ones of several layers together.

    Attributes:
        name: of its kind; several operations may have the same.
        weight_bytes: parameters that it reads.
        data_bytes: K and V that it reads or writes, or rows of the embedding.
        flops: a product and a sum are two.
        precision: numpy's name of what it multiplies.
    """

    name: str
    weight_bytes: float
    data_bytes: float
    flops: float
    precision: str

    @property
    def moved_bytes(self) -> float:
        """Bytes that cross between memory and the chip."""
        return self.weight_bytes + self.data_bytes

    def times(self, count: int) -> Op:
        """The same in `count` layers."""
        return replace(
            self,
            weight_bytes=count * self.weight_bytes,
            data_bytes=count * self.data_bytes,
            flops=count * self.flops,
        )


@dataclass(frozen=True)
class Part:
    """One device's part of a model.

    Attributes:
        model: as it runs, KV heads repeated as `ways` devices need them.
        ways: tensor-parallel devices.
        expert_parallel: whether they have whole experts; then it is the busiest one's part.
        kv_dtype: of K and V, by numpy's name.
    """

    model: ModelConfig
    ways: int
    expert_parallel: bool
    kv_dtype: str

    def main(self, queries: Sequence[Queries], fp8: frozenset[str]) -> list[Op]:
        """Embedding, all layers, equal ones together, and the final norm."""
        c = self.model
        kinds: Counter[tuple[bool, frozenset[str]]] = Counter()
        for i in range(c.num_hidden_layers):
            moe, root = i >= c.first_k_dense_replace, f"layers/{i}/"
            kinds[moe, frozenset(leaf for leaf in LEAVES[moe] if root + leaf in fp8)] += 1
        layers = [
            op.times(count)
            for (moe, quantized), count in kinds.items()
            for op in self.layer(queries, moe, quantized)
        ]
        return [self.embedding(queries), *layers, self.norms(c.hidden_size)]

    def mtp(self, queries: Sequence[Queries], fp8: frozenset[str], keys_only: bool) -> list[Op]:
        """One pass of the MTP block, without lm_head."""
        width, root = self.model.hidden_size, "mtp/layer/"
        quantized = frozenset(leaf for leaf in LEAVES[True] if root + leaf in fp8)
        ops = [
            self.embedding(queries),
            self.product("eh_proj", places_of(queries), width, 2 * width, EH_PROJ in fp8),
            self.norms((2 if keys_only else 3) * width),
        ]
        if keys_only:
            return [*ops, *self.keys(queries, quantized)]
        return [*ops, *self.layer(queries, True, quantized)]

    def layer(self, queries: Sequence[Queries], moe: bool, fp8: frozenset[str]) -> list[Op]:
        """One layer."""
        tokens = places_of(queries)
        mlp = self.moe(tokens, fp8) if moe else self.dense(tokens, fp8)
        return [*self.attention(queries, fp8), *mlp, self.norms(self.model.hidden_size)]

    # attention

    def keys(self, queries: Sequence[Queries], fp8: frozenset[str]) -> list[Op]:
        """A layer of which only K and V are used: XLA leaves out what follows them."""
        tokens = places_of(queries)
        written_bytes = tokens * self.position_bytes
        return [*self.qkv(tokens, fp8), Op("attention", 0, written_bytes, 0, self.model.dtype)]

    def attention(self, queries: Sequence[Queries], fp8: frozenset[str]) -> list[Op]:
        """Projections, and attention over the pages: two products a (query, key) pair."""
        c, tokens = self.model, places_of(queries)
        width = c.num_attention_heads // self.ways * c.head_dim
        moved_bytes = sum(q.positions for q in queries) * self.position_bytes
        flops = 4 * width * sum(q.pairs for q in queries)
        return [
            *self.qkv(tokens, fp8),
            Op("attention", 0, moved_bytes, flops, c.dtype),
            self.product(PROJECTIONS, tokens, c.hidden_size, width, ATTENTION[1] in fp8),
        ]

    def qkv(self, tokens: int, fp8: frozenset[str]) -> list[Op]:
        c = self.model
        rows = (c.num_attention_heads + 2 * c.num_key_value_heads) // self.ways * c.head_dim
        bias = rows if c.attention_bias else 0
        qk_norm = 2 * c.head_dim if c.use_qk_norm else 0
        return [
            self.norms(c.hidden_size + bias + qk_norm),
            self.product(PROJECTIONS, tokens, rows, c.hidden_size, ATTENTION[0] in fp8),
        ]

    @property
    def position_bytes(self) -> float:
        """K and V of one position in one layer."""
        c = self.model
        return c.kv_bytes_per_token(self.kv_dtype) / c.num_hidden_layers / self.ways

    # MLP

    def dense(self, tokens: int, fp8: frozenset[str]) -> list[Op]:
        width = self.model.intermediate_size // self.ways
        return self.swiglu("dense MLP", DENSE, tokens, width, fp8)

    def moe(self, tokens: int, fp8: frozenset[str]) -> list[Op]:
        """Router, whole on each device; routed experts; the shared expert, always cut by width."""
        c = self.model
        gate = self.product("router", tokens, c.n_routed_experts, c.hidden_size, fp8=False)
        bias_bytes = c.n_routed_experts * SCALE_BYTES
        router = replace(gate, weight_bytes=gate.weight_bytes + bias_bytes)
        width, shared = c.moe_intermediate_size, c.shared_intermediate_size // self.ways
        load = mean_load(tokens, c.n_routed_experts, c.num_experts_per_tok)
        if self.expert_parallel:
            load = busiest_load(tokens, c.n_routed_experts, c.num_experts_per_tok, self.ways)
        else:
            width //= self.ways
        experts = self.swiglu("experts", EXPERTS, load.rows, width, fp8, load.experts)
        return [router, *experts, *self.swiglu("shared expert", SHARED, tokens, shared, fp8)]

    def swiglu(
        self,
        name: str,
        leaves: Sequence[str],
        rows: float,
        width: int,
        fp8: frozenset[str],
        copies: float = 1,
    ) -> list[Op]:
        """down(silu(gate x) * up x) of `copies` equal MLPs which share out the rows of x."""
        gate_up, down = (leaf in fp8 for leaf in leaves)
        hidden = self.model.hidden_size
        return [
            self.product(name, rows, 2 * width, hidden, gate_up, copies),
            self.product(name, rows, hidden, width, down, copies),
        ]

    # ends

    def embedding(self, queries: Sequence[Queries]) -> Op:
        """Every device gathers a row for each token, its own or not, before they are summed."""
        c = self.model
        rows_bytes = places_of(queries) * c.hidden_size * item_bytes(c.dtype)
        return Op("embedding", 0, rows_bytes, 0, c.dtype)

    def head(self, rows: int) -> Op:
        """Logits of this device's part of the vocabulary."""
        c = self.model
        return self.product("lm_head", rows, c.vocab_size // self.ways, c.hidden_size, fp8=False)

    def product(
        self, name: str, tokens: float, rows: int, columns: int, fp8: bool, copies: float = 1
    ) -> Op:
        """`tokens` rows in all times `copies` weights [rows, columns]."""
        c = self.model
        weight_bytes = rows * columns * item_bytes(FP8 if fp8 else c.dtype)
        if fp8:
            assert c.quant is not None
            block = c.quant.block_size[1] if c.quant.block_size else columns
            weight_bytes += rows * -(-columns // block) * SCALE_BYTES
        flops = 2 * tokens * rows * columns
        return Op(name, copies * weight_bytes, 0, flops, FP8 if fp8 else c.dtype)

    def norms(self, size: int) -> Op:
        """Norms and biases: read; what is computed with them is left out."""
        return Op("norms", size * item_bytes(self.model.dtype), 0, 0, self.model.dtype)


def places_of(queries: Sequence[Queries]) -> int:
    """Query tokens of a step."""
    return sum(q.places for q in queries)


def item_bytes(dtype: str) -> int:
    """Of one value, by numpy's name of its dtype."""
    return np.dtype(dtype).itemsize
