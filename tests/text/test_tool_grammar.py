"""Grammars of tool calls: their forms, tags and errors."""

from __future__ import annotations

import json
import random
import re
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tool_walks import (
    BREAKS,
    CALL,
    END_CALL,
    END_KEY,
    END_VALUE,
    ENDS,
    IDS,
    KEY,
    NANO,
    TOKENIZER,
    VALUE,
    check,
    compiled,
    letters,
    nexts,
    of,
    spelled,
    takes,
    tool,
    walk,
)

from glmjax.errors import InvalidRequestError
from glmjax.text.grammar import MAX_GRAMMAR_CHARS, GrammarConstraint, Grammars
from glmjax.text.tokenizer import Tokenizer
from glmjax.text.tool_grammar import TAGS, StrictToolError, tool_grammar

seeds = st.integers(0, 2**32)
forms = st.sampled_from(["glm45", "glm47"])


ANSWER = of({"answer": {"$ref": "#/$defs/n"}}, "answer", **{"$defs": {"n": {"type": "integer"}}})


@settings(max_examples=40, deadline=None)
@given(forms, seeds, st.booleans())
def test_an_answer_may_come_instead_of_calls(form: Any, seed: int, as_text: bool):
    tools, answer = [tool(of({"a": {"type": "string"}}))], ANSWER | {"additionalProperties": False}
    given = json.dumps(answer) if as_text else answer
    tokens = walk(compiled(tool_grammar(tools, form, IDS, text=True, answer=given)), seed)
    if IDS[CALL] in tokens:
        check(tokens, form, tools)
    else:
        jsonschema.validate(json.loads(TOKENIZER.decode(tokens)), answer)


def test_an_answer_may_be_lenient():
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True}
    lenient = schema | {"x-guidance": {"lenient": True}}
    grammar = tool_grammar([tool()], "glm47", IDS, answer=lenient)
    assert takes(grammar, letters("[1, 1]"))
    assert not takes(grammar, letters("[1,  1]"))


# What exactly is taken


PING = [tool(None, "ping"), tool(of({"s": {"type": "string"}, "n": {"type": "integer"}}, "s"))]
PING_45, PING_47 = [CALL, "ping\n", END_CALL], [CALL, "ping", END_CALL]
WITH_45 = [CALL, "f\n", KEY, "s", END_KEY, "\n", VALUE, "x", END_VALUE, "\n", END_CALL]
WITH_47 = [CALL, "f", KEY, "s", END_KEY, VALUE, "x", END_VALUE, END_CALL]
BOTH_47 = [*WITH_47[:-1], KEY, "n", END_KEY, VALUE, "-7", END_VALUE, END_CALL]


@pytest.mark.parametrize(
    ("form", "parts", "options", "taken"),
    [
        ("glm45", PING_45, {"least": 1}, True),
        ("glm45", ["\n", *PING_45], {"least": 1}, False),
        ("glm45", [*PING_45, "\n"], {"least": 1}, False),
        ("glm45", PING_47, {"least": 1}, False),
        ("glm45", WITH_45, {"least": 1}, True),
        ("glm45", WITH_47, {"least": 1}, False),
        ("glm45", [*PING_45, "\n", *WITH_45], {"least": 1}, True),
        ("glm45", [*PING_45, *WITH_45], {"least": 1}, False),
        ("glm47", PING_47, {"least": 1}, True),
        ("glm47", PING_45, {"least": 1}, False),
        ("glm47", ["\n", *PING_47], {"least": 1}, False),
        ("glm47", WITH_47, {"least": 1}, True),
        ("glm47", BOTH_47, {"least": 1}, True),
        ("glm47", [CALL, "f", END_CALL], {"least": 1}, False),
        ("glm47", [CALL, "ping", *WITH_47[2:]], {"least": 1}, False),
        ("glm47", [CALL, "pong", END_CALL], {"least": 1}, False),
        ("glm47", [*WITH_47[:-1], *WITH_47[2:]], {"least": 1}, False),
        ("glm47", [CALL, "f", *BOTH_47[8:14], *WITH_47[2:]], {"least": 1}, False),
        ("glm47", [], {"least": 1}, False),
        ("glm47", [], {}, True),
        ("glm47", ["hi"], {}, False),
        ("glm47", ["hi"], {"text": True}, True),
        ("glm47", ["hi\n", *PING_47], {"text": True}, True),
        ("glm47", ["hi\n", *PING_47], {"text": True, "least": 1}, True),
        ("glm47", ["hi"], {"text": True, "least": 1}, False),
        ("glm47", [*PING_47, "hi"], {"text": True}, False),
        ("glm47", PING_47 * 2, {"most": 1}, False),
        ("glm47", PING_47 * 2, {"most": 2}, True),
        ("glm47", PING_47 * 3, {"most": 2}, False),
        ("glm47", PING_47 * 9, {"least": 3}, True),
        ("glm47", PING_47 * 2, {"least": 3}, False),
        ("glm47", PING_47, {"most": 0}, False),
        ("glm45", ['{"answer":1}'], {"answer": ANSWER}, True),
        ("glm47", ['\n{"answer":1}'], {"answer": ANSWER}, False),
        ("glm47", ['{"answer": 1}'], {"answer": ANSWER}, True),
        ("glm47", ['{"answer":  1}'], {"answer": ANSWER}, False),
        ("glm47", ['{"answer": "1"}'], {"answer": ANSWER}, False),
        ("glm47", ["hi"], {"answer": ANSWER, "text": True}, False),
        ("glm47", PING_47, {"answer": ANSWER, "text": True}, True),
    ],
)
def test_form(form: Any, parts: list[str], options: dict[str, Any], taken: bool):
    assert takes(tool_grammar(PING, form, IDS, **options), spelled(*parts)) == taken
    # The same with tags in letters.
    no_tokens: dict[str, None] = dict.fromkeys(TAGS) if form == "glm45" else {}
    grammar = tool_grammar(PING, form, no_tokens, **options)
    assert takes(grammar, letters("".join(parts))) == taken


