"""What a step moves and multiplies, against the parameters themselves and against plain sums."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.aot.abstract import param_specs
from glmjax.config import MeshConfig, ModelConfig, QuantConfig
from glmjax.errors import ConfigError
from glmjax.model.spec import path_name
from glmjax.planner.ops import Queries
from glmjax.planner.work import Work, step_work
from glmjax.releases import KNOWN_MODELS
from glmjax.sharding import partition_spec

BF16, FP8 = "bfloat16", "float8_e4m3fn"
GLM45, GLM45_FP8 = (KNOWN_MODELS[f"zai-org/{name}"] for name in ("GLM-4.5", "GLM-4.5-FP8"))
AIR = KNOWN_MODELS["zai-org/GLM-4.5-Air"]
EVERY_EXPERT = 5000  # tokens that leave none of 160 experts untouched, to float64's precision
TENSOR = [1, 2, 4, 8, 16]
H100_BYTES_PER_US = 3.35e6


def decode(
    model: ModelConfig,
    tensor: int = 8,
    seqs: int = 1,
    context: float = 0,
    *,
    expert_parallel: bool = False,
    kv_dtype: str = BF16,
    drafts: int | None = None,
) -> Work:
    mesh = MeshConfig(1, tensor, expert_parallel)
    queries = [Queries(seqs, 1, context)]
    return step_work(model, mesh, kv_dtype, queries, sampled=seqs, drafts=drafts)


def total(work: Work, field: str, *names: str) -> float:
    """A field of all operations, or of those with one of `names`."""
    return sum(getattr(op, field) for op in work.ops if not names or op.name in names)


# Parameters


@cache
def leaves(model: ModelConfig, drafting: bool = True) -> list[tuple[str, Any]]:
    """(path, ParamSpec) of a model as it runs."""
    found = jax.tree.leaves_with_path(param_specs(model, drafting))
    return [(path_name(path), spec) for path, spec in found]


def size_bytes(spec: Any, tensor: int) -> int:
    ways = tensor if any(axis is not None for axis in partition_spec(spec.axes)) else 1
    return math.prod(spec.shape) * np.dtype(spec.dtype).itemsize // ways


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["TP", "EP"])
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_every_parameter_but_the_embedding_is_read_once(name, expert_parallel):
    model = KNOWN_MODELS[name]
    for tensor in TENSOR:
        run = replace(model.replicated(tensor), expert_parallel=expert_parallel)
        read = [spec for path, spec in leaves(run) if path != "model/embed_tokens"]
        work = decode(model, tensor, EVERY_EXPERT, expert_parallel=expert_parallel, drafts=1)
        again = total(work, "weight_bytes", "MTP lm_head")  # the draft's own reading of the head
        found = total(work, "weight_bytes") - again
        assert again == model.vocab_size * model.hidden_size * 2 / tensor
        assert found == pytest.approx(sum(size_bytes(spec, tensor) for spec in read), abs=0.5)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["TP", "EP"])
def test_scales_of_blocks_are_read_too(expert_parallel):
    quant = QuantConfig("fp8", (128, 128), ("lm_head", "model.layers.4.mlp.shared_experts.up_proj"))
    model = replace(GLM45, num_hidden_layers=6, quant=quant)
    run = replace(model, expert_parallel=expert_parallel)
    expected = sum(size_bytes(spec, 4) for path, spec in leaves(run, False) if "embed_" not in path)
    work = decode(model, 4, EVERY_EXPERT, expert_parallel=expert_parallel)
    assert total(work, "weight_bytes") == pytest.approx(expected, abs=0.5)


BY_HAND = {  # leaf -> op, its weights, and a scale for each of so many output channels, 8 ways
    "layers/3/self_attn/qkv_proj": ("attention projections", 14 * 128 * 5120, 14 * 128),
    "layers/3/self_attn/o_proj": ("attention projections", 12 * 128 * 5120, 5120),
    "layers/0/mlp/gate_up_proj": ("dense MLP", 2 * 1536 * 5120, 2 * 1536),
    "layers/0/mlp/down_proj": ("dense MLP", 1536 * 5120, 5120),
    "layers/3/mlp/experts_gate_up_proj": ("experts", 160 * 2 * 192 * 5120, 160 * 2 * 192),
    "layers/3/mlp/experts_down_proj": ("experts", 160 * 192 * 5120, 160 * 5120),
    "layers/3/mlp/shared_gate_up_proj": ("shared expert", 2 * 192 * 5120, 2 * 192),
    "layers/3/mlp/shared_down_proj": ("shared expert", 192 * 5120, 5120),
    "mtp/layer/mlp/shared_down_proj": ("MTP shared expert", 192 * 5120, 5120),
    "mtp/eh_proj": ("MTP eh_proj", 2 * 5120 * 5120, 5120),
}


@pytest.mark.parametrize("leaf", BY_HAND)
def test_leaves_quantised_by_hand_are_counted_so(leaf):
    model, mesh = replace(GLM45_FP8, num_hidden_layers=4), MeshConfig(1, 8)
    args = model, mesh, BF16, [Queries(EVERY_EXPERT, 1, 0)]
    one, none = (
        step_work(*args, sampled=1, drafts=1, quantized=names) for names in ({leaf}, set[str]())
    )
    name, weights, scales = BY_HAND[leaf]
    saved = total(none, "weight_bytes", name) - total(one, "weight_bytes", name)
    assert saved == pytest.approx(weights - 4 * scales)
    [product] = [op for op in one.ops if op.precision == FP8]
    share = 8 / 160 if "experts_" in leaf else 1
    assert product.flops == pytest.approx(2 * EVERY_EXPERT * weights * share)


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_products_are_twice_the_active_parameters_of_each_token(name):
    model, tokens = KNOWN_MODELS[name], 37
    share = model.num_experts_per_tok / model.n_routed_experts
    matrices = [
        math.prod(spec.shape) * (share if "/experts_" in path else 1)
        for path, spec in leaves(model, drafting=False)
        if "vectors" not in path and not path.endswith(("norm", "embed_tokens", "scale"))
    ]
    found = decode(model, 1, tokens)
    products = total(found, "flops") - total(found, "flops", "attention")
    assert products == pytest.approx(2 * tokens * sum(matrices), rel=1e-12)


def test_devices_share_out_products_but_the_router():
    whole, part = (decode(GLM45_FP8, tensor, 64, 1000) for tensor in (1, 8))
    router = 2 * 64 * 89 * 160 * 5120
    assert total(whole, "flops", "router") == total(part, "flops", "router") == router
    assert 8 * (total(part, "flops") - router) == pytest.approx(total(whole, "flops") - router)


def test_whole_experts_are_as_many_bytes_over_the_mesh_as_parts_of_them():
    for model in (GLM45, GLM45_FP8):
        cut = total(decode(model, 8, EVERY_EXPERT), "weight_bytes", "experts")
        work = decode(model, 8, EVERY_EXPERT, expert_parallel=True)
        # A part of a width has all scales of down's output channels: 8 devices have them 8 times.
        scales = 89 * 160 * 5120 * 4 * 7 if model.quant else 0
        assert 8 * cut - scales == pytest.approx(8 * total(work, "weight_bytes", "experts"))


# Figures by hand, 355B FP8 on 8 devices, microseconds a layer at 3.35 TB/s. tokens -> the experts'
# weights cut by width, scales not counted; those of the busiest device with whole experts; BF16 K
# and V of 8k tokens each

EXPERT_BYTES = 3 * 1536 * 5120 + 4 * (2 * 1536 + 5120)
ROOFLINES = {1: (7, 18, 1), 8: (47, 70, 10), 32: (114, 130, 40), 64: (136, 141, 80)}


@pytest.mark.parametrize("tokens", ROOFLINES)
def test_rooflines_of_one_layer(tokens):
    cut_us, whole_us, kv_us = ROOFLINES[tokens]
    cut = decode(GLM45_FP8, 8, tokens, 8192)
    whole = decode(GLM45_FP8, 8, tokens, 8192, expert_parallel=True)
    found = [total(work, "weight_bytes", "experts") / 89 for work in (cut, whole)]
    assert found[0] / H100_BYTES_PER_US == pytest.approx(cut_us, rel=0.02, abs=0.6)
    assert found[1] / H100_BYTES_PER_US == pytest.approx(whole_us, rel=0.02, abs=0.6)
    kv_bytes = total(cut, "data_bytes", "attention") / 92
    assert kv_bytes / H100_BYTES_PER_US == pytest.approx(kv_us, abs=0.5)


def test_experts_of_one_token_by_hand():
    work = decode(GLM45_FP8, 8, 1)
    scales = 8 * 5120 * 4 * 7 / 8  # of down, on every device
    assert total(work, "weight_bytes", "experts") / 89 == pytest.approx(EXPERT_BYTES + scales)
    assert total(work, "flops", "experts") == 89 * 2 * 8 * 3 * 1536 * 5120 / 8


@pytest.mark.parametrize("kv_dtype", [BF16, FP8])
@pytest.mark.parametrize(("tensor", "ways"), [(1, 1), (4, 4), (8, 8), (16, 8)])
def test_keys_and_values_are_moved_once(kv_dtype, tensor, ways):
    """16 devices hold 8 KV heads twice."""
    item = {BF16: 2, FP8: 1}[kv_dtype]
    work = decode(GLM45, tensor, 3, 1000, kv_dtype=kv_dtype)
    assert total(work, "data_bytes", "attention") == 3 * 1001 * 92 * 2 * 8 * 128 * item / ways


@given(chunk=st.integers(1, 60), context=st.integers(0, 50), seqs=st.integers(1, 4))
def test_attention_is_causal(chunk, context, seqs):
    queries = [Queries(seqs, chunk, context), Queries(1, 1, 7)]
    work = step_work(AIR, MeshConfig(1, 4), BF16, queries, sampled=seqs)
    keys = seqs * sum(context + i + 1 for i in range(chunk)) + 8
    assert total(work, "flops", "attention") == pytest.approx(46 * 4 * keys * 96 * 128 / 4)


# What a step computes


def test_only_sampled_places_have_logits():
    queries = [Queries(2, 500, 0)]
    work = step_work(GLM45, MeshConfig(1, 8), BF16, queries, sampled=2)
    assert total(work, "flops", "lm_head") == 2 * 2 * 5120 * 151552 / 8
    assert work.join_bytes == 2 * 151552 * 4
    assert work.sum_bytes == (1 + 2 * 92) * 1000 * 5120 * 2
    assert total(work, "data_bytes", "embedding") == 1000 * 5120 * 2


def verify(drafts: int | None) -> Work:
    """4 sequences, 4 tokens each."""
    mesh = MeshConfig(1, 8)
    return step_work(GLM45_FP8, mesh, BF16, [Queries(4, 4, 100)], sampled=16, drafts=drafts)


def test_drafts_cost_a_pass_over_all_tokens_and_passes_over_one_each():
    plain, drafting = verify(None), verify(3)
    tokens = 16 + 4 + 4
    assert total(drafting, "flops", "MTP eh_proj") == tokens * 2 * 5120 * 2 * 5120
    assert total(drafting, "flops", "MTP lm_head") == 3 * 4 * 2 * 5120 * 151552 / 8
    assert total(drafting, "flops", "MTP experts") == tokens * 8 * 2 * 3 * 1536 * 5120 / 8
    pairs = 4 * (101 + 102 + 103 + 104) + 4 * 105 + 4 * 106
    assert total(drafting, "flops", "MTP attention") == 4 * pairs * 96 * 128 / 8
    assert drafting.sum_bytes - plain.sum_bytes == 3 * tokens * 5120 * 2
    assert drafting.join_bytes - plain.join_bytes == 3 * 4 * 151552 * 4
    main = [op for op in drafting.ops if not op.name.startswith("MTP")]
    assert main == list(plain.ops)


def test_without_drafts_the_block_only_writes_its_keys_and_values():
    plain, idle = verify(None), verify(0)
    added = {op.name for op in idle.ops} - {op.name for op in plain.ops}
    names = {"embedding", "eh_proj", "norms", "attention projections", "attention"}
    assert added == {f"MTP {name}" for name in names}
    assert total(idle, "data_bytes", "MTP attention") == 16 * 2 * 128 * 2
    vectors = 3 * 5120 + (12 + 2) * 128 + 2 * 128  # enorm, hnorm, the layer's first; bias; q, k
    assert total(idle, "weight_bytes", "MTP norms") == 2 * vectors
    assert total(idle, "flops", "MTP attention projections") == 16 * 2 * 5120 * (12 + 2) * 128
    assert idle.sum_bytes - plain.sum_bytes == 16 * 5120 * 2
    assert idle.join_bytes == plain.join_bytes


@pytest.mark.parametrize(
    ("devices", "expected"), [(1, 0), (2, 1.0 * 60 + 0.5 * 8), (8, 1.75 * 60 + 7 * 8 / 8)]
)
def test_rings_carry_sums_twice_and_joins_once(devices, expected):
    assert Work((), sum_bytes=60, join_bytes=8).wire_bytes(devices) == pytest.approx(expected)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="tensor parallel 7 does not divide"):
        decode(GLM45, 7)
    with pytest.raises(ConfigError, match="no MTP block"):
        decode(replace(AIR, num_nextn_predict_layers=0), 4, drafts=0)


# Order

SIZES = st.integers(1, 400)
MODELS = st.sampled_from([GLM45, GLM45_FP8, AIR, KNOWN_MODELS["zai-org/GLM-4.5-Air-FP8"]])
DRAFTS = st.sampled_from([None, 0, 1, 3])
FIELDS = ("weight_bytes", "data_bytes", "flops")


def amounts(work: Work) -> list[float]:
    return [*(total(work, field) for field in FIELDS), work.sum_bytes, work.join_bytes]


def no_more(few: list[float], many: list[float]) -> bool:
    return all(a <= b * (1 + 1e-9) for a, b in zip(few, many, strict=True))


@settings(deadline=None)
@given(model=MODELS, tensor=st.sampled_from(TENSOR), ep=st.booleans(), drafts=DRAFTS, seqs=SIZES)
def test_more_sequences_and_longer_ones_are_never_less(model, tensor, ep, drafts, seqs):
    few, many, longer = (
        amounts(decode(model, tensor, n, context, expert_parallel=ep, drafts=drafts))
        for n, context in ((seqs, 100), (seqs + 1, 100), (seqs, 101))
    )
    assert no_more(few, many)
    assert no_more(few, longer)
    assert few[2] < many[2]
    assert few[1] < longer[1]


@settings(deadline=None)
@given(model=MODELS, ways=st.sampled_from(TENSOR[:-1]), ep=st.booleans(), drafts=DRAFTS, seqs=SIZES)
def test_more_devices_never_have_more_to_do_each(model, ways, ep, drafts, seqs):
    options: dict[str, Any] = {"expert_parallel": ep, "drafts": drafts}
    few, many = (amounts(decode(model, n, seqs, 500, **options)) for n in (2 * ways, ways))
    assert no_more(few, many)


@settings(deadline=None)
@given(
    fp8=MODELS.filter(lambda m: m.quant), ways=st.sampled_from(TENSOR), seqs=SIZES, drafts=DRAFTS
)
def test_fp8_never_moves_more(fp8, ways, seqs, drafts):
    plain = replace(fp8, quant=None)
    small, large = (decode(model, ways, seqs, 50, drafts=drafts) for model in (fp8, plain))
    assert total(small, "weight_bytes") < total(large, "weight_bytes")
    assert total(small, "flops") == total(large, "flops")
    small_kv = decode(plain, ways, seqs, 50, kv_dtype=FP8, drafts=drafts)
    assert total(small_kv, "data_bytes") < total(large, "data_bytes")


@given(seqs=SIZES, tokens=SIZES, context=SIZES)
def test_sequences_alike_may_be_given_together_or_apart(seqs, tokens, context):
    mesh = MeshConfig(1, 4)
    together = step_work(AIR, mesh, BF16, [Queries(2 * seqs, tokens, context)], sampled=1, drafts=2)
    halves = [Queries(seqs, tokens, context)] * 2
    apart = step_work(AIR, mesh, BF16, halves, sampled=1, drafts=2)
    assert amounts(apart) == pytest.approx(amounts(together))
