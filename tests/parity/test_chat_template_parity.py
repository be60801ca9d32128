"""transformers, live: every conversation becomes the same prompt there and here."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.bundled import ASSET
from glmjax.errors import InvalidRequestError
from glmjax.text.chat import ChatTemplate
from glmjax.text.tool_results import in_call_order

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:::transformers")]

SOURCES = {
    "4.5": CHAT_TEMPLATE.read_text("utf-8"),
    "4.7": CHAT_TEMPLATE.with_name("chat_template_47.jinja").read_text("utf-8"),
    # keeps white space, and shows every field and variable there is
    "plain": "{{ bos_token }}{{ tools | tojson }}{% for m in messages %}[{{ m.role }}]{{ m.content "
    "}}{% generation %}{{ m.reasoning_content }}{% endgeneration %}</s>{{ m | tojson if not "
    "add_generation_prompt and m.role != 'assistant' }}{% endfor %}{{ documents }}",
}
PIECES = [
    *("a", "é", "日本", " ", "\n", "\t", "{", '"', "<", "</", "'", "\\", "{{ x }}", "/nothink"),
    *("<think>", "</think>", "<tool_call>", "</arg_value>", "<|user|>"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=6).map("".join) | st.text(max_size=5)
LEAVES = (
    TEXTS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False).filter(lambda number: abs(number) < 1e300)
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=3)
TOOLS = st.lists(
    st.fixed_dictionaries(
        {
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": TEXTS}, optional={"strict": st.booleans(), "parameters": OBJECTS}
            ),
        }
    ),
    max_size=3,
)
CALLS = st.lists(
    st.fixed_dictionaries(
        {
            "id": TEXTS,
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": TEXTS.filter(bool), "arguments": OBJECTS},
            ),
        }
    ),
    max_size=3,
)
MESSAGES = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "user"]), "content": TEXTS}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXTS},
        optional={"reasoning_content": TEXTS, "tool_calls": CALLS, "name": TEXTS},
    ),
    st.fixed_dictionaries(
        {"role": st.just("tool"), "content": TEXTS}, optional={"tool_call_id": TEXTS}
    ),
)
CONVERSATIONS = st.lists(MESSAGES, min_size=1, max_size=8)
VARIABLES = st.fixed_dictionaries(
    {"add_generation_prompt": st.booleans()},
    optional={
        "enable_thinking": st.booleans() | st.none(),
        "clear_thinking": st.booleans(),
        "reasoning_effort": st.sampled_from(["none", "high"]),
        "documents": st.none(),
    },
)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(ASSET)


def special_tokens(tokenizer) -> dict[str, str]:
    return {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}


def as_clients_send(draw, message: dict[str, Any]) -> dict[str, Any]:
    """The same message in one of the forms that APIs take."""
    sent = {**message, "content": draw(st.sampled_from(forms_of(message["content"])))}
    if message["role"] == "system":
        sent["role"] = draw(st.sampled_from(["system", "developer"]))
    if "tool_calls" in message and draw(st.booleans()):
        sent["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": json.dumps(arguments)}}
            for call in message["tool_calls"]
            for arguments in [call["function"]["arguments"]]
        ]
    nulls = ["refusal", "audio", "function_call", "annotations", "tool_calls", "reasoning"]
    return sent | dict.fromkeys(draw(st.sets(st.sampled_from(nulls))) - sent.keys())


def forms_of(text: str) -> list[Any]:
    half = len(text) // 2
    parts = [{"type": "text", "text": part} for part in (text[:half], text[half:])]
    return [text, parts, [{"type": "text", "text": text}], *([] if text else [None, []])]


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=100, deadline=None)
@given(messages=CONVERSATIONS, tools=st.none() | TOOLS, variables=VARIABLES, data=st.data())
def test_the_same_prompt(tokenizer, name, messages, tools, variables, data):
    theirs = tokenizer.apply_chat_template(
        in_call_order(messages), tools, chat_template=SOURCES[name], tokenize=False, **variables
    )
    template = ChatTemplate(SOURCES[name], special_tokens(tokenizer))
    assert template.render(messages, tools=tools, **variables) == theirs
    if name != "plain":  # which shows what else is sent
        sent = [as_clients_send(data.draw, message) for message in messages]
        assert template.render(sent, tools=tools, **variables) == theirs


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=100, deadline=None)
@given(
    messages=CONVERSATIONS,
    text=TEXTS,
    thought=st.none() | TEXTS,
    variables=VARIABLES,
)
def test_the_same_prompt_to_continue(tokenizer, name, messages, text, thought, variables):
    final = {"role": "assistant", "content": text, "reasoning_content": thought}
    conversation, variables = [*messages, final], {**variables, "add_generation_prompt": False}
    template = ChatTemplate(SOURCES[name], special_tokens(tokenizer))
    try:
        ours = template.render(conversation, continue_final_message=True, **variables)
    except InvalidRequestError:
        ours = None
    try:
        theirs = tokenizer.apply_chat_template(
            conversation,
            chat_template=SOURCES[name],
            tokenize=False,
            continue_final_message=True,
            **variables,
        )
    except ValueError:
        theirs = None
    if ours is None and theirs is not None:  # they look for the text anywhere in the prompt
        assert not theirs.rstrip().endswith(text.strip())
    else:
        assert ours == theirs


@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}\n  {% generation %}\n  {{ m.content + loop.index | string }}\n"
        "  {%- endgeneration %}\n{% endfor %}",
        "{% set ns = namespace(a=1, self=2) %}{% generation %}{% set ns.a = 3 %}{% endgeneration %}"
        "{{ ns.a }}{{ ns.self }}{{ ns.b is defined }}",
        "{{ namespace({'b': 2}).b }}{{ dict(a=1) | tojson }}{{ dict.fromkeys('ab', 1) | tojson }}",
        "{{ dict([('a', 1)]) }}{{ dict.fromkeys([1]) }}{{ dict is callable }}",
        "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ other is defined }}",
        "{{ bos_token is defined }}{{ eos_token }}{{ add_generation_prompt }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 5 %}{% break %}{% endif "
        "%}{{ i }}{% endfor %}",
        "a\n  {% if true %}\n  b\n  {% endif %}\nc\n",
        "{{ {'é': '<&>', 'b': [none, 1.5]} | tojson(indent=2, sort_keys=true) }}",
        "{{ ['é'] | tojson(true) }}{{ {'a': 1} | tojson(separators=(',', ':')) }}",
        "{{ messages[0].thinking }}{{ messages[0].reasoning_content }}{{ messages[0].audio }}",
        "{{ messages | map(attribute='role') | join(',') }}{{ '%s!' | format('a') }}",
        "{{ '{} {x}'.format(1, x=2) }}{{ 'a' ~ 1 }}{{ '<b>' | e }}{{ messages[0] | tojson }}",
    ],
)
def test_the_same_dialect(tokenizer, source):
    message = {"role": "user", "content": "é ", "reasoning": "why", "audio": None, "name": "n"}
    theirs = tokenizer.apply_chat_template([message], chat_template=source, tokenize=False)
    template = ChatTemplate(source, special_tokens(tokenizer))
    assert template.render([message], add_generation_prompt=False) == theirs
