"""The checkpoints we write ourselves: complete, repeatable, and what transformers expects."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import safe_open
from tokenizers import Tokenizer

from glmjax.bench import synthetic
from glmjax.config import MeshConfig, ModelConfig
from glmjax.errors import ConfigError
from glmjax.releases import release

TINY = synthetic.default_config()
PLAIN = replace(
    TINY, use_qk_norm=False, attention_bias=False, num_nextn_predict_layers=0, num_hidden_layers=2
)
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    synthetic.write_checkpoint(path, TINY, seed=1)
    return path


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor, from the file where the index says it is."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, "np") as reader:
            found[name] = reader.get_tensor(name)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in found.values())
    return found


def test_config_reads_back_equal(folder):
    assert ModelConfig.from_hf(folder) == TINY
    MeshConfig(1, 8).check(TINY)


def test_end_tokens_are_the_tokenizers_in_both_configs(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|user|>", "<|observation|>")]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text())["eos_token_id"] == expected


def test_no_tokenizer_keeps_the_configs_end_tokens(tmp_path):
    config = replace(PLAIN, eos_token_ids=(3, 5), vocab_size=64)
    synthetic.write_checkpoint(tmp_path, config, tokenizer=False)
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (3, 5)
    assert not (tmp_path / "tokenizer.json").exists()


@pytest.mark.parametrize("shards", [1, 2, 5, 12])
def test_index_lists_every_shard_and_values_do_not_depend_on_them(folder, tmp_path, shards):
    synthetic.write_checkpoint(tmp_path, TINY, seed=1, shards=shards, tokenizer=False)
    written = {path.name for path in tmp_path.glob("*.safetensors")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert written == set(index["weight_map"].values())
    assert len(written) == shards + 1
    expected, found = read_tensors(folder), read_tensors(tmp_path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_as_many_shards_as_tensors(tmp_path):
    count = len(synthetic.tensors(PLAIN))
    synthetic.write_checkpoint(tmp_path, PLAIN, shards=count, tokenizer=False)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == count


def test_mtp_block_lies_in_its_own_file(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    prefix = f"model.layers.{TINY.num_hidden_layers}."
    mtp = {name for name in index if name.startswith(prefix)}
    assert {name for name, file in index.items() if file == "mtp.safetensors"} == mtp
    assert {f"{prefix}{name}.weight" for name in ("eh_proj", "enorm", "hnorm")} <= mtp
    assert f"{prefix}mlp.experts.15.down_proj.weight" in mtp


def test_switches_leave_tensors_out():
    names = " ".join(synthetic.tensors(PLAIN) | synthetic.mtp_tensors(PLAIN))
    assert not any(part in names for part in ("q_norm", "proj.bias", "layers.2."))
    assert "lm_head.weight" not in synthetic.tensors(replace(PLAIN, tie_word_embeddings=True))


def test_seeds_differ(tmp_path):
    for seed in (0, 1):
        synthetic.write_checkpoint(tmp_path / str(seed), PLAIN, seed=seed, tokenizer=False)
    first, second = (read_tensors(tmp_path / str(seed)) for seed in (0, 1))
    assert all(not np.array_equal(first[name], second[name]) for name in first)


def test_bfloat16_keeps_the_correction_bias_in_float32(folder, tmp_path):
    synthetic.write_checkpoint(tmp_path, TINY, seed=1, dtype="bfloat16")
    assert ModelConfig.from_hf(tmp_path) == replace(TINY, dtype="bfloat16")
    exact, found = read_tensors(folder), read_tensors(tmp_path)
    dtypes = {name: array.dtype.name for name, array in found.items()}
    assert {n for n, d in dtypes.items() if d == "float32"} == {n for n in found if "bias" in n} - {
        n for n in found if n.endswith("proj.bias")
    }
    assert np.array_equal(found[BIAS], exact[BIAS])
    assert set(dtypes.values()) == {"bfloat16", "float32"}


def test_bias_is_near_seven_and_finer_than_bfloat16(folder):
    bias = read_tensors(folder)[BIAS]
    assert np.all(np.abs(bias - 7) < 1)
    assert len(set(bias.tolist())) == TINY.n_routed_experts
    assert not np.array_equal(bias, bias.astype("bfloat16").astype(np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16', expected one of bfloat16, float32"),
        ({"shards": 0}, "shards is 0, expected 1 to"),
        ({"config": release("zai-org/GLM-4.5-FP8")}, "quantised"),
        ({"config": replace(TINY, vocab_size=276)}, "vocab_size 276 cannot hold 256 bytes"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        synthetic.write_checkpoint(tmp_path / "out", **({"config": TINY} | options))
    assert not (tmp_path / "out").exists()


# The tokenizer


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    tokenizer = synthetic.make_tokenizer(512)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(st.lists(st.sampled_from([*synthetic.SPECIAL_TOKENS, "hello the", "é", "\n"]), max_size=8))
def test_special_tokens_are_single_ids_anywhere(parts):
    tokenizer = synthetic.make_tokenizer(512)
    tokens = tokenizer.encode("".join(parts)).tokens
    specials = [part for part in parts if part in synthetic.SPECIAL_TOKENS]
    assert [token for token in tokens if token in synthetic.SPECIAL_TOKENS] == specials


@pytest.mark.parametrize("vocab_size", [277, 512, 953, 2048])
def test_every_token_lies_below_the_vocabulary_size(vocab_size):
    tokenizer = synthetic.make_tokenizer(vocab_size)
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(len(ids)))
    assert len(ids) == min(vocab_size, 256 + 26 * 26 + 21)


def test_decoding_drops_control_tokens_and_keeps_what_the_model_writes():
    tokenizer = synthetic.make_tokenizer(512)
    ids = tokenizer.encode("<|assistant|>\n<think>why</think>\n<tool_call>f</tool_call>").ids
    assert tokenizer.decode(ids) == "\n<think>why</think>\n<tool_call>f</tool_call>"


# The chat template

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "\nanswer", "reasoning_content": "reason"}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "find", "arguments": {"q": "é <a>", "n": [1]}}},
        {"type": "function", "function": {"name": "ping", "arguments": {}}},
    ],
}
TOOL = {"type": "function", "function": {"name": "find", "description": "é", "b": 1, "a": 2}}
RESULTS = [{"role": "tool", "content": "R1"}, {"role": "tool", "content": "R2"}]
CALL_TEXT = (
    "\n<tool_call>find\n<arg_key>q</arg_key>\n<arg_value>é <a></arg_value>\n"
    "<arg_key>n</arg_key>\n<arg_value>[1]</arg_value>\n</tool_call>\n<tool_call>ping\n</tool_call>"
)
RESULT_TEXT = (
    "<|observation|>\n<tool_response>\nR1\n</tool_response>\n<tool_response>\nR2\n</tool_response>"
)
CASES = {
    "thinking": ([USER], {}, "<|user|>\nhi<|assistant|>"),
    "thinking asked for": ([USER], {"enable_thinking": True}, "<|user|>\nhi<|assistant|>"),
    "no thinking": (
        [USER],
        {"enable_thinking": False},
        "<|user|>\nhi/nothink<|assistant|>\n<think></think>",
    ),
    "no thinking, said already": (
        [{"role": "user", "content": "hi/nothink"}],
        {"enable_thinking": False},
        "<|user|>\nhi/nothink<|assistant|>\n<think></think>",
    ),
    "no generation": ([USER], {"add_generation_prompt": False}, "<|user|>\nhi"),
    "system": (
        [{"role": "system", "content": "be brief"}, USER],
        {},
        "<|system|>\nbe brief<|user|>\nhi<|assistant|>",
    ),
    "parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, "b"]}],
        {},
        "<|user|>\nab<|assistant|>",
    ),
    "an earlier turn loses its reasoning": (
        [USER, ANSWER, USER],
        {},
        "<|user|>\nhi<|assistant|>\n<think></think>\nanswer<|user|>\nhi<|assistant|>",
    ),
    "a turn after the last question keeps it": (
        [USER, ANSWER],
        {"add_generation_prompt": False},
        "<|user|>\nhi<|assistant|>\n<think>reason</think>\nanswer",
    ),
    "reasoning inside the content": (
        [USER, {"role": "assistant", "content": "\n<think>\nwhy\n</think>\nyes"}],
        {"add_generation_prompt": False},
        "<|user|>\nhi<|assistant|>\n<think>why</think>\nyes",
    ),
    "calls and results": (
        [USER, CALLS, *RESULTS],
        {},
        f"<|user|>\nhi<|assistant|>\n<think></think>{CALL_TEXT}{RESULT_TEXT}<|assistant|>",
    ),
    "two runs of results": (
        [USER, CALLS, RESULTS[0], ANSWER, RESULTS[1]],
        {},
        f"<|user|>\nhi<|assistant|>\n<think></think>{CALL_TEXT}"
        "<|observation|>\n<tool_response>\nR1\n</tool_response>"
        "<|assistant|>\n<think>reason</think>\nanswer"
        "<|observation|>\n<tool_response>\nR2\n</tool_response><|assistant|>",
    ),
}


def to_json(value, ensure_ascii=True):
    """What chat templates mean by `tojson`: no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii)


