"""Tags and text out of tokens, as soon as they are sure."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from spelling import PLAIN, TAG_IDS, TAGGED, bytes_of, merged, spelled, without

from glmjax.text.lexer import Lexer, Symbol, Tag, tag_ids, written
from glmjax.text.tokenizer import Tokenizer

NASTY = ["<", "</", "<<", "<think", "ink>", "</tool_call", ">", "a", "é", "🎉", "\n"]
symbol_lists = st.lists(st.sampled_from([*Tag, *NASTY]), max_size=12)


def lexed(tokenizer: Tokenizer, ids: Iterable[int], skip: bool = True) -> list[Symbol]:
    """All symbols, text between two tags as one."""
    lexer = Lexer(tokenizer, skip)
    found = [symbol for token_id in ids for symbol in lexer.push(token_id)] + lexer.finish()
    assert "" not in found
    runs = [(kind, list(run)) for kind, run in groupby(found, type)]
    return [s for kind, run in runs for s in (["".join(run)] if kind is str else run)]  # pyright: ignore


@given(st.lists(st.integers(0, TAGGED.size + 3), max_size=30), st.booleans())
def test_any_tokens(ids: list[int], skip: bool):
    assert lexed(TAGGED, ids, skip) == merged(ids, TAGGED, skip)


def test_tags_have_tokens_or_none():
    assert tag_ids(TAGGED) == TAG_IDS
    assert tag_ids(PLAIN) == dict.fromkeys(Tag)


@given(symbol_lists)
def test_tags_that_are_tokens_are_known_by_their_ids_alone(symbols: list[Symbol]):
    text = "".join(map(written, symbols))
    assert lexed(TAGGED, bytes_of(text)) == ([text] if text else [])
    assert lexed(TAGGED, spelled(*symbols)) == merged(spelled(*symbols))


@given(symbol_lists)
def test_tags_that_are_no_tokens_are_found_in_letters(symbols: list[Symbol]):
    text = "".join(map(written, symbols))
    expected = merged(TAGGED.encode(text))  # its tokenizer finds tags in text, too
    assert lexed(PLAIN, bytes_of(text)) == lexed(PLAIN, PLAIN.encode(text)) == expected


@given(symbol_lists)
def test_only_what_may_become_a_tag_is_held_back(symbols: list[Symbol]):
    text, shown = "".join(map(written, symbols)), ""
    lexer = Lexer(PLAIN)
    for n, byte in enumerate(bytes_of(text), 1):
        shown += "".join(map(written, lexer.push(byte)))
        complete = text.encode()[:n].decode("utf-8", "ignore")
        held = complete.removeprefix(shown)
        assert complete == shown + held
        assert held == "" or any(tag.value.startswith(held) for tag in Tag)


@pytest.mark.parametrize("tag", Tag)
def test_every_tag(tag: Tag):
    assert Lexer(TAGGED).push(TAG_IDS[tag]) == [tag]
    assert lexed(PLAIN, bytes_of(f"<{tag.value}>")) == ["<", tag, ">"]


def test_half_a_character_before_a_tag_is_replaced():
    half = bytes_of("🎉")[:2]
    assert lexed(TAGGED, [*half, TAG_IDS[Tag.CALL], *half]) == ["\ufffd", Tag.CALL, "\ufffd"]


def test_special_tokens_are_text_where_asked():
    ids = [*bytes_of("a<th"), TAGGED.token_id("<|user|>"), *bytes_of("ink>")]
    assert lexed(TAGGED, ids, skip=False) == ["a<th<|user|>ink>"]
    assert lexed(TAGGED, ids) == ["a<think>"]
    assert lexed(PLAIN, ids) == ["a", Tag.THINK]


@given(symbol_lists)
@example(["<think", Tag.CALL, "ink>"])
def test_tags_of_which_some_are_tokens(symbols: list[Symbol]):
    """No tag in letters reaches over one that is a token."""
    mixed = without(TAGGED, Tag.THINK, Tag.END_CALL)
    found: list[Symbol] = []
    ids: list[int] = []
    for known, run in groupby(symbols, lambda s: isinstance(s, Tag) and bool(mixed.find(s.value))):
        letters = list(map(written, run))
        own = [mixed.token_id(text) for text in letters] if known else bytes_of("".join(letters))
        found += map(Tag, letters) if known else lexed(mixed, own)
        ids += own
    assert lexed(mixed, ids) == found
