"""Chat templates: the dialect of transformers, and messages in every form that clients send."""

from __future__ import annotations

import json

import pytest

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.errors import CheckpointError, ConfigError, InvalidRequestError
from glmjax.text.chat import ChatTemplate

GLM = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
HI = {"role": "user", "content": "hi"}


def render(source: str, messages=(HI,), **variables) -> str:
    return ChatTemplate(source).render(messages, **variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a': '<é>', 'b': [1, true]} | tojson }}", '{"a": "<é>", "b": [1, true]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{{ {'a': 1} | tojson(indent=1) }}", '{\n "a": 1\n}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        (
            "{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "13",
        ),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),  # trim_blocks and lstrip_blocks
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages[0].content }}{{ add_generation_prompt }}", "hiTrue"),
        ("{{ enable_thinking }}{{ missing is defined }}", "FalseFalse"),
    ],
)
def test_dialect(source: str, text: str):
    assert render(source, enable_thinking=False) == text


def test_glm_prompt():
    assert GLM.render([HI]) == "[gMASK]<sop><|user|>\nhi<|assistant|>"
    off = GLM.render([HI], enable_thinking=False)
    assert off == "[gMASK]<sop><|user|>\nhi/nothink<|assistant|>\n<think></think>"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("a", "a"),
        (None, ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([], ""),
    ],
)
def test_content(content, text: str):
    assert render("{{ messages[0].content }}", [{"role": "user", "content": content}]) == text


def test_tool_calls_become_objects():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"a": "x", "n": 1}'}}
    messages = [HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    prompt = GLM.render(messages)
    assert "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>" in prompt
    assert "<arg_value>1</arg_value>" in prompt


def test_developer_is_system():
    assert GLM.render([{"role": "developer", "content": "x"}, HI]).startswith(
        "[gMASK]<sop><|system|>\nx<|user|>"
    )


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "robot", "content": "x"}, "role is 'robot', expected one of"),
        ({"content": "x"}, "role is None"),
        ({"role": ["user"], "content": "x"}, "role is"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "not served"),
        ({"role": "user", "content": [{"type": "text"}]}, "list of text parts"),
        ({"role": "user", "content": 3}, "list of text parts"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "["}}]}, "JSON object"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "[]"}}]}, "JSON object"),
        ({"role": "assistant", "tool_calls": [{}]}, "JSON object"),
    ],
)
def test_malformed_messages(message: dict, words: str):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        GLM.render([message])
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "refused"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_refuses(source: str, words: str):
    with pytest.raises(InvalidRequestError, match=words):
        render(source)


def test_a_template_that_does_not_compile():
    with pytest.raises(CheckpointError, match="does not compile"):
        ChatTemplate("{% if %}")


def test_where_it_comes_from(tmp_path):
    assert ChatTemplate.from_folder(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    tokens = {"bos_token": {"content": "<sop>"}, "eos_token": "<eop>", "unk_token": None}
    config.write_text(json.dumps({"chat_template": "{{ bos_token }}{{ eos_token }}", **tokens}))
    assert from_folder(tmp_path) == "<sop><eop>"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": "named"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert from_folder(tmp_path) == "named"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert from_folder(tmp_path) == "file"
    config.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        from_folder(tmp_path)


def from_folder(folder) -> str:
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    return template.render([HI])
