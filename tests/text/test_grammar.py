"""Grammars: whatever walk a model takes through the masks, its text is of the grammar."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

import glmjax
from glmjax.bench.synthetic import end_ids, make_tokenizer
from glmjax.errors import InvalidRequestError, QueueFullError
from glmjax.text import grammar
from glmjax.text.grammar import (
    MAX_GRAMMAR_CHARS,
    GrammarConstraint,
    Grammars,
    GrammarSpec,
    flaw,
)
from glmjax.text.tokenizer import Tokenizer

NANO = Path(glmjax.__file__).parent / "assets" / "glm-nano"
ENDS = (1003, 1010, 1012)
STACK_SIZE = threading.stack_size()
VOCAB = 1100  # a padded embedding: the tokenizer has 1024
TOKENIZER = Tokenizer.from_folder(NANO)
GRAMMARS = Grammars(TOKENIZER, VOCAB, ENDS)
BYTES = {TOKENIZER.token_bytes(i)[0]: i for i in range(1003) if len(TOKENIZER.token_bytes(i)) == 1}
OBJECT = GrammarSpec("json_object")
seeds = st.integers(0, 2**32)


def allowed(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def start(spec: GrammarSpec, prefix: str = "") -> GrammarConstraint:
    constraint = GRAMMARS.constraint(spec)
    constraint.advance(TOKENIZER.encode(prefix))
    return constraint


def nexts(constraint: GrammarConstraint) -> list[int]:
    """Token ids that may come next."""
    return allowed(constraint.masks(())[0])


def walk(constraint: GrammarConstraint, seed: int, steps: int = 500) -> list[int]:
    """Random allowed tokens, often those that close something, up to an end token."""
    rng, tokens = random.Random(seed), []
    while len(tokens) < steps:
        ids = nexts(constraint)
        closing = [i for i in ids if i in ENDS or set(TOKENIZER.token_bytes(i)) <= set(b'"]}')]
        tokens.append(rng.choice(closing if closing and rng.random() < 0.4 else ids))
        constraint.advance(tokens[-1:])
        if tokens[-1] in ENDS:
            return tokens
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens)!r}")


def written(spec: GrammarSpec, seed: int) -> str:
    """The text of a random walk; no special token but the end's is in it."""
    *tokens, _ = walk(GRAMMARS.constraint(spec), seed)
    assert TOKENIZER.special_ids.isdisjoint(tokens)
    assert max(tokens, default=0) < TOKENIZER.size
    return b"".join(map(TOKENIZER.token_bytes, tokens)).decode()


# The tokenizer


@pytest.mark.parametrize("backend", [TOKENIZER._backend, make_tokenizer(3000)])
def test_llguidance_reads_the_same_bytes(backend):
    ours, theirs = Tokenizer(backend), LLTokenizer(backend.to_str())
    assert theirs.vocab_size == ours.size
    never = [i for i in range(ours.size) if ours.token_bytes(i) == b"\xff"]  # is in no UTF-8
    for i in set(range(ours.size)) - set(never):
        assert theirs.decode_bytes([i]) == ours.token_bytes(i)


def test_markers_of_the_chat_are_no_text():
    markers = [i for i in range(1003, 1024) if TOKENIZER.token_bytes(i) != b"/nothink"]
    assert set(nexts(start(GrammarSpec("regex", "(?s:.*)")))) & set(markers) == set(ENDS)
    assert set(nexts(start(OBJECT, '{"a'))).isdisjoint(markers)


def test_another_tokenizer():
    tokenizer = Tokenizer(make_tokenizer(3000))
    ends = end_ids(make_tokenizer(3000))
    constraint = Grammars(tokenizer, 3008, ends).constraint(GrammarSpec("choice", ("yes", "no")))
    constraint.advance(tokenizer.encode("yes"))
    assert nexts(constraint) == sorted(ends)


