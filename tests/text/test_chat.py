"""Chat templates: the dialect of transformers, and messages in every form that clients send."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.errors import CheckpointError, ConfigError, InvalidRequestError
from glmjax.text.chat import ChatTemplate
from glmjax.text.nesting import MAX_NESTING

GLM = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
GLM47 = ChatTemplate(CHAT_TEMPLATE.with_name("chat_template_47.jinja").read_text("utf-8"))
HI = {"role": "user", "content": "hi"}
OK = {"role": "assistant", "content": "ok"}
# Strict, as many templates of other models are.
STRICT = ChatTemplate(
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }}{% endfor %}"
    "{% for tool in tools or [] %}{{ tool.function.name + ',' }}{% endfor %}"
)


def render(source: str, messages=(HI,), **variables) -> str:
    return ChatTemplate(source).render(messages, **variables)


def call(arguments: Any = "{}", **function: Any) -> dict[str, Any]:
    return {"id": "1", "function": {"name": "f", "arguments": arguments} | function}


def calls(*tool_calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(tool_calls)}


def tool(name: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


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
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("a{% generation %}b{% set c = 1 %}{% endgeneration %}{{ c is defined }}", "abFalse"),
        ("{% set ns = namespace({'a': 1}, b=2) %}{% set ns.a = 3 %}{{ ns.a }}{{ ns.b }}", "32"),
        ("{{ dict(a=1) | tojson }}{{ dict.fromkeys('a') | tojson }}", '{"a": 1}{"a": null}'),
        ("{{ '{}'.format(1) }}{{ '%s' | format(2) }}{{ 'A' | attr('lower')() }}", "12a"),
    ],
)
def test_dialect(source: str, text: str):
    assert render(source, enable_thinking=False) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ ['a'] | map(attribute='__class__') | list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ lipsum.__globals__['os'].popen('id').read() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ namespace.__globals__ }}",
        "{{ dict.__call__ }}",
        "{{ self.__init__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
        "{{ ('{0.__class__}' | attr('format'))(1) }}",
        "{{ ['{0.__class__}'] | map('attr', 'format') | map('call', 1) | list }}",
        "{{ messages.append(1) }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages[0].pop('role') }}",
        "{{ dict.update(messages[0], role='x') }}",
        "{{ tools[0].setdefault('x', 1) }}",
        "{% set ns = namespace(_Namespace__attrs=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace({'__class__': 1}) }}",
        "{% include 'x' %}",
        "{% import '/etc/passwd' as x %}",
        "{{ range(10 ** 9) | list }}",
    ],
)
def test_a_way_out_of_the_sandbox_is_refused(source: str):
    template = ChatTemplate(source)
    messages, tools = [dict(HI)], [tool("f")]
    with pytest.raises(InvalidRequestError, match="the chat template refused it"):
        template.render(messages, tools=tools)
    assert (messages, tools) == ([HI], [tool("f")])


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
        (({"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}), "ab"),
        ([{"type": "refusal", "refusal": "no"}, "!"], "no!"),
    ],
)
@pytest.mark.parametrize("role", ["user", "assistant", "tool", "system"])
def test_content(role: str, content, text: str):
    assert render("{{ messages[0].content }}", [{"role": role, "content": content}]) == text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"a": "x", "n": 1}', "<arg_value>x</arg_value>\n<arg_key>n"),
        ({"n": [1, {"é": None}]}, '<arg_value>[1, {"é": null}]</arg_value>'),
        ('{"n": 1.0}', "<arg_value>1.0</arg_value>"),
        ("", "<tool_call>f\n</tool_call>"),
        (" ", "<tool_call>f\n</tool_call>"),
        (None, "<tool_call>f\n</tool_call>"),
        ({}, "<tool_call>f\n</tool_call>"),
    ],
)
def test_arguments_become_objects(arguments, text: str):
    assert text in GLM.render([HI, calls(call(arguments))])


def test_developer_is_system():
    assert GLM.render([{"role": "developer", "content": "x"}, HI]).startswith(
        "[gMASK]<sop><|system|>\nx<|user|>"
    )


@pytest.mark.parametrize(
    ("fields", "thought"),
    [
        ({"reasoning_content": "a", "reasoning": "b"}, "a"),
        ({"reasoning_content": None, "reasoning": "b"}, "b"),
        ({"reasoning": "b"}, "b"),
        ({"reasoning_content": "", "reasoning": "b"}, ""),
        ({"thinking": "c"}, "c"),
    ],
)
def test_names_of_a_thought(fields: dict, thought: str):
    prompt = GLM.render([HI, OK | fields], add_generation_prompt=False)
    assert prompt.endswith(f"<|assistant|>\n<think>{thought}</think>\nok")
    assert render("{{ messages[0].thinking }}", [OK | fields]) == thought


NULLS = dict.fromkeys(["audio", "function_call", "tool_calls", "refusal", "reasoning", "name"])


def test_fields_that_do_no_harm():
    extra = {"refusal": "no", "name": "n", "annotations": [], "tool_call_id": "1"}
    for message in (HI, OK, {"role": "tool", "content": "r"}):
        assert GLM.render([message | NULLS]) == GLM.render([message])
        assert GLM.render([message | extra]) == GLM.render([message])
    assert render("{{ messages[0] | tojson }}", [HI | NULLS]) == json.dumps(HI)


def test_tools_reach_the_template_as_they_are():
    given = {"zebra": 1, "type": "function", "function": {"name": "é", "b": None, "a": [{"d": 1}]}}
    text = render("{{ tools | tojson }}{{ tools | length }}", tools=[given, given])
    assert text == json.dumps([given, given], ensure_ascii=False) + "2"
    assert json.dumps(given, ensure_ascii=False) + "\n</tools>" in GLM.render([HI], tools=[given])
    assert GLM.render([HI], tools=[]) == GLM.render([HI], tools=None) == GLM.render([HI])


NESTED = "[" * 1000 + "]" * 1000


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("hi", "messages[1] is 'hi', expected an object"),
        (None, "messages[1] is None, expected an object"),
        ({"role": "robot", "content": "x"}, "messages[1].role is 'robot', expected one of"),
        ({"role": "user", "text": "x"}, "messages[1] has no content; it must have one"),
        ({"content": "x"}, "messages[1].role is None"),
        ({"role": ["user"], "content": "x"}, "messages[1].role is ['user']"),
        ({"role": "user", "content": 3}, "messages[1].content is 3, expected a string or a list"),
        ({"role": "user", "content": {"type": "text"}}, "messages[1].content is {"),
        ({"role": "user", "content": ["", 3]}, "messages[1].content[1] is 3, expected a text part"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text is None"),
        ({"role": "user", "content": [{"text": "x"}]}, "messages[1].content[0] is of type None"),
        ({"role": "user", "content": [{"type": []}]}, "messages[1].content[0] is of type []"),
        *(
            (
                {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": kind}]},
                f"messages[1].content[1] is of type '{kind}'; images, audio and files are not serv",
            )
            for kind in ("image_url", "input_audio", "file", "video_url")
        ),
        (OK | {"reasoning_content": ["x"]}, "messages[1].reasoning_content is ['x'], expected a s"),
        (OK | {"reasoning": 3}, "messages[1].reasoning is 3, expected a string"),
        (OK | {"tool_calls": {}}, "messages[1].tool_calls is {}, expected a list"),
        (calls(3), "messages[1].tool_calls[0] is 3, expected an object"),
        (calls({}), "messages[1].tool_calls[0].function is None, expected an object"),
        (calls(call(), call(name="")), "messages[1].tool_calls[1].function.name is '', expected"),
        (calls(call(name=3)), "messages[1].tool_calls[0].function.name is 3"),
        (calls({"function": {"arguments": "{}"}}), ".tool_calls[0].function.name is None"),
        (calls(call("[")), "messages[1].tool_calls[0].function.arguments is not a JSON object: Ex"),
        (calls(call(), call("[]")), "messages[1].tool_calls[1].function.arguments is [], expected"),
        (calls(call([])), ".tool_calls[0].function.arguments is [], expected a JSON object"),
        (calls(call(0)), ".tool_calls[0].function.arguments is 0, expected a JSON object"),
        (calls(call("null")), ".tool_calls[0].function.arguments is None, expected a JSON object"),
        (calls(call('{"a": NaN}')), ".tool_calls[0].function.arguments holds NaN, Infinity"),
        (calls(call('{"a": [{"b": 1e999}]}')), ".tool_calls[0].function.arguments holds NaN"),
        (calls(call({"a": (float("-inf"),)})), ".tool_calls[0].function.arguments holds NaN"),
        (
            calls(call(f'{{"a": {NESTED}}}')),
            ".tool_calls[0].function.arguments is nested more than",
        ),
        (
            calls(call("[" * 10**5)),
            ".tool_calls[0].function.arguments is nested more than",
        ),
        (calls(call({"a": "\ud800"}), call("\ud800")), ".tool_calls[1].function.arguments is not"),
    ],
)
def test_malformed_messages(message: Any, words: str):
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as caught:
        GLM.render([HI, message, HI])
    assert caught.value.param == "messages"
    str(caught.value).encode()


@pytest.mark.parametrize("kind", ["image_url", "input_image", "input_audio", "file", "document"])
def test_a_tool_may_answer_what_the_model_cannot_read(kind: str):
    """Agents send what they saw, and cannot take it back: the conversation goes on."""
    parts = [{"type": "text", "text": "Seen."}, {"type": kind, kind: {"url": "data:,secret"}}]
    asked = [HI, calls(call()), {"role": "tool", "tool_call_id": "0", "content": parts}]
    for template in (GLM, GLM47):
        text = template.render(asked)
        said = re.search(r"Seen\.\[(image|audio|file|document) not shown: [^\]]+\]", text)
        assert said is not None
        assert said[1] in kind
        assert "secret" not in text


@pytest.mark.parametrize("messages", ["hi", None, 3, {"role": "user"}])
def test_no_list_of_messages(messages: Any):
    with pytest.raises(InvalidRequestError, match="expected a list"):
        GLM.render(messages)


def test_no_messages():
    with pytest.raises(InvalidRequestError, match="send at least one message"):
        GLM.render([])


def test_as_deep_as_is_served():
    inner: Any = 1
    for _ in range(MAX_NESTING - 2):
        inner = [inner]
    assert "[1]" in GLM.render([HI, calls(call({"a": inner}))])
    with pytest.raises(InvalidRequestError, match="nested more"):
        GLM.render([HI, calls(call({"a": [inner]}))])


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("f", "tools is 'f', expected a list"),
        ({"f": 1}, "tools is {'f': 1}, expected a list"),
        ([tool("f"), "g"], r"tools[1] is 'g', expected an object"),
        ([tool("f"), tool("g"), tool(1), tool("h")], "tools[2]: the chat template refused it: uns"),
        ([tool("f"), {"type": "function"}], "tools[1]: the chat template refused it: 'dict object"),
    ],
)
def test_malformed_tools(tools: Any, words: str):
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as caught:
        STRICT.render([HI], tools=tools)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[5].content }}", "refused"),
        ("{{ 1 / 0 }}", "messages: the chat template refused it: division"),
        ("{{ raise_exception(messages[0].content * 999) }}", r"messages\[0\].*hihi\.\.\.$"),
        ("{{ raise_exception('\\ud800') }}", r"\\ud800"),
        ("{{ raise_exception('') }}", "it: TemplateError"),
        ("{{ messages[0].content.nothing.x }}", r"messages\[0\]: .*no attribute"),
    ],
)
def test_a_template_that_refuses(source: str, words: str):
    with pytest.raises(InvalidRequestError, match=words) as caught:
        render(source, add_generation_prompt=False)
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("messages", "bad"),
    [
        ([OK], 0),
        ([HI, HI], 1),
        ([HI, OK, HI, OK, OK, OK, HI], 4),
        ([HI, OK, HI, {"role": "tool", "content": "r"}, HI], None),
        ([HI, OK, {"role": "tool", "content": "r"}], 2),
    ],
)
def test_the_message_that_is_refused_is_named(messages: list, bad: int | None):
    if bad is None:
        STRICT.render(messages)
        return
    with pytest.raises(InvalidRequestError) as caught:
        STRICT.render(messages)
    assert str(caught.value) == (
        f"messages[{bad}]: the chat template refused it: roles must alternate"
    )
    assert caught.value.param == "messages"


def test_a_message_is_found_among_those_that_are_refused_for_other_reasons():
    source = (
        "{% if messages | selectattr('role', 'eq', 'user') | list | length == 0 %}"
        "{{ raise_exception('no question') }}{% endif %}"
        "{% for m in messages %}{{ m.content / 1 if m.content == 'bad' }}{% endfor %}"
    )
    system = {"role": "system", "content": "x"}
    with pytest.raises(InvalidRequestError, match=r"^messages\[4\]: .*unsupported operand"):
        render(source, [system, system, HI, OK, OK | {"content": "bad"}, OK])
    with pytest.raises(InvalidRequestError, match=r"^messages: .*no question"):
        render(source, [system])


@given(st.integers(1, 1000), st.data())
@settings(max_examples=30, deadline=None)
def test_it_is_found_in_a_few_renderings(size: int, data):
    bad, renderings = data.draw(st.integers(0, size - 1)), []
    messages: list[dict[str, Any]] = [HI] * size
    messages[bad] = OK
    source = (
        "{{ count(1) or '' }}{% for m in messages %}{{ 1 / (m.role == 'user') | int }}{% endfor %}"
    )
    with pytest.raises(InvalidRequestError, match=rf"^messages\[{bad}\]: .*division"):
        render(source, messages, count=renderings.append)
    assert len(renderings) <= 2 + (size - 1).bit_length()


FORM45 = "<tool_call>{{ f.name }}\n{% for k in f.arguments %}\n<arg_key>{{ k }}{% endfor %}"


def form(body: str) -> str:
    return "{% for m in messages %}{% for c in m.tool_calls or [] %}{% set f = c.function %}" + (
        f"{body}{{% endfor %}}{{% endfor %}}"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (CHAT_TEMPLATE.read_text("utf-8"), "glm45"),
        (CHAT_TEMPLATE.with_name("chat_template_47.jinja").read_text("utf-8"), "glm47"),
        (form(FORM45), "glm45"),
        (form(FORM45.replace("\n", "")), "glm47"),
        (form("<tool_call>{{ f.name }} <arg_key>"), None),
        (form("<tool_call>{{ f.name }}\n\n<arg_key>"), None),
        (form("<tool_call>{{ f | tojson }}</tool_call>"), None),
        (form("<tool_call>{{ f.name }}</tool_call>"), None),
        (form("{{ raise_exception('no tools') }}"), None),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
    ],
)
def test_the_form_of_calls(source: str, expected: str | None):
    assert ChatTemplate(source).call_form == expected


@pytest.mark.parametrize(
    ("source", "takes"),
    [
        (CHAT_TEMPLATE.read_text("utf-8"), True),
        ("{% for tool in tools %}{{ tool.function.name }}{% endfor %}", True),
        ("{% if tools %}tools{% endif %}", False),
        ("{{ raise_exception('no tools') if tools }}", False),
        ("{{ messages[0].content }}", False),
    ],
)
def test_whether_it_takes_tools(source: str, takes: bool):
    assert ChatTemplate(source).takes_tools is takes


TEXTS = st.text(st.characters(), max_size=4) | st.sampled_from(["\ud800", "</think>", "<think>"])
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
JUNK_PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image_url", "refusal"]) | JUNK}, optional={"text": TEXTS}
)
JUNK_CALLS = st.fixed_dictionaries(
    {
        "function": st.fixed_dictionaries(
            {"name": TEXTS | JUNK},
            optional={"arguments": st.dictionaries(TEXTS, JUNK).map(json.dumps) | JUNK},
        )
        | JUNK
    }
)
JUNK_MESSAGES = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
    optional={
        "content": TEXTS | st.lists(JUNK_PARTS | JUNK, max_size=3) | JUNK,
        "reasoning_content": TEXTS | JUNK,
        "reasoning": TEXTS | JUNK,
        "tool_calls": st.lists(JUNK_CALLS | JUNK, max_size=3) | JUNK,
    },
)


@pytest.mark.parametrize("template", [GLM, GLM47, STRICT], ids=["4.5", "4.7", "strict"])
@given(
    st.lists(JUNK_MESSAGES | JUNK, max_size=4) | JUNK,
    st.none() | st.lists(st.builds(tool, TEXTS) | JUNK, max_size=2) | JUNK,
    st.booleans(),
    st.dictionaries(st.sampled_from(["enable_thinking", "namespace", "bos_token"]), JUNK),
)
@settings(max_examples=200, deadline=None)
def test_junk_is_refused_and_nothing_else_happens(template, messages, tools, continued, variables):
    refusal = None
    try:
        template.render(messages, tools=tools, continue_final_message=continued, **variables)
    except InvalidRequestError as error:
        refusal = error
    if refusal:
        str(refusal).encode()
        assert refusal.param in ("messages", "tools", "continue_final_message")


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