def render(**context) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = to_json
    template = environment.from_string(synthetic.CHAT_TEMPLATE.read_text("utf-8"))
    return template.render(**context)


@pytest.mark.parametrize("case", CASES)
def test_template(case):
    messages, options, expected = CASES[case]
    context = {"messages": messages, "add_generation_prompt": True} | options
    assert render(**context) == "[gMASK]<sop>" + expected


def test_tools_come_first_one_a_line_in_the_clients_key_order():
    text = render(messages=[{"role": "system", "content": "s"}, USER], tools=[TOOL, TOOL])
    line = '{"type": "function", "function": {"name": "find", "description": "é", "b": 1, "a": 2}}'
    assert text.startswith("[gMASK]<sop><|system|>\n")
    assert f"<tools>\n{line}\n{line}\n</tools>" in text
    assert text.endswith("<|system|>\ns<|user|>\nhi")


# Against transformers


@pytest.mark.parity
@pytest.mark.parametrize("config", [TINY, PLAIN], ids=["tiny", "plain"])
def test_transformers_loads_it(tmp_path, config):
    import torch
    from transformers import Glm4MoeForCausalLM

    synthetic.write_checkpoint(tmp_path, config)
    model, report = Glm4MoeForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith("model.layers.4.") for name in report["unexpected_keys"])
    input_ids = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (2, 32)))
    with torch.no_grad():
        logits = model(input_ids).logits
    assert torch.isfinite(logits).all()
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(-1).flatten().tolist())) > 8


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_transformers_renders_the_same_prompt(folder, case):
    from transformers import AutoTokenizer

    messages, options, expected = CASES[case]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True} | options
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert text == "[gMASK]<sop>" + expected
    ours = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=False) == ours