@pytest.mark.parametrize("vocab_size", [1024, 1025, 1056, 2000])
def test_padding_of_the_vocabulary_is_never_allowed(vocab_size: int):
    constraint = Grammars(TOKENIZER, vocab_size, ENDS).constraint(GrammarSpec("regex", "(?s:.*)"))
    masks = constraint.masks(TOKENIZER.encode("some text"))
    assert masks.shape[1] == -(-vocab_size // 32)
    assert all(0 < max(allowed(mask)) < TOKENIZER.size for mask in masks)


# JSON


def objects(values: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    properties = st.dictionaries(st.sampled_from(["a", "b b", "ü", 'q"']), values, max_size=3)
    return properties.flatmap(
        lambda found: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(found),
                "required": st.sets(st.sampled_from(sorted(found))).map(sorted)
                if found
                else st.just([]),
                "additionalProperties": st.just(False),
            }
        )
    )


def arrays(values: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    counts = {"minItems": st.integers(0, 2), "maxItems": st.integers(2, 3)}
    return st.fixed_dictionaries({"type": st.just("array"), "items": values, **counts})


def scalar(kind: str, least: str, most: str) -> st.SearchStrategy[dict]:
    bounds = {least: st.integers(0, 4), most: st.integers(4, 12)}
    return st.fixed_dictionaries({"type": st.just(kind), **bounds})


schemas = st.recursive(
    scalar("string", "minLength", "maxLength")
    | scalar("integer", "minimum", "maximum")
    | st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["x", 2, None, "é\n"]}]),
    lambda inner: (
        objects(inner)
        | arrays(inner)
        | st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)})
    ),
    max_leaves=6,
)
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}


def conforms(value: Any, schema: dict) -> bool:
    """Whether a value is of one of the `schemas`."""
    if "anyOf" in schema:
        return any(conforms(value, inner) for inner in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if type(value) is not TYPES.get(schema["type"], type(None)):
        return False
    if schema["type"] == "object":
        known = set(schema["required"]) <= set(value) <= set(schema["properties"])
        return known and all(conforms(v, schema["properties"][k]) for k, v in value.items())
    if schema["type"] == "array":
        fits = schema["minItems"] <= len(value) <= schema["maxItems"]
        return fits and all(conforms(item, schema["items"]) for item in value)
    if schema["type"] == "string":
        return schema["minLength"] <= len(value) <= schema["maxLength"]
    return schema["type"] != "integer" or schema["minimum"] <= value <= schema["maximum"]


@settings(max_examples=60, deadline=None)
@given(schemas, seeds, st.booleans())
def test_json_is_of_its_schema(schema: dict, seed: int, as_text: bool):
    spec = GrammarSpec("json_schema", json.dumps(schema) if as_text else schema)
    text = written(spec, seed)
    assert conforms(json.loads(text), schema), text


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_any_json_object(seed: int):
    assert isinstance(json.loads(written(OBJECT, seed)), dict)


@pytest.mark.parametrize("text", ['{"a": 1, "b": [1, {"c": null}]}', '{"a":1}', "{}"])
@pytest.mark.parametrize("indent", [None, 2])
def test_usual_layouts_of_json_are_taken(text: str, indent: int | None):
    text = json.dumps(json.loads(text), indent=indent)
    assert nexts(start(OBJECT, text)) == list(ENDS)


@pytest.mark.parametrize("own", [{}, {"whitespace_pattern": "[ ]+"}])
def test_blanks_come_to_an_end(own: dict):
    schema = {"type": "object", "required": ["a"], "x-guidance": own}
    constraint, blanks = start(GrammarSpec("json_schema", schema), "{"), ""
    while ids := [i for i in nexts(constraint) if TOKENIZER.token_bytes(i).isspace()]:
        constraint.advance(ids[:1])
        blanks += TOKENIZER.decode(ids[:1])
        assert len(blanks) <= 41


# Other languages


@pytest.mark.parametrize(
    "pattern",
    ["[ab]{2,5}c?", "(yes|no|don't know)", r"\d{3}-\d{2,4}", "^x[^x]{0,6}x$", "ä+?€|(?i:z)", ""],
)
@pytest.mark.parametrize("seed", range(5))
def test_regex(pattern: str, seed: int):
    assert re.fullmatch(pattern, written(GrammarSpec("regex", pattern), seed))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
choices = st.lists(texts, min_size=1, max_size=5, unique=True)


@settings(max_examples=60, deadline=None)
@given(choices, seeds)
@example(["<|user|>"], 0)  # in letters, not as the token
@example(["a", "a</think>", "a</think"], 0)
def test_choice(options: list[str], seed: int):
    spec = GrammarSpec("choice", tuple(options))
    assert written(spec, seed) in options
    for option in options:
        constraint = GRAMMARS.constraint(spec)
        constraint.advance(BYTES[byte] for byte in option.encode())
        assert set(ENDS) <= set(nexts(constraint))


LARK = """
start: call+
call: <tool_call> name "(" NUMBER ("," NUMBER)* ")" </tool_call>
name: "f" | "g"
NUMBER: /[0-9]{1,3}/
"""


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_lark_may_name_special_tokens(seed: int):
    tokens = walk(GRAMMARS.constraint(GrammarSpec("lark", LARK)), seed)
    call = r"<tool_call>[fg]\(\d{1,3}(,\d{1,3})*\)</tool_call>"
    assert re.fullmatch(f"({call})+", TOKENIZER.decode(tokens))
    assert TOKENIZER.token_id("<tool_call>") in tokens


# Masks and state

SPECS = [
    OBJECT,
    GrammarSpec("regex", "[ab]{0,30}"),
    GrammarSpec("lark", LARK),
    GrammarSpec("choice", ("yes", "yes, of course", "no")),
]


def stepwise(spec: GrammarSpec, tokens: Sequence[int]) -> np.ndarray:
    """Masks before the first and behind each of the tokens, one by one."""
    constraint = GRAMMARS.constraint(spec)
    masks = [constraint.masks(())[0]]
    for token in tokens:
        constraint.advance([token])
        masks.append(constraint.masks(())[0])
    return np.stack(masks)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), seeds, st.data())
