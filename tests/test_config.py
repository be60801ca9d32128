"""Reading config.json in both spellings, the known models, and one clear error for each mistake."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmjax.config import (
    CacheConfig,
    MeshConfig,
    ModelConfig,
    QuantConfig,
    SchedulerConfig,
    token_ids,
)
from glmjax.errors import ConfigError
from glmjax.releases import KNOWN_MODELS, release

SHARED_VALUES = {
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "dtype": "bfloat16",
    "eos_token_ids": (151329, 151336, 151338),
}
AIR = SHARED_VALUES | {
    "num_hidden_layers": 46,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
    "max_position_embeddings": 131072,
}
GLM45 = SHARED_VALUES | {
    "num_hidden_layers": 92,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "max_position_embeddings": 131072,
}
GLM46 = GLM45 | {"max_position_embeddings": 202752}
RELEASES = {"GLM-4.5-Air": AIR, "GLM-4.5": GLM45, "GLM-4.6": GLM46, "GLM-4.7": GLM46}

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    eos_token_ids=(5, 7),
)


HOW_IT_RUNS = {"deterministic", "expert_parallel", "kernels"}


def as_transformers_4(config: ModelConfig) -> dict[str, Any]:
    """A config.json as transformers 4 wrote it: everything at the top level."""
    raw = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    for name in ("quant", *HOW_IT_RUNS):
        del raw[name]
    raw["torch_dtype"] = raw.pop("dtype")
    raw["eos_token_id"] = list(raw.pop("eos_token_ids"))
    raw |= {"rope_scaling": None, "hidden_act": "silu", "use_cache": True}
    return raw | {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"]}


def as_transformers_5(config: ModelConfig) -> dict[str, Any]:
    """The same, with rope settings in a group of their own and three names changed."""
    raw = as_transformers_4(config)
    raw["dtype"] = raw.pop("torch_dtype")
    raw["num_local_experts"] = raw.pop("n_routed_experts")
    raw["num_mtp_layers"] = raw.pop("num_nextn_predict_layers")
    raw["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": raw.pop("rope_theta"),
        "partial_rotary_factor": raw.pop("partial_rotary_factor"),
    }
    del raw["rope_scaling"]
    return raw


SPELLINGS = [as_transformers_4, as_transformers_5]


def write(folder, raw) -> None:
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(raw))


# Reading


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Configs that are valid by construction."""
    small = st.integers(1, 8)
    kv_heads, groups, group_size = draw(small), draw(st.sampled_from([1, 2, 4])), draw(small) + 1
    topk_group, layers, head_dim = draw(st.integers(1, groups)), draw(small), 4 * draw(small)
    number = st.floats(1e-6, 1e7)
    return ModelConfig(
        vocab_size=draw(st.integers(1, 10**6)),
        hidden_size=draw(st.integers(1, 10**4)),
        intermediate_size=draw(st.integers(1, 10**4)),
        moe_intermediate_size=draw(st.integers(1, 10**4)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(small),
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        n_routed_experts=groups * group_size,
        num_experts_per_tok=draw(st.integers(1, topk_group * group_size)),
        n_shared_experts=draw(st.integers(1, 3)),
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_group=groups,
        topk_group=topk_group,
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(number),
        use_qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        partial_rotary_factor=draw(st.sampled_from([0.5, 1.0])),
        rope_theta=draw(number),
        max_position_embeddings=draw(st.integers(1, 10**6)),
        rms_norm_eps=draw(number),
        tie_word_embeddings=draw(st.booleans()),
        num_nextn_predict_layers=draw(st.integers(0, 1)),
        dtype=draw(st.sampled_from(["bfloat16", "float32"])),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 10**6), max_size=3))),
    )


@given(model_configs(), st.sampled_from(SPELLINGS))
def test_both_spellings_read_back_equal(config, spelling):
    raw = json.loads(json.dumps(spelling(config)))
    assert ModelConfig.from_dict(raw) == config


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_folder_and_its_file_read_alike(tmp_path, spelling):
    write(tmp_path, spelling(SMALL))
    assert ModelConfig.from_hf(tmp_path) == SMALL
    assert ModelConfig.from_hf(str(tmp_path / "config.json")) == SMALL