@pytest.mark.parametrize("part", range(len(TAGS)))
def test_a_tag_is_its_token_and_nothing_else(part: int):
    grammar = tool_grammar(PING, "glm47", IDS, least=1)
    assert takes(grammar, spelled(*WITH_47))
    tag = TAGS[part]
    tokens = [letters(p) if p == tag else spelled(p) for p in WITH_47]
    assert not takes(grammar, list(chain(*tokens)))


def test_keys_hold_no_tags():
    for tag in TAGS:
        begin, end = spelled(CALL, "f", KEY), spelled(END_KEY, VALUE, "1", END_VALUE)
        whole = [*begin, *letters(f"a{tag}"), *end]
        grammar = tool_grammar(
            [tool({"additionalProperties": {"type": "integer"}})], "glm47", IDS, least=1
        )
        assert not takes(grammar, [*whole, IDS[END_CALL]])


@pytest.mark.parametrize(
    "name", ['a"b', "a\\", "<tool_call>", "a\n", "%json {}", "é🙂", "/x/", "</tool_call>"]
)
def test_names_are_any_strings(name: str):
    tools = [tool(None, name), tool(of({name: {"type": "null"}}, name), "a")]
    grammar = tool_grammar(tools, "glm45", IDS, least=1)
    assert takes(grammar, [IDS[CALL], *letters(name), *spelled("\n", END_CALL)])
    pair = [IDS[KEY], *letters(name), *spelled(END_KEY, "\n", VALUE, "null", END_VALUE, "\n")]
    assert takes(grammar, [*spelled(CALL, "a\n"), *pair, *spelled(END_CALL)])


# Tokenizers and sizes


def flipped(folder: Path, special: bool) -> Tokenizer:
    """The tokenizer, with all tags special or none."""
    data = json.loads((NANO / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = special if token["content"] in TAGS else token["special"]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("special", [False, True])
def test_whether_tags_are_special_does_not_matter(special: bool, tmp_path: Path):
    tokenizer = flipped(tmp_path, special)
    assert (IDS[CALL] in tokenizer.special_ids) == special
    grammars = Grammars(tokenizer, 1024, ENDS)
    grammar = tool_grammar(PING, "glm47", IDS, text=True)
    assert takes(grammar, spelled("hi", *WITH_47), grammars)
    for seed in range(10):
        tokens = walk(compiled(grammar, grammars), seed)
        first = tokens.index(IDS[CALL]) if IDS[CALL] in tokens else len(tokens)
        assert first == len(tokens) or check(tokens[first:], "glm47", PING)
        assert not set(tokens[:first]) & set(IDS.values())


def test_tags_that_are_ordinary_tokens(tmp_path: Path):
    """Whose letters llguidance takes for text."""
    data = json.loads((NANO / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in data["added_tokens"]}
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in TAGS]
    data["model"]["vocab"] |= ids
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    grammars = Grammars(Tokenizer.from_folder(tmp_path), 1024, ENDS)
    grammar = tool_grammar(PING, "glm47", IDS, text=True)
    assert takes(grammar, spelled("hi", *BOTH_47, *PING_47), grammars)
    for tag in TAGS:
        whole = [*spelled(*WITH_47[:6]), IDS[tag], *spelled(*WITH_47[7:])]
        assert takes(grammar, whole, grammars) == (tag != END_VALUE)


def spelled_walk(constraint: GrammarConstraint, seed: int, free: int = 40) -> str:
    """As `walk`, where tags are in letters."""
    rng, tokens = random.Random(seed), []
    while len(tokens) < 800:
        ids = nexts(constraint)
        order = [END_VALUE, END_CALL, END_KEY, VALUE, CALL, KEY] if len(tokens) >= free else []
        runs = [letters(tag) for tag in order]
        runs = [run for run in runs if len(constraint.masks(run)) > len(run)]
        if len(tokens) >= free and ENDS[0] in ids:
            return TOKENIZER.decode(tokens)
        run = runs[0] if runs else [rng.choice(sorted(set(ids) - set(ENDS)))]
        tokens += run
        constraint.advance(run)
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens)!r}")