def test_drafts_are_as_steps(spec: GrammarSpec, seed: int, data: st.DataObject):
    tokens = walk(GRAMMARS.constraint(spec), seed)
    split = data.draw(st.integers(0, len(tokens)))
    drafts = tokens[split : split + data.draw(st.integers(0, 6))]
    constraint = GRAMMARS.constraint(spec)
    constraint.advance(tokens[:split])

    masks = constraint.masks(drafts)
    assert masks.dtype == np.uint32
    assert masks.shape == (len(drafts) + 1, -(-VOCAB // 32))
    steps = stepwise(spec, tokens)
    np.testing.assert_array_equal(masks, steps[split : split + len(masks)])
    np.testing.assert_array_equal(constraint.masks(()), steps[split : split + 1])
    constraint.advance(drafts)
    np.testing.assert_array_equal(constraint.masks(()), steps[split + len(drafts)][None])


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SPECS), st.lists(st.integers(0, VOCAB - 1), max_size=4), seeds)
def test_rows_end_with_the_first_draft_that_is_not_allowed(spec, drafts: list[int], seed: int):
    first = walk(GRAMMARS.constraint(spec), seed)[0]
    drafts = [first, *drafts]
    masks = GRAMMARS.constraint(spec).masks(drafts)
    for i, draft in enumerate(drafts[: len(masks)]):
        assert (draft in allowed(masks[i])) == (i + 1 < len(masks))


def test_advance_refuses_what_is_not_allowed():
    constraint = start(GrammarSpec("regex", "abc", "regex"), "a")
    with pytest.raises(InvalidRequestError, match=r"cannot go on: .*satisfy the grammar") as error:
        constraint.advance([5])
    assert error.value.param == "regex"