@pytest.mark.parametrize(("eos", "expected"), [(None, ()), (7, (7,)), ([7, 5], (7, 5))])
def test_end_tokens_may_be_absent_one_or_many(eos, expected):
    assert ModelConfig.from_dict(as_transformers_4(SMALL) | {"eos_token_id": eos}) == replace(
        SMALL, eos_token_ids=expected
    )
    assert token_ids(eos) == expected


def test_null_means_the_default():
    raw = as_transformers_4(SMALL) | {"rope_theta": None, "n_group": None}
    assert ModelConfig.from_dict(raw) == SMALL


def test_head_dim_follows_from_the_heads_when_absent():
    raw = as_transformers_4(SMALL)
    del raw["head_dim"]
    assert ModelConfig.from_dict(raw).head_dim == 64 // 8


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=5,
)
EVERY_KEY = sorted(
    {*as_transformers_4(SMALL), *as_transformers_5(SMALL), "quantization_config", "rope_scaling"}
)


@given(st.sampled_from(EVERY_KEY), json_values, st.sampled_from(SPELLINGS))
def test_a_wrong_value_is_a_config_error_and_nothing_else(key, value, spelling):
    try:
        config = ModelConfig.from_dict(spelling(SMALL) | {key: value})
    except ConfigError:
        return
    assert all(isinstance(token, int) for token in config.eos_token_ids)


@given(st.dictionaries(st.sampled_from(["quant_method", "format", "ignore"]), json_values))
def test_a_wrong_quantization_is_a_config_error_and_nothing_else(raw):
    for base in ({"quant_method": "fp8", "weight_block_size": [128, 128]}, PER_CHANNEL):
        with contextlib.suppress(ConfigError):
            assert isinstance(QuantConfig.from_hf(base | raw), QuantConfig)


# Quantisation

PER_CHANNEL = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head", "model.layers.1.mlp.gate"],
}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            PER_CHANNEL,
            QuantConfig("compressed-tensors", None, ("lm_head", "model.layers.1.mlp.gate")),
        ),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 64]},
            QuantConfig("fp8", (128, 64)),
        ),
        (
            {
                "quant_method": "fp8",
                "weight_block_size": [128, 128],
                "modules_to_not_convert": ["lm_head"],
            },
            QuantConfig("fp8", (128, 128), ("lm_head",)),
        ),
    ],
)
def test_both_fp8_forms(raw, expected):
    read = ModelConfig.from_dict(as_transformers_4(SMALL) | {"quantization_config": raw})
    assert read == replace(SMALL, quant=expected)


# Known models


@pytest.mark.parametrize("suffix", ["", "-FP8"])
@pytest.mark.parametrize("name", RELEASES)
def test_known_models_have_their_exact_values(name, suffix):
    config = release(f"zai-org/{name}{suffix}")
    expected = RELEASES[name]
    assert {field: getattr(config, field) for field in expected} == expected
    assert set(ModelConfig.__dataclass_fields__) == {*expected, "quant", *HOW_IT_RUNS}
    assert (config.quant is not None) == bool(suffix)


def test_fp8_releases_leave_routers_head_and_eh_proj_alone():
    quant = release("zai-org/GLM-4.5-FP8").quant
    assert quant is not None
    assert (quant.method, quant.block_size) == ("compressed-tensors", None)
    routers = {f"model.layers.{layer}.mlp.gate" for layer in range(3, 93)}
    assert set(quant.ignore) == {"lm_head", "model.layers.92.eh_proj", *routers}


def test_known_models_are_eight():
    assert set(KNOWN_MODELS) == {f"zai-org/{n}{s}" for n in RELEASES for s in ("", "-FP8")}


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown model 'glm'; known: zai-org/GLM-4\.5, zai-org"):
        release("glm")


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("zai-org/GLM-4.5-Air", None, 188_416),
        ("zai-org/GLM-4.5", None, 376_832),
        ("zai-org/GLM-4.7", "bfloat16", 376_832),
        ("zai-org/GLM-4.5-Air", "float32", 2 * 188_416),
        ("zai-org/GLM-4.5", "float8_e4m3fn", 188_416),
    ],
)
def test_kv_bytes_per_token(name, dtype, expected):
    assert release(name).kv_bytes_per_token(dtype) == expected


def test_derived_sizes():
    config = release("zai-org/GLM-4.5")
    assert (config.rotary_dim, config.num_moe_layers) == (64, 89)
    assert replace(config, n_shared_experts=2).shared_intermediate_size == 3072