@settings(max_examples=40, deadline=None)
@given(forms, seeds, st.booleans())
def test_walks_where_tags_are_in_letters(form: Any, seed: int, text: bool):
    properties = {"s": {"type": "string"}, "n": {"type": "number"}}
    tools = [tool(of(properties, "n", additionalProperties={"type": "number"}))]
    found = spelled_walk(compiled(tool_grammar(tools, form, {}, text=text, least=1)), seed)
    n = BREAKS[form]
    before = "(?:(?!</?(?:tool_call|arg_key|arg_value)>).)*" if text else f"(?:{n})?"
    s = f"(?:<arg_key>s</arg_key>{n}<arg_value>(?:(?!</arg_value>).)*</arg_value>{n})?"
    number = f"</arg_key>{n}<arg_value>-?[0-9][0-9.eE+-]*</arg_value>{n}"
    call = f"<tool_call>f{n}{s}<arg_key>n{number}(?:<arg_key>[^\n]+?{number})*</tool_call>"
    assert re.fullmatch(f"(?s){before}{call}(?:{n}{call})*", found)


def weighty(i: int) -> dict[str, Any]:
    """A tool with nested parameters, of about a kilobyte."""
    leaf = of({"x": {"type": "number", "description": "how far " * 5}, f"y{i}": {"enum": ["a", i]}})
    words = {"description": "what it is about, " * 6, "type": "string"}
    inner = {"leaf": leaf, "list": {"type": "array", "items": {"$ref": "#/$defs/leaf"}}, "s": words}
    properties = {"path": words, "flag": {"type": "boolean"}, "in": of(inner, "leaf"), "in2": leaf}
    return tool(of(properties, "path", **{"$defs": {"leaf": leaf}}), f"tool_{i}", description="d")


def test_a_hundred_tools_fit():
    tools = [weighty(i) for i in range(100)]
    assert len(json.dumps(tools)) > 100_000
    grammar = tool_grammar(tools, "glm45", IDS, least=1)
    assert len(json.dumps(grammar)) < MAX_GRAMMAR_CHARS * 0.8
    constraint = compiled(grammar)
    assert check(walk(constraint, 1), "glm45", tools)


def test_equal_rules_are_written_once():
    parameters = of({"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 3}})
    one = tool_grammar([tool(parameters)], "glm47", IDS, least=1)
    two = tool_grammar([tool(parameters), tool(parameters, "g")], "glm47", IDS, least=1)
    assert len(two.splitlines()) == len(one.splitlines())


# Errors


def error_of(schema: Any, **more: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as error:
        compiled(tool_grammar([tool(of({"k": schema}), **more)], "glm47", IDS, least=1))
    return error.value


@pytest.mark.parametrize(
    ("schema", "cause"),
    [
        ({"type": "array", "items": {"type": "strin"}}, "Invalid type: strin"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"type": "array", "items": {"$ref": "#/$defs/none"}}, "none' does not exist"),
        ({"type": "array", "items": {"properties": 3}}, "must be an object"),
    ],
)
def test_schemas_that_cannot_be_compiled(schema: Any, cause: str):
    error = error_of(schema)
    assert error.param == "tool_choice"
    assert cause in str(error)


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "array", "items": {"type": "float"}}, '["x"]'),
        ({"type": "object", "properties": {"a": {"type": "any"}}}, '{"a": 1}'),
        ({"type": "array", "items": {"$ref": "http://localhost/x"}}, "[1]"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "1"),
    ],
)
def test_careful_grammars_keep_the_types(schema: Any, value: str):
    whole, sound = of({"k": schema, "n": {"type": "integer"}}, "k"), {"careful": True, "least": 1}
    grammar = tool_grammar([tool(whole)], "glm47", IDS, **sound)
    begin, end = [CALL, "f", KEY, "k", END_KEY, VALUE], [END_VALUE]
    assert takes(grammar, spelled(*begin, value, *end, END_CALL))
    assert not takes(grammar, spelled(*begin, "x", *end, END_CALL))
    for n, taken in (("1", True), ("1.5", False)):
        more = [KEY, "n", END_KEY, VALUE, n, END_VALUE, END_CALL]
        assert takes(grammar, spelled(*begin, value, *end, *more)) == taken
    with pytest.raises(StrictToolError):
        tool_grammar([tool(whole, strict=True)], "glm47", IDS, **sound)