def test_constraints_of_one_grammar_are_independent():
    spec = GrammarSpec("choice", ("ax", "bx"))
    one, two = GRAMMARS.constraint(spec), GRAMMARS.constraint(spec)
    one.advance(TOKENIZER.encode("ax"))
    assert nexts(one) == list(ENDS)
    two.advance(TOKENIZER.encode("b"))
    assert nexts(two) == TOKENIZER.encode("x")


def test_a_draft_into_a_dead_end_has_no_row():
    spec = GrammarSpec("lark", 'start: "a" dead | "b"\ndead: dead "x"', "ebnf")
    constraint = GRAMMARS.constraint(spec)
    a, b = TOKENIZER.encode("a") + TOKENIZER.encode("b")
    assert len(constraint.masks([a])) == 1
    assert len(constraint.masks([b])) == 2
    constraint.advance([a])
    with pytest.raises(InvalidRequestError, match="has no way on here: nothing can match") as error:
        constraint.masks([])
    assert error.value.param == "ebnf"


# Ends


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("text", ["a", "ab"])
def test_every_end_token_ends(end: int, text: str):
    constraint = start(GrammarSpec("regex", "ab?"), text)
    assert set(ENDS) <= set(nexts(constraint))
    assert allowed(constraint.masks([end])[1]) == list(ENDS)
    constraint.advance([end])
    constraint.advance([])
    assert nexts(constraint) == list(ENDS)
    constraint.advance(ENDS)
    with pytest.raises(InvalidRequestError):
        constraint.advance(TOKENIZER.encode("b"))


def test_no_end_before_the_grammar_may_end():
    constraint = start(GrammarSpec("regex", "ab"), "a")
    assert nexts(constraint) == TOKENIZER.encode("b")
    with pytest.raises(InvalidRequestError):
        constraint.advance(ENDS[:1])


@pytest.mark.parametrize("ends", [(), (2000,)])
def test_without_end_tokens_grammars_are_refused(ends: tuple[int, ...]):
    with pytest.raises(InvalidRequestError, match="names no end token") as error:
        Grammars(TOKENIZER, VOCAB, ends).constraint(GrammarSpec("regex", "a", "regex"))
    assert error.value.param == "regex"


# Errors

UNSUPPORTED = {"type": "object", "properties": {"a": {"not": {"type": "null"}}}}
BAD = {
    "unsupported keyword": (
        "json_schema",
        UNSUPPORTED,
        'JSON schema .*Unimplemented keys: .*"not"',
    ),
    "unknown type": ("json_schema", {"type": "strin"}, "JSON schema .*Invalid type: strin"),
    "no JSON": ("json_schema", "{", "JSON schema .*line 1 column"),
    "no object": ("json_schema", [1], "JSON schema .*Expecting object"),
    "no value": ("json_schema", None, "JSON schema .*Expecting object"),
    "no JSON value": ("json_schema", {"a": {1}}, "JSON schema .*set is not JSON serializable"),
    "impossible": ("json_schema", {"minimum": 2, "maximum": 1, "type": "integer"}, "Unsatisfiable"),
    "missing definition": ("json_schema", {"$ref": "#/$defs/x"}, "/x' does not exist"),
    "pattern": ("json_schema", {"type": "string", "pattern": "("}, "unclosed group"),
    "regex": ("regex", "(", "regular expression .*unclosed group"),
    "look-ahead": ("regex", "a(?=b)", "look-around"),
    "circle": ("json_schema", {"$ref": "#"}, "nothing can match"),
    "regex of nothing": ("regex", r"[^\s\S]", "nothing can match"),
    "no text": ("regex", 3, "regular expression"),
    "half a pair": ("regex", "\ud83d", "regular expression .*surrogates"),
    "lark": ("lark", 'start: "a" foo', 'Lark grammar .*at 1.* unknown name: "foo"'),
    "lark without start": ("lark", 'foo: "a"', "no start rule found"),
    "unknown token": ("lark", "start: <nope>", 'unknown special token: "<nope>"'),
    "lark of nothing": ("lark", 'start: start "a"', "nothing can match"),
    "no choice": ("choice", (), "list of different strings: there is none"),
    "empty choice": ("choice", ("a", ""), "'' is empty"),
    "repeated choice": ("choice", ("a", "b", "a"), "'a' is .* there twice"),
    "half a pair of a choice": ("choice", ("\ud83d",), "list of different strings"),
    "long": ("regex", "a" * MAX_GRAMMAR_CHARS, f"more than the {MAX_GRAMMAR_CHARS} that"),
    "deep": ("regex", "(" * 60_000, "error: "),
}


