"""Which types a tool's parameter may have."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.text.schema_kinds import ALL_KINDS, kind_of, value_kinds, variants

EXAMPLES = {
    "string": ["", "a", "1"],
    "number": [0, 1, 2.5, -3],
    "boolean": [True, False],
    "null": [None],
    "object": [{}, {"a": 1}],
    "array": [[], [1, "a"]],
}
WORDS = {"s": "string", "n": "number", "b": "boolean", "0": "null", "o": "object", "a": "array"}
DEFS = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "loop": {"$ref": "#/$defs/loop"},
    "loop2": {"anyOf": [{"$ref": "#/$defs/loop2"}, {"$ref": "#/$defs/str"}]},
    "tree": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/tree"}}, {"type": "null"}]},
    "a/b~c d": {"type": "boolean"},
    "list": [{"type": "null"}, {"type": "array"}],
    "~1": {"type": "array"},
    "both": {"allOf": [{"$ref": "#/$defs/both"}, {"type": "string"}]},
    "true": True,
}


def kinds_of(letters: str) -> frozenset[str]:
    return frozenset(WORDS[letter] for letter in letters) or ALL_KINDS


# A parameter's schema -> its kinds by their letters; none: all.
SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "string"}, "s"),
    ({"type": "integer"}, "n"),
    ({"type": "number"}, "n"),
    ({"type": ["string", "null"]}, "s0"),
    ({"type": ["integer", "object", "array", "boolean"]}, "noab"),
    ({"type": "strin"}, ""),
    ({"type": ["string", "any"]}, ""),
    ({"type": []}, ""),
    ({"type": [["string"]]}, ""),
    ({"type": {}}, ""),
    (True, ""),
    (False, ""),
    ({}, ""),
    (None, ""),
    (7, ""),
    ({"description": "x", "default": "y"}, ""),
    ({"$ref": "#/$defs/str"}, "s"),
    ({"$ref": "#/definitions/int"}, "n"),
    ({"$ref": "#"}, "o"),
    ({"$ref": "#/"}, ""),
    ({"$ref": "#/properties/other"}, "b"),
    ({"$ref": "#/$defs/a~1b~0c%20d"}, "b"),
    ({"$ref": "#/%24defs/str"}, "s"),
    ({"$ref": "#/$defs/~01"}, "a"),
    ({"$ref": "#/$defs/list/1"}, "a"),
    ({"$ref": "#/$defs/list/2"}, ""),
    ({"$ref": "#/$defs/list/x"}, ""),
    ({"$ref": "#/$defs/list/-1"}, ""),
    ({"$ref": "#/$defs/list/\u0661"}, ""),  # a digit, but no index
    ({"$ref": "#/$defs/list/" + "1" * 5000}, ""),
    ({"$ref": "#/$defs/none"}, ""),
    ({"$ref": "#/$defs/str/type/0"}, ""),
    ({"$ref": "#anchor"}, ""),
    ({"$ref": "https://example.com/x.json"}, ""),
    ({"$ref": 3}, ""),
    ({"$ref": "#/$defs/true"}, ""),
    ({"$ref": "#/$defs/loop"}, ""),
    ({"$ref": "#/$defs/loop2"}, "s"),
    ({"$ref": "#/$defs/tree"}, "a0"),
    ({"$ref": "#/$defs/both"}, "s"),
    ({"$ref": "#/$defs/str", "description": "x"}, "s"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "s0"),
    ({"oneOf": [{"type": "string"}, {"$ref": "#/$defs/int"}]}, "sn"),
    ({"anyOf": [{"type": "string"}, {}]}, ""),
    ({"anyOf": [{"type": "string"}, False]}, "s"),
    ({"anyOf": [{"type": "string"}, 3]}, ""),
    ({"anyOf": []}, ""),
    ({"anyOf": "x", "type": "null"}, "0"),
    ({"anyOf": [{"anyOf": [{"type": "null"}]}, {"const": 3}]}, "0n"),
    ({"type": "string", "anyOf": [{"type": "string"}, {"type": "null"}]}, "s"),
    ({"allOf": [{"$ref": "#/$defs/str"}]}, "s"),
    ({"allOf": [{"type": ["string", "null"]}, {"type": ["null", "array"]}]}, "0"),
    ({"allOf": [{"type": "string"}, {"type": "null"}]}, ""),
    ({"allOf": [{"allOf": [{"type": "string"}]}]}, "s"),
    ({"allOf": [{"type": ["string", "null"]}, {"minLength": 1}]}, "s0"),
    ({"allOf": [{"anyOf": [{"type": "null"}]}, {}]}, "0"),
    ({"allOf": 1, "type": "null"}, "0"),
    ({"const": "x"}, "s"),
    ({"const": None}, "0"),
    ({"const": True}, "b"),
    ({"const": [1]}, "a"),
    ({"enum": ["a", "b"]}, "s"),
    ({"enum": ["a", None, 1.5, {}, False]}, "s0nob"),
    ({"enum": []}, ""),
    ({"enum": "abc"}, ""),
    ({"type": "string", "enum": ["a", None]}, "s"),
    ({"type": "string", "nullable": True}, "s0"),
    ({"type": "string", "nullable": False}, "s"),
    ({"$ref": "#/$defs/str", "nullable": True}, "s0"),
    ({"enum": ["a"], "nullable": True}, "s0"),
    ({"nullable": True}, ""),
    ({"properties": {"x": {}}}, "o"),
    ({"additionalProperties": {"type": "string"}}, "o"),
    ({"items": {"type": "string"}}, "a"),
    ({"prefixItems": []}, "a"),
    ({"pattern": "^a"}, "s"),
    ({"minimum": 3}, "n"),
    ({"minimum": 3, "maxLength": 3}, "ns"),
    ({"properties": {}, "type": "array"}, "a"),
    ({"minLength": 1, "enum": ["a", None]}, "s0"),
    ({"minLength": 1, "const": None}, "0"),
    ({"minLength": 1, "anyOf": [{"type": "null"}, {"type": "string"}]}, "s0"),
    ({"minLength": 1, "oneOf": [{"type": "null"}, {"type": "string"}]}, "s0"),
    ({"anyOf": [{"properties": {}}, {"type": "null"}]}, "o0"),
    ({"allOf": [{"properties": {}}, {"required": []}]}, "o"),
    ({"properties": {}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, "o"),
]


@pytest.mark.parametrize(("schema", "letters"), SCHEMAS, ids=[str(s)[:80] for s, _ in SCHEMAS])
def test_schemas(schema: Any, letters: str):
    parameters = {
        "type": "object",
        "properties": {"x": schema, "other": {"type": "boolean"}},
        "$defs": DEFS,
        "definitions": DEFS,
    }
    assert value_kinds(parameters, "x") == kinds_of(letters)


X_IS_STRING = {"properties": {"x": {"type": "string"}}}
X_IS_NULL = {"properties": {"x": {"type": "null"}}}
Y_BY_PATTERN = {"patternProperties": {"y": {"type": "null"}}}
Y_IS_NULL = {"properties": {"y": {"type": "null"}}}


@pytest.mark.parametrize(
    ("parameters", "letters"),
    [
        (None, ""),
        ({}, ""),
        (True, ""),
        ([], ""),
        ("string", ""),
        (Y_IS_NULL, ""),
        ({"properties": ["x"]}, ""),
        ({"properties": 3}, ""),
        (X_IS_STRING | {"additionalProperties": {"type": "null"}}, "s"),
        (Y_IS_NULL | {"additionalProperties": {"type": "string"}}, "s"),
        (Y_IS_NULL | {"additionalProperties": False}, ""),
        (Y_IS_NULL | {"additionalProperties": True}, ""),
        ({"patternProperties": {"^x$": {"type": "string"}, "y": {"type": "null"}}}, "s"),
        (Y_BY_PATTERN | {"additionalProperties": {"type": "array"}}, "a"),
        ({"patternProperties": {"x": {"const": "a"}}, "additionalProperties": {"const": 1}}, "s"),
        ({"patternProperties": {"x": {"type": ["string", "null"]}, ".": {"type": "string"}}}, "s"),
        ({"patternProperties": {"(": {"type": "string"}, "x": {"type": "null"}}}, "0"),
        (X_IS_STRING | {"patternProperties": {"x": {"type": "null"}}}, "s"),
        ({"$ref": "#/$defs/p", "$defs": {"p": X_IS_STRING}}, "s"),
        ({"$ref": "#"}, ""),
        ({"allOf": [{"$ref": "#/$defs/p"}, Y_IS_NULL], "$defs": {"p": X_IS_STRING}}, "s"),
        ({"allOf": [{"properties": {"x": {"type": ["string", "null"]}}}, X_IS_NULL]}, "0"),
        ({"anyOf": [X_IS_STRING, X_IS_NULL]}, "s0"),
        ({"oneOf": [X_IS_STRING, Y_IS_NULL]}, "s"),
        ({"oneOf": [Y_IS_NULL, {}]}, ""),
        ({"anyOf": [{"$ref": "#"}, X_IS_STRING]}, "s"),
        ({"properties": {"x": {"$ref": "#/properties/y"}, "y": {"$ref": "#/properties/x"}}}, ""),
    ],
)  # fmt: skip
def test_where_a_parameter_is_found(parameters: Any, letters: str):
    assert value_kinds(parameters, "x") == kinds_of(letters)


@pytest.mark.parametrize("key", ["anyOf", "allOf", "oneOf"])
def test_deep_wide_and_tangled_schemas(key: str):
    deep: Any = {"type": "string"}
    for _ in range(20_000):
        deep = {key: [deep]}
    assert value_kinds({"properties": {"x": deep}}, "x") in (ALL_KINDS, {"string"})
    assert value_kinds(deep, "x") == ALL_KINDS
    links = {f"d{i}": {key: [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(40)}
    tangled = {"properties": {"x": {"$ref": "#/$defs/d0"}}, "$defs": links}
    assert value_kinds(tangled, "x") == ALL_KINDS
    assert value_kinds({"$ref": "#/$defs/d0", "$defs": links}, "x") == ALL_KINDS


def test_patterns_do_not_take_for_ever():
    parameters = {"patternProperties": {"^(a+)+$": {"type": "string"}}}
    assert value_kinds(parameters, "a" * 40) == {"string"}
    assert value_kinds(parameters, "a" * 40 + "b") == ALL_KINDS
    for pattern in ("a?" * 50_000, "(" * 50_000, "(a{0,1000}){0,1000}"):
        assert value_kinds({"patternProperties": {pattern: {"const": 1}}}, "a" * 300)


# Against a validator

VALUES = [value for values in EXAMPLES.values() for value in values]
leaves = st.one_of(
    st.builds(lambda x: {"type": x}, st.sampled_from(["string", "integer", "null", "object"])),
    st.builds(lambda x: {"type": sorted(x)}, st.sets(st.sampled_from([*EXAMPLES]), min_size=1)),
    st.builds(
        lambda x: {"enum": x}, st.lists(st.sampled_from(VALUES), min_size=1)
    ),
    st.sampled_from(VALUES).map(lambda x: {"const": x}),
    st.sampled_from([*DEFS]).filter(lambda x: x in ("str", "int", "tree")).map(
        lambda x: {"$ref": f"#/$defs/{x}"}
    ),
    st.sampled_from([{}, True]),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        *(
            st.builds(lambda x, key=key: {key: x}, st.lists(inner, min_size=1, max_size=3))
            for key in ("anyOf", "oneOf", "allOf")
        ),
        st.builds(lambda x, y: {"anyOf": [x], "allOf": [y]}, inner, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(trees)
def test_what_is_valid_is_of_the_kinds(schema: Any):
    parameters = {"properties": {"x": schema}, "$defs": DEFS}
    validator = jsonschema.Draft202012Validator(parameters)
    found = value_kinds(parameters, "x")
    for kind, values in EXAMPLES.items():
        if any(validator.is_valid({"x": value}) for value in values):
            assert kind in found


KEYWORDS = ["type", "$ref", "anyOf", "oneOf", "allOf", "const", "enum", "nullable", "properties"]
KEYWORDS += ["items", "$defs", "pattern", "patternProperties", "additionalProperties", "required"]
KEYWORDS += ["x", "#", "(", "string"]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYWORDS),
            inner | st.sampled_from(["string", "#", "#/x", "#/properties/x", "#/anyOf/0"]),
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(json_values)
def test_nothing_raises(parameters: Any):
    found = value_kinds(parameters, "x")
    assert found
    assert found <= ALL_KINDS


@given(json_values)
def test_kinds_of_values(value: Any):
    names = {
        "{": "object",
        "[": "array",
        '"': "string",
        "n": "null",
        "t": "boolean",
        "f": "boolean",
    }
    assert kind_of(value) == names.get(json.dumps(value)[0], "number")


def test_schemas_that_would_take_for_ever():
    wide = {f"A{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/A{i + 1}"}]}] * 9} for i in range(9)}
    root = {"$defs": wide | {"A9": {"type": "string"}}, "$ref": "#/$defs/A0"}
    assert variants(root, root) == []
    many = {"$defs": {"all": {"allOf": [{"type": "string"}] * 3000}}}
    union = {"anyOf": [{"$ref": "#/$defs/all"}] * 3000}
    assert value_kinds(many | {"properties": {"a": union}}, "a") == ALL_KINDS
    patterns = {f"^{i}x": {"type": "null"} for i in range(100)} | {"a": {"type": "string"}}
    assert value_kinds({"patternProperties": patterns}, "a") == ALL_KINDS
