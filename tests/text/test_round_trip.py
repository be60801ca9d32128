"""What a chat template writes of an answer is read back as it was."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling import NANO, TAG_IDS, TAGGED, Chunks, bytes_of, marked, read

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.server.served import ServedModel
from glmjax.text.chat import ChatTemplate
from glmjax.text.grammar import Grammars, GrammarSpec
from glmjax.text.lexer import Tag
from glmjax.text.reader import Reading
from glmjax.text.schema_kinds import kind_of
from glmjax.text.thinking import Marks, Phase, Thinking
from glmjax.text.tool_grammar import tool_grammar

SERVED = ServedModel.load(NANO)
FORMS = {
    "glm45": ChatTemplate(CHAT_TEMPLATE.read_text("utf-8")),
    "glm47": ChatTemplate(CHAT_TEMPLATE.with_name("chat_template_47.jinja").read_text("utf-8")),
}
PIECES = [
    "a",
    "hi there",
    "\n",
    " ",
    "é",
    "🎉",
    "<",
    "</",
    "{",
    '"',
    "\\",
    "12",
    "null",
    "<arg_key>",
]
PIECES += ["</arg", "<tool_response>", "/nothink", "\u2028", "'", "\t"]
OF_CALLS = ["<tool_call>", "</tool_call>x", "</arg_key>", "<arg_value>"]


def texts(*more: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from([*PIECES, *more]), max_size=6).map("".join)


values = texts(*OF_CALLS, "<think>", "</think>") | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: (
        st.lists(inner | texts(), max_size=3)
        | st.dictionaries(texts(), inner | texts(), max_size=3)
    ),
    max_leaves=6,
)
names = st.sampled_from(["f", "get_weather", "mcp.files/read-1", "é"])
keys = st.sampled_from(["k", "n", "a b", "é", 'q"', "{", "", "0"])
calls = st.tuples(names, st.dictionaries(keys, values, max_size=4))
earlier = st.lists(
    st.sampled_from(
        [
            {"role": "user", "content": "hi <think>"},
            {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
            {"role": "system", "content": "be brief"},
            {"role": "tool", "content": "sunny"},
        ]
    ),
    max_size=3,
)


def schema_of(value: Any, typed: bool) -> dict[str, Any]:
    """A schema by which a value is what it is; none where it would be without."""
    try:
        looks_like = kind_of(json.loads(value)) if isinstance(value, str) else ""
    except (ValueError, RecursionError):
        looks_like = "string"
    return {"type": kind_of(value)} if typed or looks_like not in ("", "string") else {}


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=80)
@given(
    before=earlier,
    reasoning=texts(*OF_CALLS),
    content=texts("</arg_value>", "</tool_call>"),
    called=st.lists(calls, max_size=3),
    typed=st.booleans(),
    size=st.integers(1, 8),
    seed=st.integers(0, 99),
)
@example([], "", "hi", [("f", {"k": "123", "n": 123})], True, 1, 0)
def test_an_answer_is_read_back(
    form: str,
    before: list[dict[str, Any]],
    reasoning: str,
    content: str,
    called: list[tuple[str, dict[str, Any]]],
    typed: bool,
    size: int,
    seed: int,
):
    tool_calls = [
        {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for name, arguments in called
    ]
    last = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    asked = [*before, {"role": "user", "content": "hi"}]
    thinks = bool(reasoning) or (form == "glm45" and seed % 2 == 0)
    prompt = FORMS[form].render(asked, enable_thinking=thinks)
    whole = FORMS[form].render(
        [*asked, last | {"tool_calls": tool_calls}],
        enable_thinking=thinks,
        add_generation_prompt=False,
    )
    assert whole.startswith(prompt)
    answer = whole.removeprefix(prompt)
    # Of equal names the last has the schema, so each call is read with its own.
    tools = [
        {"properties": {k: schema_of(v, typed) for k, v in arguments.items()}}
        for _, arguments in called
    ]
    opening = SERVED.opening(TAGGED.encode(prompt))
    ids = TAGGED.encode(answer)
    assert TAGGED.encode(prompt) + ids == TAGGED.encode(whole)
    for wanted, (name, arguments) in enumerate(called):
        found = read(ids, Reading({name: tools[wanted]}), opening, steps=[size]).message.calls
        assert found[wanted].name == name
        assert json.loads(found[wanted].arguments) == arguments
    got = read(ids, Reading({}), opening, steps=[size]).message
    assert (got.reasoning, got.content) == (reasoning.strip(), content.strip())
    assert [call.name for call in got.calls] == [name for name, _ in called]


# Calls that a grammar forces

TOOL = {
    "type": "object",
    "properties": {"s": {"type": "string"}, "n": {"type": "boolean"}, "e": {"enum": ["x", 1]}},
    "required": ["s", "n"],
}
ENDS = SERVED.eos_token_ids


def nearness(token: int) -> int:
    """How fast a token leads to an end: the least is the fastest."""
    order = [*ENDS, *(TAG_IDS[t] for t in (Tag.END_THINK, Tag.END_CALL, Tag.END_VALUE))]
    return order.index(token) if token in order else len(order) + len(TAGGED.token_bytes(token))


@settings(max_examples=20)
@given(st.sampled_from(["glm45", "glm47"]), st.integers(0, 2**32))
def test_calls_that_a_grammar_forces_are_read(form: Any, seed: int):
    tool = {"type": "function", "function": {"name": "f", "parameters": TOOL}}
    tags = {tag.value: TAG_IDS[tag] for tag in Tag}
    lark = tool_grammar([tool], form, tags, least=1, most=2)
    size = SERVED.config.vocab_size
    inner = Grammars(TAGGED, size, ENDS).constraint(GrammarSpec("lark", lark))
    marks = Marks(TAG_IDS[Tag.THINK], TAG_IDS[Tag.END_THINK], bytes_of("\n")[0])
    constraint = Thinking(marks, size, Phase.BEFORE, inner, 5, ENDS)
    rng, ids = random.Random(seed), []
    while True:
        row = constraint.masks(())[0].view(np.uint8)
        choice = np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist()
        token = (
            rng.choice(choice)
            if rng.random() < 0.5 and len(ids) < 40
            else min(choice, key=nearness)
        )
        if token in ENDS:
            break
        constraint.advance([token])
        ids.append(token)
    got = read(ids, Reading({"f": TOOL}))
    assert got.message.content == ""
    assert got.reasoning_tokens <= 5
    assert 1 <= len(got.message.calls) <= 2
    for call in got.message.calls:
        arguments = json.loads(call.arguments)
        assert {"s", "n"} <= arguments.keys() <= {"s", "n", "e"}
        assert type(arguments["s"]) is str
        assert type(arguments["n"]) is bool
        assert arguments.get("e", 1) in ("x", 1)


def test_a_template_writes_what_a_tokenizer_marks():
    """The spelling that the other tests use is the template's."""
    text = FORMS["glm47"].render([{"role": "user", "content": "hi"}])
    assert marked(text)[-1] is Tag.THINK
    assert Chunks(TAGGED).encode(text)[-1] == TAG_IDS[Tag.THINK]
