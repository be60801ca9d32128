"""Answers that follow a grammar, through each protocol, and when the grammar begins."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from live import Live, live
from smg_grpc_proto import sglang_scheduler_pb2 as pb

from glmjax.server.served import ServedModel
from glmjax.text.thinking import Phase
from glmjax.text.tokenizer import Tokenizer

HI: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "size": {"enum": ["s", "m"]}},
    "required": ["ok", "size"],
    "additionalProperties": False,
}
LARK = 'start: "a" /[0-9]{2}/'


def is_of_schema(text: str) -> bool:
    value = json.loads(text)
    return set(value) == {"ok", "size"} and value["ok"] in (True, False) and value["size"] in "sm"


def post(server: Live, path: str, body: dict[str, Any]) -> Any:
    with server.http as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


GRAMMARS: list[tuple[dict[str, Any], Any]] = [
    ({"regex": "a[bc]{1,3}d"}, lambda text: re.fullmatch("a[bc]{1,3}d", text)),
    ({"ebnf": LARK}, lambda text: re.fullmatch("a[0-9]{2}", text)),
    ({"json_schema": SCHEMA}, is_of_schema),
    ({"json_schema": json.dumps(SCHEMA)}, is_of_schema),
    ({"choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
    ({"guided_choice": ["yes", "no"]}, {"yes", "no"}.__contains__),
    ({"guided_json": SCHEMA}, is_of_schema),
    ({"guided_regex": "[0-9]"}, str.isdigit),
    ({"guided_grammar": LARK}, lambda text: re.fullmatch("a[0-9]{2}", text)),
    ({"structured_outputs": {"regex": "[0-9]", "choice": None}}, str.isdigit),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}.__contains__),
    ({"structured_outputs": {"json": SCHEMA}}, is_of_schema),
    ({"structured_outputs": {"grammar": LARK}}, lambda text: re.fullmatch("a[0-9]{2}", text)),
]
FORMATS: list[tuple[dict[str, Any], Any]] = [
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            }
        },
        is_of_schema,
    ),
]


@pytest.mark.parametrize(("fields", "holds"), GRAMMARS + FORMATS)
def test_openai(server: Live, fields: dict[str, Any], holds: Any):
    common = fields | {"max_tokens": 200, "n": 3, "seed": 1}
    answer = post(server, "/v1/completions", common | {"prompt": "hi"})
    for choice in answer["choices"]:
        assert holds(choice["text"])
        assert choice["finish_reason"] == "stop"
        assert choice["matched_stop"] in server.frontend.served.eos_token_ids
    body = common | {"messages": HI, "enable_thinking": False}
    for choice in post(server, "/v1/chat/completions", body)["choices"]:
        assert holds(choice["message"]["content"])


@pytest.mark.parametrize(("fields", "holds"), GRAMMARS)
def test_generate(server: Live, fields: dict[str, Any], holds: Any):
    sampling = fields | {"max_new_tokens": 200}
    answers = post(server, "/generate", {"text": ["hi", "ho"], "sampling_params": sampling})
    assert all(holds(answer["text"]) for answer in answers)


@pytest.mark.parametrize(
    ("fields", "holds"),
    [
        ({"regex": "a[bc]{1,3}d"}, lambda text: re.fullmatch("a[bc]{1,3}d", text)),
        ({"ebnf_grammar": LARK}, lambda text: re.fullmatch("a[0-9]{2}", text)),
        ({"json_schema": json.dumps(SCHEMA)}, is_of_schema),
    ],
)
def test_grpc(server: Live, fields: dict[str, Any], holds: Any):
    (answer,) = call(server, [80], fields)
    assert holds(server.frontend.served.tokenizer.decode(answer.complete.output_ids))
    assert answer.complete.finish_reason == "stop"


def call(
    server: Live, ids: list[int], fields: dict[str, Any], **request: Any
) -> list[pb.GenerateResponse]:
    sampling = pb.SamplingParams(max_new_tokens=200, **fields)
    tokenized = pb.TokenizedInput(input_ids=ids)
    with server.stub() as stub:
        return list(
            stub.Generate(
                pb.GenerateRequest(tokenized=tokenized, sampling_params=sampling, **request)
            )
        )


def test_text_is_no_grammar(server: Live):
    body = {"prompt": "hi", "temperature": 0, "max_tokens": 8}
    plain = post(server, "/v1/completions", body)["choices"]
    named = post(server, "/v1/completions", body | {"response_format": {"type": "text"}})
    assert named["choices"] == plain


def test_any_json_object(served: ServedModel):
    ends = list(served.eos_token_ids[:1])
    text = '{"a": [1, true]}'
    body = {"prompt": "hi", "max_tokens": 40, "response_format": {"type": "json_object"}}
    with live(served, script=served.tokenizer.encode(text) + ends) as server:
        assert post(server, "/v1/completions", body)["choices"][0]["text"] == text
    with live(served, script=served.tokenizer.encode("hello")) as server:
        assert post(server, "/v1/completions", body)["choices"][0]["text"].startswith("{")


UNIQUE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
LOOSE = {"nullable": True, "type": "object", "properties": {"a": UNIQUE}}


@pytest.mark.parametrize("strict", [{}, {"strict": False}, {"strict": None}])
def test_unknown_keywords_do_not_count(served: ServedModel, strict: dict[str, Any]):
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": LOOSE} | strict}
    body = {"prompt": "hi", "max_tokens": 40, "response_format": format_}
    for text in ("null", '{"a": [1, 1]}', '{"b": 1}'):
        script = served.tokenizer.encode(text) + list(served.eos_token_ids[:1])
        with live(served, script=script) as server:
            assert post(server, "/v1/completions", body)["choices"][0]["text"] == text


def of_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema} | more}}


def deep(levels: int) -> dict[str, Any]:
    return {"type": "array", "items": deep(levels - 1)} if levels else {"type": "null"}


# While the model thinks


@pytest.fixture(scope="module")
def thinking(served: ServedModel) -> Iterator[Live]:
    """A model that thinks, and then would say anything but yes."""
    with live(served, script=served.tokenizer.encode("\n<think>hm</think>nonsense")) as server:
        yield server


def test_thoughts_are_free(thinking: Live):
    body: dict[str, Any] = {"messages": HI, "choice": ["yes"], "max_tokens": 60}

    def said(**fields: Any) -> tuple[str | None, str]:
        answer = post(thinking, "/v1/chat/completions", body | fields)
        message = answer["choices"][0]["message"]
        return message["reasoning_content"], message["content"]

    assert said() == ("hm", "yes")
    whole = (None, "\n<think>hm</think>yes"), (None, "\n<think>hm</think>\nyes")
    assert said(separate_reasoning=False) in whole
    assert said(enable_thinking=False) == (None, "yes")
    history = [*HI, {"role": "assistant", "content": "<think>a</think>b"}, *HI]
    assert said(messages=history) == ("hm", "yes")


def test_plain_prompts_think_where_they_say_so(thinking: Live):
    body = {"choice": ["yes"], "max_tokens": 60}
    for prompt, text in (
        ("hi", "yes"),
        ("<|assistant|>", "yes"),
        ("<think>so", "\n<think>hm</think>yes"),
        ("<think>so</think>", "yes"),
    ):
        answer = post(thinking, "/v1/completions", body | {"prompt": prompt})
        assert answer["choices"][0]["text"] == text
        sampling = {"choice": ["yes"], "max_new_tokens": 60}
        native = post(thinking, "/generate", {"text": prompt, "sampling_params": sampling})
        assert native["text"] == text


def test_a_gateway_says_whether_the_model_thinks(thinking: Live):
    served = thinking.frontend.served
    ids = served.chat_prompt(HI)
    for reasoning, text in ((True, "\n<think>hm</think>yes"), (False, "yes")):
        (answer,) = call(thinking, ids, {"regex": "yes"}, require_reasoning=reasoning)
        assert served.tokenizer.decode(answer.complete.output_ids) == text


@settings(deadline=None)
@given(data=st.data(), thinks=st.booleans())
def test_where_the_answer_begins(served: ServedModel, data: st.DataObject, thinks: bool):
    marks = {name: served.tokenizer.token_id(name) for name in ("<|assistant|>", "<think>")}
    end = served.tokenizer.token_id("</think>")
    ids = data.draw(st.lists(st.sampled_from([5, end, *marks.values()]), max_size=8))
    text = served.tokenizer.decode(ids, skip_special_tokens=False)
    turn = text.split("<|assistant|>")[-1]
    if "<think>" in turn.split("</think>")[-1]:
        phase = Phase.THOUGHT
    else:
        phase = Phase.BEFORE if thinks and "</think>" not in turn else Phase.ANSWER
    assert served.phase(ids, thinks) is phase


def test_models_without_thoughts(served: ServedModel):
    letters = {letter: n for n, letter in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    backend.decoder = tokenizers.decoders.ByteLevel()
    assert replace(served, tokenizer=Tokenizer(backend)).phase([1, 2], True) is Phase.ANSWER


# Errors


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"regex": "("}, "regex", "unclosed"),
        ({"regex": "a", "choice": ["b"]}, "choice", "regex and choice ask for 2 grammars"),
        ({"ebnf": "root ::= x"}, "ebnf", "GBNF is not served"),
        ({"json_schema": {"type": "objec"}}, "json_schema", "objec"),
        ({"json_schema": "{"}, "json_schema", "JSON schema"),
        ({"json_schema": 5}, "json_schema", "dictionary or should be a valid string"),
        ({"choice": []}, "choice", "list of different strings"),
        (
            {"structured_outputs": {"choice": []}},
            "structured_outputs",
            "different strings: there is",
        ),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs", "GBNF is not"),
        (
            {"structured_outputs": {"json_object": True, "regex": "a"}},
            "structured_outputs",
            "structured_outputs ask for 2 grammars",
        ),
        ({"choice": "yes"}, "choice", "valid list"),
        ({"response_format": {"type": "xml"}}, "response_format", "'xml'"),
        ({"response_format": {}}, "response_format", "text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "no schema"),
        (of_format(UNIQUE, strict=True), "response_format", "uniqueItems"),
        (of_format({"type": "objec"}), "response_format", "objec"),
        (of_format(deep(400)), "response_format", "too deep"),
        (
            {"response_format": {"type": "json_object"}, "regex": "a"},
            "response_format",
            "regex and response_format",
        ),
    ],
)
def test_errors(server: Live, fields: dict[str, Any], param: str, words: str):
    with server.http as client:
        response = client.post("/v1/completions", json={"prompt": "hi"} | fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_grammar_that_does_not_compile_over_grpc(server: Live):
    with pytest.raises(grpc.RpcError) as caught:
        call(server, [1], {"regex": "("})
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "regex must be" in (caught.value.details() or "")