@pytest.mark.parametrize(("kind", "value", "cause"), BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("lead", ["", "\n"])
def test_errors_name_place_and_cause(kind: Any, value: Any, cause: str, lead: str):
    with pytest.raises(InvalidRequestError, match="(?s)^guided must be a.*" + cause) as error:
        GRAMMARS.constraint(GrammarSpec(kind, value, "guided", lead=lead))
    assert error.value.param == "guided"
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("lark", "cause"),
    [
        ('start: "a"', None),
        ("start: A\nA: /a/ & /b/", "nothing can match"),
        ('start: %json {"type": "any"}', "Invalid type: any"),
    ],
)
def test_flaws(lark: str, cause: str | None):
    assert flaw(lark) == cause


@pytest.mark.parametrize("lead", ["", "\n"])
def test_a_lead_comes_once_or_not(lead: str):
    constraint = GRAMMARS.constraint(GrammarSpec("choice", ("a",), lead=lead))
    a, line_break = BYTES[ord("a")], BYTES[ord("\n")]
    assert nexts(constraint) == sorted([a, line_break] if lead else [a])
    constraint.advance([line_break] if lead else [])
    assert nexts(constraint) == [a]


def test_a_long_chain_of_references_does_not_overflow_the_stack():
    links = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(2000)}
    schema = {"$defs": links | {"d2000": {"type": "null"}}, "$ref": "#/$defs/d0"}
    assert nexts(start(GrammarSpec("json_schema", schema), "[[["))
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(6000))
    constraint = start(GrammarSpec("lark", f'start: r0\n{rules}r6000: "a"'))
    assert nexts(constraint) == TOKENIZER.encode("a")


def test_many_threads():
    with ThreadPoolExecutor(8) as pool:
        specs = [GrammarSpec("choice", (f"x{i}",)) for i in range(40)]
        found = list(pool.map(GRAMMARS.constraint, specs))
    for i, constraint in enumerate(found):
        constraint.advance(TOKENIZER.encode(f"x{i}"))
        assert nexts(constraint) == list(ENDS)
    assert threading.stack_size() == STACK_SIZE


def test_a_compiler_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(grammar, "_COMPILE_S", 0.2)
    monkeypatch.setattr(grammar, "_COMPILERS", threading.BoundedSemaphore(1))
    started, end = threading.Event(), threading.Event()

    def endless(*_, **__):
        started.set()
        end.wait()
        raise ValueError("at last")

    with monkeypatch.context() as patch:
        patch.setattr(grammar, "LLMatcher", endless)
        with pytest.raises(InvalidRequestError, match=r"takes more than 0\.2 s to compile"):
            GRAMMARS.constraint(GrammarSpec("lark", 'start: "never seen"'))
    assert started.is_set()
    with pytest.raises(QueueFullError, match="try again later"):
        GRAMMARS.constraint(GrammarSpec("lark", 'start: "nor this"'))
    end.set()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            assert GRAMMARS.constraint(GrammarSpec("lark", 'start: "nor this"'))
            return
        except QueueFullError:
            pass
    raise AssertionError("its place was not given back")


def test_objects_of_many_optional_properties():
    properties = {f"p{i}": {"type": "integer"} for i in range(1200)}
    constraint = start(GrammarSpec("json_schema", {"properties": properties}), '{"p1')
    assert nexts(constraint)
