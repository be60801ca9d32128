"""Grammars of tool calls: whatever walk a model takes, arguments are what the schemas allow."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tool_walks import (
    CALL,
    END_CALL,
    END_KEY,
    END_VALUE,
    IDS,
    KEY,
    TOKENIZER,
    VALUE,
    check,
    compiled,
    letters,
    of,
    spelled,
    takes,
    tool,
    walk,
)

from glmjax.text.tool_grammar import TAGS, tool_grammar

seeds = st.integers(0, 2**32)
forms = st.sampled_from(["glm45", "glm47"])


def takes_value(schema: Any, value: str, root: dict[str, Any] | None = None) -> bool:
    grammar = tool_grammar([tool(of({"k": schema}, "k") | (root or {}))], "glm47", IDS, least=1)
    begin, end = spelled(CALL, "f", KEY, "k", END_KEY, VALUE), spelled(END_VALUE, END_CALL)
    return takes(grammar, [*begin, *letters(value), *end])


# Random tools

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
strings = st.one_of(
    st.just({"type": "string"}),
    st.fixed_dictionaries(
        {"type": st.just("string"), "minLength": st.integers(0, 3), "maxLength": st.integers(3, 9)}
    ),
    st.builds(lambda values: {"type": "string", "enum": values}, st.lists(words, min_size=1)),
    st.builds(lambda value: {"const": value}, words),
    st.sampled_from(["^a|x$", r"\d{2}", "^[^/]+/x$", "^é", r"^(\w|-)*$", "1.?x"]).map(
        lambda pattern: {"type": "string", "pattern": pattern}
    ),
    st.sampled_from(
        [
            {"type": ["string", "null"], "maxLength": 4},
            {"anyOf": [{"type": "string", "pattern": "^x"}, {"type": "null"}]},
            {"anyOf": [{"type": "string"}, {"type": "number"}]},
            {"enum": ["a", None, 'q"', "", "\n"]},
            {"enum": ["true", "b", True, 3]},
            {"oneOf": [{"const": "x"}, {"const": 1}, {"enum": ["y"]}]},
            {"$ref": "#/$defs/word"},
            {},
            True,
        ]
    ),
)
scalars = st.one_of(
    st.fixed_dictionaries(
        {"type": st.just("integer"), "minimum": st.integers(0, 4), "maximum": st.integers(4, 99)}
    ),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"enum": [1, None, [True]]},
            {"$ref": "#/$defs/tree"},
            {"properties": {"x": {"type": "integer"}}, "additionalProperties": False},
        ]
    ),
)
values = st.recursive(
    strings | scalars,
    lambda inner: st.one_of(
        st.builds(lambda x: {"type": "array", "items": x, "maxItems": 2}, inner),
        st.builds(
            lambda x, y: of({"description": x, "b b": y}, "b b", additionalProperties=False),
            inner,
            inner,
        ),
        st.builds(lambda x: {"allOf": [x], "title": "t", "default": 1}, inner),
    ),
    max_leaves=4,
)
DEFINITIONS = {
    "word": {"type": "string", "enum": ["one", "two"], "description": "d"},
    "tree": of({"in": {"$ref": "#/$defs/tree"}, "w": {"$ref": "#/$defs/word"}}),
}
NAMES = ["a", "ab", "b b", "ü", 'q"', "</arg_key>"]


@st.composite
def parameter_schemas(draw: st.DrawFn) -> dict[str, Any] | None:
    properties = draw(st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
    required = (
        draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    )
    further = draw(st.sampled_from([None, False, {"type": "boolean"}, {"type": "string"}]))
    more = {} if further is None else {"additionalProperties": further}
    schema = of(properties, *required, **more, **{"$defs": DEFINITIONS})
    return draw(st.sampled_from([schema, schema, schema, None, {}]))


@st.composite
def toolsets(draw: st.DrawFn) -> list[dict[str, Any]]:
    names = draw(st.lists(st.sampled_from(["f", "fg", "get-x", "é\\"]), min_size=1, unique=True))
    return [tool(draw(parameter_schemas()), name) for name in names]


@settings(max_examples=100, deadline=None)
@given(toolsets(), forms, seeds, st.integers(1, 2), st.integers(0, 1) | st.none())
@example([tool(of({}), "open")], "glm45", 0, 2, None)
def test_walks_are_valid_calls(
    tools: list[dict[str, Any]], form: Any, seed: int, least: int, more: int | None
):
    most = None if more is None else least + more
    grammar = tool_grammar(tools, form, IDS, least=least, most=most)
    count = check(walk(compiled(grammar), seed), form, tools)
    assert least <= count <= (most or count)


@settings(max_examples=60, deadline=None)
@given(toolsets(), forms, seeds)
def test_text_may_come_before_calls(tools: list[dict[str, Any]], form: Any, seed: int):
    tokens = walk(compiled(tool_grammar(tools, form, IDS, text=True)), seed)
    first = tokens.index(IDS[CALL]) if IDS[CALL] in tokens else len(tokens)
    text = b"".join(map(TOKENIZER.token_bytes, tokens[:first])).decode()
    assert TOKENIZER.special_ids.isdisjoint(tokens)
    assert not any(tag in text for tag in TAGS)
    assert first == len(tokens) or check(tokens[first:], form, tools)


# What exactly is taken


TEXTS = ["", "<", "a</", "</arg_value", "</arg_valu>", '"quoted"', "a\n\n b\t", "🙂é", "1", "{"]
TEXTS += ["<tool_call>", "</tool_call>", "</arg_key>", "</think>", "\0\x7f", "<<</arg_value"]


@pytest.mark.parametrize("value", [*TEXTS, "/nothink"])
def test_strings_are_verbatim(value: str):
    assert takes_value({"type": "string"}, value)


@pytest.mark.parametrize("value", ["</arg_value>", "a</arg_value>b", "<</arg_value></arg_value"])
def test_strings_do_not_hold_their_end(value: str):
    assert not takes_value({"type": "string"}, value)


PLAIN = {"a": {"type": "integer"}}
VALUES: list[tuple[Any, list[str], list[str]]] = [
    ({"enum": ["a", "ab", 'q"\n\\', "🙂", ""]}, ["a", "ab", 'q"\n\\', "🙂", ""], ["b"]),
    ({"const": "123"}, ["123"], ['"123"', "12"]),
    ({"enum": ["a", None]}, ["a", "null"], ['"a"', "b", ""]),
    ({"enum": ["null", "x", None]}, ["null", "x"], ['"null"']),
    ({"enum": ["1", 1, "2"]}, ["1"], ["2", '"2"']),
    ({"enum": ["a", "b"], "const": "b"}, ["b"], ["a"]),
    ({"enum": ["a", "b"], "allOf": [{"enum": ["b", "c"]}]}, ["b"], ["a", "c"]),
    ({"enum": ["\x7f"]}, ["\x7f"], ["a"]),
    ({"type": "string", "enum": ["a", None, 1]}, ["a"], ["null", "1"]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab", "üüü"], ["a", "abcd"]),
    ({"type": "string", "minLength": "2", "maxLength": -1}, ["", "abc"], []),
    ({"type": "string", "maxLength": 10**12}, ["abc"], []),
    ({"type": "string", "minLength": 4000}, ["abc"], []),
    ({"type": "array", "items": {"type": "string", "minLength": 4000}}, ['["abc"]'], ["[1]"]),
    ({"type": "string", "minLength": 3, "maxLength": 2}, ["abc", ""], []),
    ({"type": "string", "pattern": "^abc$", "maxLength": 2}, ["abc", "ab"], []),
    ({"type": "string", "pattern": ".{900}x.{900}"}, ["abc"], []),
    ({"type": "string", "pattern": "^a{2,300}$"}, ["aaa"], ["a"]),
    ({"type": "string", "minLength": 2, "allOf": [{"minLength": 3}]}, ["abc"], ["ab"]),
    ({"type": "string", "maxLength": 3, "allOf": [{"maxLength": 2}]}, ["ab"], ["abc"]),
    ({"type": "string", "pattern": "b+"}, ["b", "abba", "\nb"], ["", "a"]),
    ({"type": "string", "pattern": "^b|c$"}, ["ba", "ac", "b"], ["ab", "ca"]),
    ({"type": "string", "pattern": "^(a|b/)$"}, ["a", "b/"], ["b", "aa"]),
    ({"type": "string", "pattern": r"^\d[\w/]$"}, ["1a", "2/", "3_"], ["٣a", "1é"]),
    ({"type": "string", "pattern": r"^[[&&]$"}, ["[", "&"], ["a"]),
    ({"type": "string", "pattern": r"^\[a|b\]$"}, ["[ac", "cb]"], ["b]c"]),
    ({"type": "string", "pattern": "a(?=b)"}, ["anything"], []),
    ({"type": "string", "pattern": "(a"}, ["anything"], []),
    ({"type": "string", "pattern": "a?" * 9999 + "b"}, ["anything"], []),
    ({"items": {"type": "string", "pattern": "a?" * 9999 + "b"}}, ['["anything"]'], []),
    ({"type": "string", "pattern": "a\x7f\n\r/[/]"}, ["a\x7f\n\r//"], ["a"]),
    ({"type": "string", "pattern": "\ud83d"}, ["anything"], []),
    ({"type": "string", "pattern": 3}, ["anything"], []),
    ({"type": "string", "pattern": "^a", "allOf": [{"pattern": "b$"}]}, ["acb"], ["a", "b"]),
    ({"type": ["string", "null"]}, ["null", "anything"], []),
    ({"type": ["string", "null"], "maxLength": 5}, ["null", "abcde"], ["abcdef"]),
    ({"type": "string", "nullable": True, "enum": ["a"]}, ["a"], ["b"]),
    ({"anyOf": [{"const": "a"}, {"type": "boolean"}]}, ["a", "true", "false"], ["b", "null"]),
    ({"anyOf": [{"const": "a"}, {"$ref": "#/$defs/s"}]}, ["a", "s"], ["b"]),
    ({"anyOf": [{"type": "string"}, {"type": "integer"}]}, ["1", "1.5", "x"], []),
    ({"anyOf": [{"enum": ["a"]}, {"type": "integer"}]}, ["a", "1"], []),
    ({"anyOf": [{"const": str(i)} for i in range(100)]}, ["7", "999"], []),
    ({"anyOf": [{"const": "a"}, {"anyOf": [{"const": "b"}]}]}, ["a", "b"], ["c"]),
    ({"allOf": [{"$ref": "#/$defs/s"}], "description": "d"}, ["s"], ["a"]),
    ({}, ["x", "1", "{"], []),
    (True, ["x", "1"], []),
    (3, ["x", "1"], []),
    ({"type": "integer"}, ["1", "-20"], ["1.5", '"1"', "x", "", " 1", "1 "]),
    ({"type": "boolean"}, ["true"], ["True", "1"]),
    ({"type": "integer", "nullable": True}, ["1", "null"], ["x"]),
    ({"type": ["integer", "null"]}, ["1", "null"], ["x"]),
    ({"enum": [1, None, {"a": []}]}, ["1", "null", '{"a":[]}'], ["2", '"1"']),
    ({"type": "array", "items": {"type": "string"}}, ['["a", "b"]', "[]"], ["a", "[1]"]),
    ({"items": {"type": "integer"}}, ["[1]"], ["1", "x"]),
    ({"properties": {"a": {"properties": {}}}}, ["{}", '{"a": {}}'], ['"x"', '{"a": 1}']),
    ({"type": "array", "items": {"type": "integer", "nullable": True}}, ["[1, null]"], ['["a"]']),
    ({"type": "array", "items": {"pattern": "a(?=b)"}}, ['["x"]'], ["[1]"]),
    ({"type": "array", "items": {"$ref": "#/properties/k"}}, ["[[], [[]]]"], ["[1]"]),
    ({"properties": {"title": {"const": 1, "title": 2}}}, ['{"title": 1}'], ['{"title": 2}']),
    ({"type": "array", "items": [{"type": "null"}]}, ["[null]"], []),
    (of({"a": {"type": "null"}}), ["{}", '{"a": null}'], ['{"b": 1}']),
    ({"type": "array", "items": of(PLAIN)}, ['[{"a": 1}]'], ['[{"b": 1}]']),
    (of({"a": of(PLAIN)}), ['{"a": {"a": 1}}'], ['{"a": {"b": 1}}']),
    (of(PLAIN, additionalProperties=True), ['{"a": 1, "b": 1}'], ['{"a": "x"}']),
    (of(PLAIN, patternProperties={"^b": {}}), ['{"a": 1, "b": 1}'], ['{"a": "x"}']),
    (of(PLAIN, "b"), ['{"a": 1, "b": 1}'], ['{"a": 1}']),
    (of({}), ['{"b": 1}'], ["[]"]),
    (of({"a": of({}, additionalProperties=True), "c": of(PLAIN)}), ['{"a": {"b": 1}}'], ["[]"]),
    ({"allOf": [{"$ref": "#/$defs/base"}, of({"b": {"type": "null"}}, "b")]},
     ['{"a": 1, "b": null}'], ['{"a": 1}']),
    ({"allOf": [{"$ref": "#/$defs/base"}], "title": "t"}, ['{"a": 1}'], ['{"b": 1}']),
    ({"type": "array", "items": {"$ref": "#/$defs/base"}}, ['[{"a": 1}]'], ['[{"b": 1}]']),
    ({"type": "array", "items": {"anyOf": [of(PLAIN, "a"), {"type": "null"}]}},
     ['[{"a": 1}, null]'], ['[{"a": 1, "b": 1}]']),
    (of({"b": {"type": "null"}}, "b", anyOf=[of(PLAIN, "a")]), ['{"b": null, "a": 1}'], []),
    ({"$ref": "#/$defs/list"}, ["[]", "[[], [[]]]"], ["[1]", "x"]),
    ({"$ref": "#/$defs/a~1b%25"}, ["1"], ["x"]),
    ({"allOf": [{"type": "integer"}, {"minimum": 5}]}, ["5"], ["4"]),
    ({"allOf": [{"type": ["array", "null"]}, {"minItems": 1}]}, ["null", "[1]"], ["[]", "1"]),
    ({"$ref": "#/$defs/node"}, ["{}", '{"in": {}}'], ['"x"', '{"in": 1}']),
    ({"uniqueItems": True, "items": {"format": "odd", "type": "string"}}, ["[]"], ["1"]),
]  # fmt: skip
ROOT = {
    "$defs": {
        "s": {"enum": ["s"]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/list"}},
        "a/b%": {"type": "integer"},
        "base": of({"a": {"type": "integer"}}),
        "node": {"properties": {"in": {"$ref": "#/$defs/node"}}},
    }
}


@pytest.mark.parametrize(
    ("schema", "taken", "refused"), VALUES, ids=[str(v[0])[:80] for v in VALUES]
)
def test_values(schema: Any, taken: list[str], refused: list[str]):
    assert [value for value in taken if not takes_value(schema, value, ROOT)] == []
    assert [value for value in refused if takes_value(schema, value, ROOT)] == []


def test_unions_too_deep_to_be_taken_apart():
    deep: Any = {"const": "a"}
    for _ in range(20):
        deep = {"anyOf": [deep]}
    assert takes_value({"anyOf": [{"const": "b"}, deep]}, "a")


def takes_pairs(parameters: Any, pairs: dict[str, str]) -> bool:
    grammar = tool_grammar([tool(parameters)], "glm47", IDS, least=1)
    parts = chain(*([KEY, k, END_KEY, VALUE, v, END_VALUE] for k, v in pairs.items()))
    return takes(grammar, spelled(CALL, "f", *parts, END_CALL))


ONE = {"a": {"type": "integer"}}
TWO = {"b": {"type": "null"}}
BOTH = {"a": "1", "b": "null"}
EITHER = [{"required": ["a"]}, {"required": ["b"]}]
OPEN = {"type": "object", "additionalProperties": {"type": "integer"}}
BY_PATTERN = {
    "type": "object",
    "patternProperties": {"^n_": {"type": "integer"}},
    "additionalProperties": {"type": "null"},
}
PAIRS: list[tuple[Any, list[dict[str, str]], list[dict[str, str]]]] = [
    (of(ONE), [{}, {"a": "1"}], [{"b": "1"}, {"a": "x"}]),
    (of(ONE, additionalProperties=True), [{"a": "1", "b": "x", "ab": ""}], [{"b": "x", "a": "1"}]),
    (of(ONE, additionalProperties={"type": "null"}), [{"b": "null"}], [{"b": "1"}]),
    (OPEN, [{}, {"x y": "1", "ü": "2"}], [{"x": "a"}, {"x\ny": "1"}, {" x": "1"}, {"": "1"}]),
    ({"type": "object"}, [{}, {"x": "a"}], []),
    ({"type": "object", "additionalProperties": False}, [{}], [{"x": "a"}]),
    (of({}), [{}], [{"x": "a"}]),
    (None, [{}], [{"x": "a"}]),
    ({}, [{}], [{"x": "a"}]),
    (3, [{}], [{"x": "a"}]),
    (of(ONE, "a", "b"), [{"a": "1", "b": "x"}], [{"a": "1"}, {"b": "x"}]),
    (of({"a": False, "b": {}}), [{"b": "x"}], [{"a": "x"}]),
    (BY_PATTERN, [{"n_x": "1", "x": "null"}], [{"n_x": "null"}, {"x": "1"}]),
    ({"$ref": "#/$defs/p", "$defs": {"p": of(ONE, "a")}}, [{"a": "1"}], [{}, {"b": "1"}]),
    ({"allOf": [of(ONE), of(TWO, "b")]}, [BOTH], [{"a": "1"}]),
    ({"allOf": [of(ONE), of({"a": {"minimum": 5}})]}, [{"a": "5"}], [{"a": "4"}]),
    (of(ONE | TWO, anyOf=EITHER), [{"a": "1"}, {"b": "null"}, BOTH], [{}]),
    ({"oneOf": [of(ONE, "a"), of(TWO, "b")]}, [{"a": "1"}, {"b": "null"}], [{}, BOTH]),
    (of(ONE, "a", anyOf=[of({f"k{i}": {}}, f"k{i}") for i in range(70)]),
     [{"a": "1", "k69": "x"}, {"a": "1"}], [{"k69": "x"}]),
    ({"properties": 3, "required": 4, "anyOf": 5, "$ref": 6}, [{}], []),
    ({"anyOf": [{"$ref": "#"}], "properties": ONE}, [{"a": "1"}], [{"a": "x"}]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "taken", "refused"), PAIRS, ids=[str(p[0]) for p in PAIRS])
def test_arguments(schema: Any, taken: list[dict[str, str]], refused: list[dict[str, str]]):
    assert [pairs for pairs in taken if not takes_pairs(schema, pairs)] == []
    assert [pairs for pairs in refused if takes_pairs(schema, pairs)] == []
