"""Tool calls as models write them, well and badly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from spelling import marked

from glmjax.text.lexer import Symbol, Tag, written
from glmjax.text.parts import CallArguments, CallBegin, Part, joined
from glmjax.text.tool_calls import MAX_HEADER, MAX_NAME, CallReader, is_name

STRING = {"properties": {"k": {"type": "string"}, "n": {"type": "integer"}}}
TOOLS: dict[str, Any] = {"f": STRING}
# What a value may hold besides letters; the end of a call in it is followed by something else.
PIECES = [*(tag for tag in Tag if tag is not Tag.END_VALUE), "<", "</", "</arg", "</arg_value>"]
PIECES += ["a", '"', "\\", "{", "}", "\n", " ", "🎉", "</tool_call>", "</tool_call>\n<tool_call>"]


class Call(NamedTuple):
    """What was read.

    Attributes:
        parts: joined.
        broken, left: as the reader has them.
        rest: symbols that it did not take.
    """

    parts: list[Part]
    broken: str | None
    left: Tag | None
    rest: list[Symbol]

    @property
    def name(self) -> str:
        begin = self.parts[0]
        assert isinstance(begin, CallBegin)
        return begin.name

    @property
    def arguments(self) -> Any:
        _, whole = self.parts
        assert isinstance(whole, CallArguments)
        return json.loads(whole.text)


def read(
    symbols: Sequence[Symbol] | str,
    tools: Any = TOOLS,
    truncated: bool = False,
    letters: bool = False,
) -> Call:
    """A call from its opening tag on.

    Args:
        symbols: them, or the text of them.
        letters: text comes letter by letter.
    """
    opening, *rest = marked(symbols) if isinstance(symbols, str) else symbols
    assert opening is Tag.CALL
    if letters:
        rest = [s for symbol in rest for s in ([symbol] if isinstance(symbol, Tag) else symbol)]
    reader, parts = CallReader(0, tools), []
    while rest and not reader.done:
        parts += reader.take(rest.pop(0))
    if not reader.done:
        parts += reader.finish(truncated)
    assert reader.done
    return Call(joined(parts), reader.broken, reader.left, rest)


def has_end_of_call(value: list[Symbol]) -> bool:
    """Whether a value holds what ends a call whose value is not closed."""
    after: Symbol | None = None
    for symbol in reversed(value):
        if symbol is Tag.END_CALL and after is Tag.CALL:
            return True
        after = after if isinstance(symbol, str) and symbol.isspace() else symbol
    return False


value_symbols = st.lists(st.sampled_from(PIECES), max_size=6).filter(
    lambda v: not has_end_of_call(v)
)
keys = st.sampled_from(["k", "n", "a b", "é", '"', "0"])
blanks = st.sampled_from(["", "\n", "\n\n", " ", "\r\n  "])


@given(
    st.sampled_from(["f", "unknown", "a.b/c-d", "é"]),
    st.dictionaries(keys, value_symbols, max_size=4),
    st.lists(blanks, min_size=4, max_size=4),
    st.booleans(),
    st.sampled_from([True, False, None]),
)
def test_calls_in_both_forms(
    name: str,
    values: dict[str, list[Symbol]],
    blanks: list[str],
    letters: bool,
    closed: bool | None,
):
    before, between, inside, after = blanks
    symbols: list[Symbol] = [Tag.CALL, f"{before}{name}{between}"]
    for key, value in values.items():
        symbols += [Tag.KEY, key, Tag.END_KEY, inside, Tag.VALUE, *value, Tag.END_VALUE, between]
    symbols += [after, *([] if closed is None else [Tag.END_CALL if closed else Tag.CALL])]
    tools = {"f": {"additionalProperties": {"type": "string"}}}
    call = read([s for s in symbols if s], {**tools, name: tools["f"]}, letters=letters)
    assert (call.name, call.broken, call.rest) == (name, None, [])
    assert call.arguments == {key: "".join(map(written, value)) for key, value in values.items()}
    assert call.left is (Tag.CALL if closed is False else None)


PAIR = "<arg_key>k</arg_key>\n<arg_value>v</arg_value>"
BIG = "x" * MAX_NAME


@pytest.mark.parametrize(
    ("text", "name", "arguments"),
    [
        (f"<tool_call>f\n{PAIR}\n</tool_call>", "f", {"k": "v"}),
        (f"<tool_call>f{PAIR}</tool_call>", "f", {"k": "v"}),
        ("<tool_call>f\n</tool_call>", "f", {}),
        ("<tool_call>f</tool_call>", "f", {}),
        ("<tool_call>f", "f", {}),
        ("<tool_call>\n f \n", "f", {}),
        (f"<tool_call>f\n{BIG * 3}</tool_call>", "f", {}),
        (f"<tool_call>{BIG}</tool_call>", BIG, {}),
        # closing tags are missing
        (f"<tool_call>f\n{PAIR}", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>k<arg_value>v</arg_value></tool_call>", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>k</arg_key><arg_value>v</tool_call>", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>k</arg_key><arg_value>v</tool_call>\n ", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>k</arg_key><arg_value>v", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>n</arg_key><arg_value>12", "f", {"n": 12}),
        # left out: keys without values, values without keys, text and tags between them
        ("<tool_call>f<arg_key>k</arg_key></tool_call>", "f", {}),
        (f"<tool_call>f<arg_key>x</arg_key>{PAIR}</tool_call>", "f", {"k": "v"}),
        (f"<tool_call>f<arg_key>x{PAIR}</tool_call>", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>k", "f", {}),
        (f"<tool_call>f<arg_value>x</arg_value>{PAIR}</tool_call>", "f", {"k": "v"}),
        (f"<tool_call>f\nplease {PAIR} and {PAIR}, thanks</tool_call>", "f", {"k": "v"}),
        ('<tool_call>f\n{"k": "v"}\n</tool_call>', "f", {}),
        (f"<tool_call>f</arg_value></think>{PAIR}<think></arg_key></tool_call>", "f", {"k": "v"}),
        ("<tool_call>f<arg_key>k</arg_key>is<arg_value>v</arg_value></tool_call>", "f", {"k": "v"}),
        # the first of equal keys, and white space around them
        (
            f"<tool_call>f{PAIR}<arg_key>k</arg_key><arg_value>w</arg_value></tool_call>",
            "f",
            {"k": "v"},
        ),
        (
            "<tool_call>f<arg_key>\nk \n</arg_key><arg_value>v</arg_value></tool_call>",
            "f",
            {"k": "v"},
        ),
        ("<tool_call>f<arg_key></arg_key><arg_value>v</arg_value></tool_call>", "f", {"": "v"}),
        ("<tool_call>f<arg_key><think>k</arg_key><arg_value>v</tool_call>", "f", {"<think>k": "v"}),
        # an end of a call within a value
        (
            "<tool_call>f<arg_key>k</arg_key><arg_value>a</tool_call>\nb</arg_value></tool_call>",
            "f",
            {"k": "a</tool_call>\nb"},
        ),
        (
            "<tool_call>f<arg_key>k</arg_key><arg_value></tool_call> </tool_call></arg_value>",
            "f",
            {"k": "</tool_call> </tool_call>"},
        ),
        (
            "<tool_call>f<arg_key>k</arg_key><arg_value></tool_call> </tool_call>",
            "f",
            {"k": "</tool_call> "},
        ),
    ],
)
@pytest.mark.parametrize("letters", [False, True])
def test_what_a_call_becomes(text: str, name: str, arguments: dict[str, Any], letters: bool):
    call = read(text, letters=letters)
    assert (call.name, call.arguments, call.broken) == (name, arguments, None)
    assert (call.left, call.rest) == (None, [])


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>",
        "<tool_call>\n",
        "<tool_call></tool_call>",
        f"<tool_call>{PAIR}</tool_call>",
        "<tool_call>I will call f\n</tool_call>",
        '<tool_call>{"name": "f", "arguments": {"k": "v"}}</tool_call>',
        '<tool_call>\n{"name":"f"}\n</tool_call>',
        '<tool_call>f{"k":"v"}</tool_call>',
        '<tool_call>f(k="v")</tool_call>',
        "<tool_call>[f]\n",
        "<tool_call>f\0\n",
        f"<tool_call>{BIG}x\n</tool_call>",
        f"<tool_call>{' ' * MAX_HEADER}f</tool_call>",
        f"<tool_call>f{' ' * MAX_HEADER}\n</tool_call>",
        "<tool_call><tool_call>f</tool_call>",
        "<tool_call>\n</think></tool_call>",
    ],
)
@pytest.mark.parametrize("letters", [False, True])
def test_what_is_no_call_is_given_back(text: str, letters: bool):
    call = read(text, letters=letters)
    assert (call.parts, call.left in (None, *Tag)) == ([], True)
    left = "" if call.left is None else call.left.value
    assert (call.broken or "") + left + "".join(map(written, call.rest)) == text


def test_a_call_that_is_not_closed_ends_with_the_next():
    for text in (f"<tool_call>f{PAIR}", "<tool_call>f", f"<tool_call>f{PAIR}<arg_key>x"):
        call = read(f"{text}\n<tool_call>g")
        assert (call.name, call.left, call.rest) == ("f", Tag.CALL, ["g"])
    call = read("<tool_call>f<arg_key>k</arg_key><arg_value>v</tool_call>\n<tool_call>g")
    assert (call.arguments, call.left, call.rest) == ({"k": "v"}, Tag.CALL, ["g"])


WHOLE = f"<tool_call>f\n<arg_key>n</arg_key>\n<arg_value>12</arg_value>\n{PAIR}\n</tool_call>"


def test_truncation_leaves_out_what_is_not_sure():
    symbols = marked(WHOLE)
    calls = [read(symbols[:count], truncated=True) for count in range(1, len(symbols) + 1)]
    assert (calls[0].parts, calls[0].broken) == ([], None)
    stages = [{}, {"n": 12}, {"n": 12, "k": ""}, {"n": 12, "k": "v"}]
    reached = [stages.index(call.arguments) for call in calls[1:]]
    assert reached == sorted(reached)
    assert set(reached) == {0, 1, 2, 3}


def test_truncated_values():
    begin = "<tool_call>f<arg_key>{}</arg_key><arg_value>"
    assert read(begin.format("k") + "ab", truncated=True).arguments == {"k": "ab"}
    assert read(begin.format("k"), truncated=True).arguments == {"k": ""}
    assert read(begin.format("n") + "12", truncated=True).arguments == {}
    assert read(begin.format("n") + "12</tool_call>", truncated=True).arguments == {"n": 12}
    assert read("<tool_call>f", truncated=True).parts == []
    assert read("<tool_call>", truncated=True).broken is None
    assert read("<tool_call>f g", truncated=True).broken == "<tool_call>f g"


def test_the_name_comes_once_it_is_whole_and_a_string_as_it_arrives():
    reader = CallReader(3, TOOLS)
    assert [reader.take("f"), reader.take("\n")] == [[], [CallBegin(3, "f")]]
    for symbol in (Tag.KEY, "k", Tag.END_KEY):
        assert reader.take(symbol) == []
    pieces = [reader.take(symbol) for symbol in (Tag.VALUE, "a", "b<", Tag.END_VALUE, Tag.END_CALL)]
    texts = ['{"k": "', "a", "b<", '"', "}"]
    assert pieces == [[CallArguments(3, text)] for text in texts]


@given(st.text(max_size=8))
def test_names(name: str):
    odd = [c for c in name if c in ' "{}[]<>' or not c.isprintable()]
    assert is_name(name) == (name != "" and not odd)


def test_names_have_a_length():
    assert is_name(BIG)
    assert not is_name(BIG + "x")