# Errors of a model's config

MISTAKES = [
    ({"model_type": "llama"}, r"model_type 'llama'.* serves Glm4MoeForCausalLM"),
    ({"architectures": ["Glm4MoeLiteForCausalLM"]}, r"Glm4MoeLite.*GLM-4\.5, -Air, 4\.6 and 4\.7"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn' is not served"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' is not served"),
    ({"hidden_size": "64"}, "hidden_size is '64', expected int"),
    ({"hidden_size": 64.0}, r"hidden_size is 64\.0, expected int"),
    ({"hidden_size": True}, "hidden_size is True, expected int"),
    ({"use_qk_norm": 1}, "use_qk_norm is 1, expected bool"),
    ({"rope_theta": "1e6"}, "rope_theta is '1e6', expected float"),
    ({"vocab_size": 0}, "vocab_size is 0, expected a positive number"),
    ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1, expected 0 or more"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive number"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
    ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds n_routed_experts 8"),
    ({"n_group": 3}, "groups divide the experts"),
    ({"n_group": 2, "topk_group": 3}, "topk_group is at most n_group"),
    ({"n_group": 8}, "n_group 8 leaves too few experts a group to choose 2"),
    ({"n_group": 4, "num_experts_per_tok": 3}, "n_group 4 leaves too few experts"),
    ({"first_k_dense_replace": 4}, "first_k_dense_replace 4 exceeds num_hidden_layers 3"),
    ({"partial_rotary_factor": 1.5}, "gives 24 rotary dims, expected an even number from 2"),
    ({"partial_rotary_factor": 0.2}, "gives 3 rotary dims"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers is 2, expected 0 or 1"),
    ({"n_shared_experts": 0}, "n_shared_experts is 0, expected 1 or more"),
    ({"torch_dtype": "float16"}, "dtype is 'float16', expected one of bfloat16, float32"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', expected"),
    ({"eos_token_id": [1, None]}, r"eos_token_id is \[1, None\], expected"),
    (
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "quant_method 'gptq'.*Convert the BF16 release",
    ),
    (
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
        r"weight_block_size is \[128\], expected two",
    ),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=[str(c) for c, _ in MISTAKES])
def test_a_mistake_in_config_json_is_named(tmp_path, change, message):
    write(tmp_path, as_transformers_4(SMALL) | change)
    with pytest.raises(ConfigError, match=message) as error:
        ModelConfig.from_hf(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist; a model folder must hold it"),
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list, expected a JSON object"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, text, message):
    if text is not None:
        write(tmp_path, text)
    with pytest.raises(ConfigError, match=f"config.json {message}"):
        ModelConfig.from_hf(tmp_path)


# Meshes


def test_a_config_json_does_not_say_how_the_model_runs():
    raw = as_transformers_4(SMALL) | {"expert_parallel": True, "deterministic": True}
    assert ModelConfig.from_dict(raw) == SMALL


@given(st.integers(1, 10**4), st.integers(1, 10**4))
def test_mesh_reads_what_it_means(data, tensor):
    assert MeshConfig.parse(f"{data}x{tensor}") == MeshConfig(data, tensor)
    assert MeshConfig.parse(f"{data}X{tensor}").size == data * tensor
    assert MeshConfig.parse(tensor) == MeshConfig.parse(str(tensor)) == MeshConfig(1, tensor)


@pytest.mark.parametrize("text", ["", "x", "2x", "x4", "2x2x2", "-1", "1.5", "two", "²", " 8"])
def test_mesh_refuses_anything_else(text):
    with pytest.raises(ConfigError, match=r"expected N \(tensor parallel N\) or DxT"):
        MeshConfig.parse(text)


@pytest.mark.parametrize("text", ["0", "0x8", "8x0"])
def test_mesh_axes_are_at_least_one(text):
    with pytest.raises(ConfigError, match="both axes must be 1 or more"):
        MeshConfig.parse(text)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(-1, 20))
def test_devices_divide_over_hosts(data, tensor, hosts):
    if hosts > 0 and data * tensor % hosts == 0:
        mesh = MeshConfig.parse(f"{data}x{tensor}", hosts=hosts)
        assert mesh == MeshConfig(data, tensor, hosts=hosts)
        assert mesh.devices_per_host * hosts == mesh.size
        return
    message = f"{data}x{tensor} has {data * tensor} devices, .* not divide over {hosts} hosts"
    with pytest.raises(ConfigError, match=message):
        MeshConfig(data, tensor, hosts=hosts)


@pytest.mark.parametrize("name", KNOWN_MODELS)
@pytest.mark.parametrize("mesh", ["1", "2", "4", "8", "2x4", "16x8"])
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_official_sizes_divide_over_official_meshes(name, mesh, expert_parallel):
    mesh = MeshConfig.parse(mesh, expert_parallel=expert_parallel)
    assert mesh.expert_parallel == expert_parallel
    mesh.check(KNOWN_MODELS[name])


def test_whole_experts_must_divide_too():
    model = replace(SMALL, n_routed_experts=6)
    MeshConfig(1, 4).check(model)
    message = (
        "a mesh with tensor parallel 4 does not divide n_routed_experts 6 of this model; tensor "
        "parallel sizes that fit: 1, 2"
    )
    with pytest.raises(ConfigError) as error:
        MeshConfig(2, 4, expert_parallel=True).check(model)
    assert str(error.value) == message


def test_a_mesh_that_does_not_divide_says_what_would():
    message = (
        "a mesh with tensor parallel 6 does not divide num_key_value_heads 8 (12 query heads "
        "each), moe_intermediate_size 1408, vocab_size 151552 of this model; tensor parallel "
        "sizes that fit: 1, 2, 4, 8, 16, 32"
    )
    with pytest.raises(ConfigError) as error:
        MeshConfig(1, 6).check(release("zai-org/GLM-4.5-Air"))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "field", ["num_key_value_heads", "intermediate_size", "moe_intermediate_size", "vocab_size"]
)
def test_every_sharded_size_is_checked(field):
    sizes = {"num_key_value_heads": 8} | {field: 4}
    sizes["num_attention_heads"] = sizes["num_key_value_heads"]
    with pytest.raises(ConfigError, match=rf"{field} 4( \(1 query heads each\))? of this model"):
        MeshConfig(1, 8).check(replace(SMALL, **sizes))


@pytest.mark.parametrize(
    ("kv_heads", "heads", "fitting"),
    [
        (2, 8, [1, 2, 4, 8]),
        (2, 12, [1, 2, 4]),  # 6 query heads a KV head are no whole number for 4 devices
        (1, 16, [1, 2, 4, 8, 16]),
        (4, 4, [1, 2, 4]),
        (3, 12, [1]),  # no multiple of 3 divides the other sizes
        (16, 32, [1, 2, 4, 8, 16, 32]),
    ],
)
def test_a_mesh_may_repeat_kv_heads_that_share_out_their_queries(kv_heads, heads, fitting):
    widths = {"intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 256}
    model = replace(SMALL, num_key_value_heads=kv_heads, num_attention_heads=heads, **widths)
    message = f"num_key_value_heads.*that fit: {', '.join(map(str, fitting))}$"
    for tensor in (1, 2, 4, 8, 16, 32, 64):
        run = model.replicated(tensor)
        if tensor in fitting:
            MeshConfig(1, tensor).check(model)
            assert run == replace(model, num_key_value_heads=max(kv_heads, tensor))
            assert run.replicated(tensor) == run
        else:
            assert run == model
            with pytest.raises(ConfigError, match=message):
                MeshConfig(1, tensor).check(model)


# The other configs


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (CacheConfig, {"page_size": 0}, "page_size 0 must be 1 or more"),
        (CacheConfig, {"num_pages": 1}, "num_pages 1 2 or more"),
        (CacheConfig, {"dtype": "fp8_e5m2"}, "one of auto, bfloat16, fp8_e4m3"),
        (SchedulerConfig, {"max_running_requests": 0}, "max_running_requests is 0, expected 1"),
        (SchedulerConfig, {"max_queued_requests": 0}, "max_queued_requests is 0, expected 1"),
        (SchedulerConfig, {"chunked_prefill_size": 1}, "chunked_prefill_size is 1, expected 2"),
        (SchedulerConfig, {"max_seq_len": 1}, "max_seq_len is 1, expected 2 or more"),
    ],
)
def test_impossible_settings_are_refused(make, options, message):
    with pytest.raises(ConfigError, match=message):
        make(**options)
