"""Arguments as JSON, whatever the values: typed by the schema, and strings verbatim."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from glmjax.bench.synthetic import CHAT_TEMPLATE
from glmjax.text.arguments import Arguments
from glmjax.text.chat import ChatTemplate
from glmjax.text.nesting import MAX_NESTING
from glmjax.text.schema_kinds import kind_of

KINDS = ["string", "number", "boolean", "null", "object", "array"]
NO_JSON = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e400",
    "1" * 400,
    "1" * 5000,
    "01",
    "+1",
    ".5",
]
NO_JSON += [
    "True",
    "None",
    "'a'",
    "{a: 1}",
    "[1,]",
    '{"a": 1',
    "1 2",
    '"\\ud800"',
    '{"\\udfff": 1}',
]
NO_JSON += [
    "",
    " ",
    "\ufeff1",
    "1\u00a0",
    '"\n"',
    '"\\x41"',
    "[" * 2000,
    "[" * 2000 + "]" * 2000,
    "\0",
]
AS_WRITTEN = ["1.50", "-0", "1E5", "1e-400", "123456789012345678901234567890", '{"a": 1, "a": 2}']
AS_WRITTEN += ["[1,\n 2]", '{"é": "\\u00e9"}', "true", "null", '{"<": "</arg_value>"}', '"\u2028"']
GLM = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))

chars = st.characters(exclude_categories=["Cs"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(chars), inner, max_size=3),
) | st.text(chars)
value_texts = st.one_of(
    st.sampled_from([*NO_JSON, *AS_WRITTEN]),
    json_values.map(json.dumps),
    json_values.map(lambda value: json.dumps(value, ensure_ascii=False, indent=1)),
    st.text(chars),
    st.text(' \n"\\{}[]:,0123456789.eE+-truefalsn<>/_arg'),
)
kind_sets = st.sets(st.sampled_from(KINDS), min_size=1).map(sorted)
schemas = st.none() | st.dictionaries(
    st.sampled_from("abc"),
    st.just({}) | kind_sets.map(lambda kinds: {"type": kinds}),
).map(lambda properties: {"type": "object", "properties": properties})


def write(
    parameters: Any, pairs: list[tuple[str, str]], size: int = 10**9, cut: bool = False
) -> str:
    """All that is written of arguments whose values come in pieces of a size."""
    arguments, pieces = Arguments(parameters), []
    for key, value in pairs:
        pieces.append(arguments.open(key))
        pieces += [arguments.add(value[i : i + size]) for i in range(0, len(value), size)]
        last = (key, value) == pairs[-1]
        pieces.append(arguments.cut() if cut and last else arguments.close())
    return "".join([*pieces, arguments.finish()])


def load(text: str) -> dict[str, Any]:
    """An object that all readers of JSON read alike."""
    orjson.loads(text)
    found = json.loads(text)
    assert type(found) is dict
    return found


def argument(kinds: str, value: str) -> Any:
    """What an argument becomes of which the schema allows these kinds."""
    parameters = {"properties": {"k": {"type": kinds.split()}}}
    return load(write(parameters, [("k", value)]))["k"]


pair_lists = st.lists(st.tuples(st.sampled_from("abcd") | st.text(chars), value_texts), max_size=5)


@given(schemas, pair_lists, st.integers(1, 5), st.booleans())
def test_always_json_and_the_same_in_any_pieces(
    parameters: Any, pairs: list[tuple[str, str]], size: int, cut: bool
):
    text = write(parameters, pairs, size, cut)
    assert text == write(parameters, pairs, cut=cut)
    found = load(text)
    keys = {key for key, _ in pairs}
    missing = {pairs[-1][0]} if cut and pairs else set()
    assert keys - missing <= found.keys() <= keys
    if pairs:  # the first of equal keys counts
        assert found == load(write(parameters, list(dict(reversed(pairs)).items())[::-1])) or cut


@given(kind_sets, value_texts)
def test_values_are_of_a_kind_that_is_allowed(kinds: list[str], value: str):
    found = argument(" ".join(kinds), value)
    if type(found) is str and found == value:
        try:
            meant = kind_of(json.loads(value))
        except (ValueError, RecursionError):
            meant = None
        assert "string" in kinds or meant is None or value in NO_JSON
        assert meant == "string" or meant not in kinds or kinds == ["string"] or value in NO_JSON
    else:
        assert found == json.loads(value)
        assert kind_of(found) in set(kinds) - {"string"} or "string" not in kinds


@given(st.text(chars))
@example("a<")
@example("</arg_value")
@example('"},\n{"\\u0000\ud7ff')
def test_strings_are_verbatim(value: str):
    assert argument("string", value) == value
    assert load(write({"properties": {value: {"type": "string"}}}, [(value, value)])) == {
        value: value
    }


@given(json_values)
def test_json_values_are_read(value: Any):
    kind = kind_of(value)
    if kind != "string":
        assert argument(kind, json.dumps(value)) == value
        assert argument(f"string {kind}", json.dumps(value, indent=2)) == value
        assert load(write(None, [("k", json.dumps(value))])) == {"k": value}


@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_not_json_is_a_string(text: str):
    for kinds in ("number", "object", "number boolean null object array", "string array"):
        assert argument(kinds, text) == text
    assert load(write(None, [("k", text)])) == {"k": text}


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_json_stays_as_it_was_written(text: str):
    parameters = {"properties": {"k": {"type": ["number", "boolean", "null", "object", "array"]}}}
    assert write(parameters, [("k", f"\n{text} ")]) == f'{{"k": {text}}}'


def test_what_looks_like_json_is_a_string_where_only_strings_may_be():
    for text in ("123", "true", "null", '{"a": 1}', '"quoted"', " 5 "):
        assert argument("string", text) == text
    assert argument("string null", "123") == "123"
    assert argument("string null", "null") is None
    assert argument("string number", '"5"') == '"5"'
    assert argument("number", '"5"') == "5"


@pytest.mark.parametrize(("depth", "kind"), [(MAX_NESTING - 2, list), (MAX_NESTING - 1, str)])
def test_values_are_no_deeper_than_may_be_sent_back(depth: int, kind: type):
    arguments = write(None, [("k", "[" * depth + "1" + "]" * depth)])
    assert type(load(arguments)["k"]) is kind
    call = {"function": {"name": "f", "arguments": arguments}}
    GLM.render([{"role": "assistant", "tool_calls": [call]}])


def test_a_string_comes_as_it_arrives_and_other_values_whole():
    arguments = Arguments({"properties": {"s": {"type": "string"}, "n": {"type": "integer"}}})
    assert [arguments.open("s"), *map(arguments.add, 'a"b')] == ['{"s": "', "a", '\\"', "b"]
    assert [arguments.close(), arguments.open("n"), *map(arguments.add, "12")] == ['"', "", "", ""]
    assert [arguments.close(), arguments.finish()] == [', "n": 12', "}"]


def test_without_values_it_is_an_empty_object():
    assert write(None, []) == "{}"
    assert write({"properties": {"k": {"type": "integer"}}}, [("k", "12")], cut=True) == "{}"
    assert (
        write({"properties": {"k": {"type": "string"}}}, [("k", "12")], cut=True) == '{"k": "12"}'
    )