def test_a_part_that_strict_cannot_hold():
    """Of a schema that is sound as a whole: what is optional might never come."""
    schema = of({"k": {"type": "integer", "minimum": 3, "maximum": 2}})
    assert tool_grammar([tool(schema, strict=True)], "glm47", IDS)
    with pytest.raises(StrictToolError, match="Unsatisfiable"):
        tool_grammar([tool(schema, strict=True)], "glm47", IDS, careful=True)


MANY = [of({f"k{i}": {"type": "integer"}}, f"k{i}") for i in range(70)]
STRICT: list[tuple[Any, str]] = [
    ({"type": "strng"}, "Invalid type: strng"),
    (of({"k": {"type": "strng"}}), "Invalid type: strng"),
    (of({"k": {"$ref": "#/$defs/x"}}), "does not exist"),
    (of({"k": "string"}), "must be an object or boolean"),
    ({"type": "object", "properties": ["k"]}, "must be an object"),
    ({"type": "array"}, "arguments are an object"),
    (of({"k": {"enum": "a"}}), "must be an array"),
    (of({"k": {"type": "object", "propertyNames": {}}}), "propertyNames"),
    (of({"k": {"type": "string", "pattern": "^abc$", "maxLength": 2}}), "nothing can match"),
    ({"anyOf": MANY}, "too many ways"),
]


@pytest.mark.parametrize(("parameters", "cause"), STRICT)
def test_strict_tools_are_held_to_what_is_served(parameters: Any, cause: str):
    tools = [tool(of({"secret": {"type": "integer"}}), "other"), tool(parameters, strict=True)]
    with pytest.raises(StrictToolError) as error:
        tool_grammar(tools, "glm47", IDS)
    assert (error.value.name, error.value.param) == ("f", "tools")
    assert cause in error.value.cause
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)
    assert compiled(tool_grammar([tool(parameters)], "glm47", IDS, careful=True))


def test_formats_are_not_held():
    tools = [tool(of({"k": {"type": "string", "format": "path"}}, "k"), strict=True)]
    assert takes(tool_grammar(tools, "glm47", IDS), spelled(*WITH_47[:3], "k", *WITH_47[4:]))


def test_only_strict_tools_must_have_known_keywords():
    schema = {"type": "array", "uniqueItems": True}
    with pytest.raises(StrictToolError, match="uniqueItems"):
        tool_grammar([tool(of({"k": schema}), strict=True)], "glm47", IDS)
    compiled(tool_grammar([tool(of({"k": schema}))], "glm47", IDS, least=1))


def test_half_a_pair_is_refused():
    with pytest.raises(InvalidRequestError):
        compiled(tool_grammar([tool(None, "\ud83d")], "glm47", IDS, least=1))
    error_of({"const": ["\ud83d"]})


def test_calls_of_no_tools():
    with pytest.raises(InvalidRequestError, match="there is none") as error:
        tool_grammar([], "glm47", IDS, least=1)
    assert error.value.param == "tools"
    assert takes(tool_grammar([], "glm47", IDS, text=True), spelled("hi"))


@pytest.mark.parametrize("answer", ["{", "[]", "3"])
def test_answers_that_are_no_schemas(answer: str):
    with pytest.raises(InvalidRequestError, match="must be a JSON object"):
        tool_grammar(PING, "glm47", IDS, answer=answer)


@pytest.mark.parametrize("key", ["anyOf", "allOf", "oneOf"])
def test_tangled(key: str):
    links = {f"d{i}": {key: [{"$ref": f"#/$defs/d{i + 1}"}] * 3} for i in range(40)}
    schema = {"$ref": "#/$defs/d0", "$defs": links, "properties": {"x": {"$ref": "#/$defs/d0"}}}
    compiled(tool_grammar([tool(schema)], "glm47", IDS, least=1))


def test_too_deep():
    schema: Any = {"type": "integer"}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(InvalidRequestError, match="too deep"):
        tool_grammar([tool(of({"k": schema}))], "glm47", IDS, least=1)
