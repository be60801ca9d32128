"""Any tokens, in any steps: what a reader makes of them, against plain definitions."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st
from spelling import (
    BEYOND,
    PLAIN,
    SPECIAL_IDS,
    TAG_IDS,
    TAGGED,
    TAGS_BY_ID,
    Chunks,
    bytes_of,
    cut,
    merged,
    read,
    spelled,
)

from glmjax.text.lexer import Symbol, Tag, written
from glmjax.text.parts import CallArguments, CallBegin
from glmjax.text.reader import Opening, Reading
from glmjax.text.tool_calls import is_name
from glmjax.types import FinishReason

TOOLS: dict[str, Any] = {
    "f": {"type": "object", "properties": {"k": {"type": "string"}, "n": {"type": "integer"}}},
    "get": None,
}
# Text that looks like something else, in letters: none of it is a tag.
NASTY = [
    "\n",
    " ",
    "\r\n",
    "\t",
    "a",
    "hi there",
    "<",
    "</",
    "</arg",
    "</arg_value>",
    "<tool_call>",
]
NASTY += ["<think>", "</think>", "é", "🎉", "{", "}", '"', "\\", "f", "f\n", "get", "k", "n", "12"]
NASTY += ["null", "NaN", "1e999", "[1,", "]", "\u2028", "\u00a0", "\0", "x" * 300, " " * 530, "f g"]
CALL = ["f", "\n", Tag.KEY, "k", Tag.END_KEY, "\n", Tag.VALUE, "v", Tag.END_VALUE, "\n"]
CALL = [Tag.CALL, *CALL, Tag.KEY, "n", Tag.END_KEY, Tag.VALUE, "1", Tag.END_VALUE, Tag.END_CALL]
ANSWER = ["\n", Tag.THINK, "hm", "\n", Tag.END_THINK, "\n", "hi", "\n", *CALL, "\n", *CALL, "\n"]

texts = st.sampled_from(NASTY)
tags = st.sampled_from(list(Tag))
symbol_lists = st.lists(tags | texts, max_size=16)


@st.composite
def damaged_answers(draw: st.DrawFn) -> list[Symbol]:
    """A usual answer in which a few things are missing, twice there or something else."""
    symbols: list[Symbol] = list(ANSWER)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(symbols) - 1))
        symbols[at : at + draw(st.integers(0, 2))] = draw(st.lists(tags | texts, max_size=2))
    return symbols[draw(st.integers(0, 8)) :]


answers = symbol_lists | damaged_answers()
odd_tokens = st.one_of(
    st.sampled_from([[BEYOND], bytes_of("🎉")[:2], bytes_of("🎉")[2:], bytes_of("é")[:1]]),
    st.sampled_from(SPECIAL_IDS).map(lambda i: [i]),
    st.integers(0, TAGGED.size - 1).map(lambda i: [i]),
)


@st.composite
def streams(draw: st.DrawFn) -> list[int]:
    """Tokens of an answer, with some among them that are no text."""
    ids = spelled(*draw(answers))
    for odd in draw(st.lists(odd_tokens, max_size=3)):
        at = draw(st.integers(0, len(ids)))
        ids[at:at] = odd
    return ids


readings = st.builds(
    Reading, st.sampled_from([None, {}, TOOLS]), st.booleans(), st.booleans(), st.booleans()
)
openings = st.builds(Opening, st.booleans(), st.booleans())
stop_lists = st.lists(st.sampled_from([*NASTY[:-3], "v", "hm", "\ufffd", "\n\n"]), max_size=3)
ends = st.sampled_from(list(FinishReason))
step_sizes = st.lists(st.integers(1, 8), min_size=1, max_size=4)


@settings(max_examples=250)
@given(
    streams(), readings, openings, stop_lists, ends, step_sizes, st.booleans(), st.integers(0, 99)
)
@example(spelled(" ", "hello"), Reading(), Opening(), [" "], FinishReason.STOP, [1], True, 0)
@example(
    spelled(Tag.CALL, " " * 300, "x" * 100, "\n"),
    Reading(TOOLS),
    Opening(),
    [],
    FinishReason.STOP,
    [1],
    True,
    0,
)
def test_parts_do_not_depend_on_tokens_and_steps(
    ids: list[int],
    reading: Reading,
    opening: Opening,
    stops: list[str],
    end: FinishReason,
    steps: list[int],
    skip: bool,
    seed: int,
):
    chunks, symbols = Chunks(TAGGED), merged(ids, skip=skip)
    whole = [TAG_IDS[s] if isinstance(s, Tag) else chunks.learn(s) for s in symbols]
    spellings = [whole, cut(chunks, symbols, seed), ids]
    found = [
        read(spelling, reading, opening, stops, tokenizer=chunks, end=end, steps=sizes, skip=skip)
        for spelling in spellings
        for sizes in ([1], steps)
    ]
    assert all(answer.parts == found[0].parts for answer in found)
    assert len({(answer.end, answer.matched) for answer in found}) == 1
    assert found[4].reasoning_tokens == found[5].reasoning_tokens


@settings(max_examples=12)
@given(streams(), readings, openings, stop_lists, ends)
def test_any_two_steps_say_the_same(
    ids: list[int], reading: Reading, opening: Opening, stops: list[str], end: FinishReason
):
    at_once = read(ids, reading, opening, stops, end=end, steps=[len(ids) + 1])
    for first in range(1, len(ids)):
        split = read(ids, reading, opening, stops, end=end, steps=[first, len(ids)])
        assert split[:4] == at_once[:4]


LETTERS = re.compile("(" + "|".join(tag.value for tag in Tag) + ")")


def found_in(text: str) -> list[Symbol]:
    """A text in which tags that are written out count."""
    return [Tag(piece) if LETTERS.fullmatch(piece) else piece for piece in LETTERS.split(text)]


@settings(max_examples=150)
@given(answers, readings, openings, stop_lists, ends, step_sizes, st.integers(0, 99))
def test_tags_in_letters_are_found_where_they_are_no_tokens(
    symbols: list[Symbol],
    reading: Reading,
    opening: Opening,
    stops: list[str],
    end: FinishReason,
    steps: list[int],
    seed: int,
):
    text = "".join(map(written, symbols))
    expected = read(spelled(*found_in(text)), reading, opening, stops, end=end)
    chunks = Chunks(PLAIN)
    for ids in (bytes_of(text), PLAIN.encode(text), cut(chunks, [text], seed)):
        got = read(ids, reading, opening, stops, tokenizer=chunks, end=end, steps=steps)
        assert (got.parts, got.end, got.matched) == (expected.parts, expected.end, expected.matched)


# Thoughts and text by definition: of a text in which the tags of thoughts are these two letters.
THINK, END = "\ue000", "\ue001"
THOUGHT = re.compile(rf"\s*(?:{THINK}([^{END}]*)(?:{END}|\Z)|{END})")


def said(symbols: Sequence[Symbol], opening: Opening) -> tuple[str, str, str]:
    """Of an answer without calls the thought, all that it is written as, and the text."""
    marks = {Tag.THINK: THINK, Tag.END_THINK: END}
    text = "".join(marks.get(s) or written(s) for s in symbols)  # pyright: ignore
    rest, thoughts = (THINK if opening.in_thought else "") + text, []
    while (opening.fresh or opening.in_thought) and (match := THOUGHT.match(rest)):
        rest, thought = rest[match.end() :], match[1] or ""
        middle = opening.in_thought and not opening.fresh and not thoughts
        thoughts.append((thought if middle else re.sub(rf"\A[\s{THINK}]*", "", thought)).rstrip())
    begun = (THINK if opening.in_thought else "") + text
    return tuple(map(_letters, ("".join(thoughts), begun.removesuffix(rest), rest)))


def without_front(text: str) -> str:
    """Without blank lines before it."""
    return re.sub(r"\A\s*[\r\n]", "", text) if text.strip() else ""


def _letters(text: str) -> str:
    return text.replace(THINK, "<think>").replace(END, "</think>")


def cut_off(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text before the stop string that is complete first, and the longest such one."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=150)
@given(streams(), openings, st.booleans(), st.booleans(), stop_lists, ends)
def test_thought_and_text_are_what_the_definition_says(
    ids: list[int],
    opening: Opening,
    separate: bool,
    stream: bool,
    stops: list[str],
    end: FinishReason,
):
    got = read(ids, Reading(None, separate, stream), opening, stops, end=end)
    symbols = merged(ids)
    reasoning, thought, rest = said(symbols, opening)
    if (opening.fresh or opening.in_thought) and (separate or not thought):
        rest = without_front(rest)
    content, matched = cut_off(rest, stops)
    if not separate:
        reasoning, content = "", thought.removeprefix("<think>" * opening.in_thought) + content
    assert (got.message.reasoning, got.message.content) == (reasoning, content)
    assert (got.matched, got.end) == (matched, end if matched is None else FinishReason.STOP)
    assert not got.message.calls


@settings(max_examples=150)
@given(streams(), readings, openings)
def test_what_is_no_call_is_given_back_in_full(ids: list[int], reading: Reading, opening: Opening):
    got = read(ids, reading, opening)
    if not got.message.calls:
        assert got == read(ids, replace(reading, tools=None), opening)


@settings(max_examples=120)
@given(streams(), readings, openings, stop_lists, ends, st.booleans())
def test_thoughts_are_counted(
    ids: list[int],
    reading: Reading,
    opening: Opening,
    stops: list[str],
    end: FinishReason,
    skip: bool,
):
    got = read(ids, reading, opening, stops, end=end, skip=skip)
    inside, waiting = opening.in_thought, opening.in_thought or opening.fresh
    begin = count = 0
    for i, token_id in enumerate(got.token_ids):
        tag = TAGS_BY_ID.get(token_id)
        if inside:
            inside, begin = tag is not Tag.END_THINK, i + 1
            count += inside
        elif tag is not None:
            blank = not TAGGED.decode(got.token_ids[begin:i], skip).strip()
            waiting = waiting and blank and tag in (Tag.THINK, Tag.END_THINK)
            inside, begin = waiting and tag is Tag.THINK, i + 1
    assert got.reasoning_tokens == count


@settings(max_examples=150)
@given(streams(), readings, openings, st.data())
def test_arguments_are_json_however_they_end(
    ids: list[int], reading: Reading, opening: Opening, data: st.DataObject
):
    ids = ids[: data.draw(st.integers(0, len(ids)))]
    got = read(ids, reading, opening, end=data.draw(ends))
    for call in got.message.calls:
        assert is_name(call.name)
        assert json.loads(call.arguments).keys() == orjson.loads(call.arguments).keys()
    calls = [part for part in got.parts if isinstance(part, CallBegin | CallArguments)]
    begun = [part for pair in zip(calls[::2], calls[1::2], strict=True) for part in pair]
    assert [(type(part), part.call) for part in begun] == [
        (kind, call) for call in range(len(calls) // 2) for kind in (CallBegin, CallArguments)
    ]


@settings(max_examples=120)
@given(streams(), openings, st.booleans(), st.booleans())
def test_with_one_call_at_most_the_answer_ends_with_it(
    ids: list[int], opening: Opening, separate: bool, stream: bool
):
    reading = Reading(TOOLS, separate, stream, parallel=False)
    got, all_of_it = (read(ids, r, opening) for r in (reading, replace(reading, parallel=True)))
    calls = [i for i, part in enumerate(all_of_it.parts) if isinstance(part, CallArguments)]
    assert got.parts == all_of_it.parts[: calls[0] + 1 if calls else None]


@given(streams(), readings, openings)
def test_thoughts_in_one_piece_are_those_in_many(
    ids: list[int], reading: Reading, opening: Opening
):
    one, many = (read(ids, replace(reading, stream_reasoning=s), opening) for s in (False, True))
    assert one[:4] == many[:4]
