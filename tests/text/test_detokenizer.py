"""Any text, in any tokens, with any stop strings: the stream says what the whole would."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from glmjax.bench.synthetic import make_tokenizer
from glmjax.text.detokenizer import Detokenizer, StopCutter
from glmjax.text.stops import StopMatcher
from glmjax.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer(make_tokenizer(512))
# The alphabet repeats itself, so that stop strings occur, and has characters of 1 to 4 bytes.
LETTERS = "abé€🎉"
texts = st.text(LETTERS, max_size=40)
stop_lists = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)


def byte_id(byte: int) -> int:
    """The token that is one byte."""
    return next(i for i in range(256) if TOKENIZER.token_bytes(i) == bytes([byte]))


BYTE_IDS = [byte_id(b) for b in range(256)]


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text before the stop string that is complete first (the longest of them), by definition."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def run(ids: list[int], stops: list[str], skip: bool = True) -> tuple[str, str | None, list[str]]:
    """All text, the match, and the pieces in which the text came."""
    detokenizer = Detokenizer(TOKENIZER, stops, skip)
    pieces = []
    for token_id in ids:
        pieces.append(detokenizer.push(token_id))
        if detokenizer.matched is not None:
            return "".join(pieces), detokenizer.matched, pieces
    pieces.append(detokenizer.finish())
    return "".join(pieces), detokenizer.matched, pieces


@st.composite
def token_splits(draw) -> tuple[str, list[int]]:
    """A text, cut into tokens anywhere: as the tokenizer would, or byte by byte, by turns."""
    text, ids = draw(texts), []
    for part in draw(st.lists(st.integers(0, 8), max_size=10)):
        piece, text = text[:part], text[part:]
        whole = draw(st.booleans())
        ids += TOKENIZER.encode(piece) if whole else [BYTE_IDS[b] for b in piece.encode()]
    return TOKENIZER.decode(ids), ids


@settings(max_examples=300)
@given(token_splits(), stop_lists)
def test_any_text_any_split_any_stop(split: tuple[str, list[int]], stops: list[str]):
    text, ids = split
    got, matched, pieces = run(ids, stops)
    assert (got, matched) == expected(text, stops)
    assert not any("\ufffd" in piece for piece in pieces), "half a character was shown"


@given(st.lists(st.integers(0, TOKENIZER.size - 1), max_size=40), stop_lists, st.booleans())
def test_any_tokens_even_no_text(ids: list[int], stops: list[str], skip: bool):
    text = TOKENIZER.decode(ids, skip)
    got, matched, _ = run(ids, [*stops, "\ufffd\ufffd"], skip)
    assert (got, matched) == expected(text, [*stops, "\ufffd\ufffd"])


@given(token_splits(), stop_lists)
def test_only_what_may_become_a_stop_is_held_back(split: tuple[str, list[int]], stops: list[str]):
    _, ids = split
    detokenizer, shown = Detokenizer(TOKENIZER, stops), ""
    data = b""
    for token_id in ids:
        shown += detokenizer.push(token_id)
        data += TOKENIZER.token_bytes(token_id)
        if detokenizer.matched is not None:
            return
        complete = data.decode("utf-8", "ignore")
        held = complete.removeprefix(shown)
        assert complete == shown + held
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_an_emoji_comes_whole():
    ids = [BYTE_IDS[b] for b in "a🎉b".encode()]
    _, _, pieces = run(ids, [])
    assert pieces == ["a", "", "", "", "🎉", "b", ""]


def test_half_an_emoji_at_the_end_is_replaced():
    ids = [BYTE_IDS[b] for b in "a🎉".encode()[:-1]]
    assert run(ids, [])[0] == "a\ufffd"


def test_a_stop_that_did_not_come_is_shown():
    ids = TOKENIZER.encode("the end")
    assert run(ids, ["ending"])[0] == "the end"


def test_special_tokens_are_text_where_asked():
    ids = [*TOKENIZER.encode("a"), TOKENIZER.token_id("<|user|>"), *TOKENIZER.encode("<think>b")]
    assert run(ids, [])[0] == "a<think>b"
    assert run(ids, [], skip=False)[0] == "a<|user|><think>b"
    assert run(ids, ["<|user|>"], skip=False)[:2] == ("a", "<|user|>")


def test_work_is_linear_in_the_length():
    """Counts automaton steps rather than time: at most two for each character."""
    stops = ["a" * 60 + "b", "ab" * 20 + "c"]
    cutter, matcher, count = StopCutter(stops), StopMatcher(stops), 0
    real = matcher._next

    class Counting(list):
        def __getitem__(self, index):
            nonlocal count
            count += 1
            return real[index]

    matcher._next = Counting()
    cutter._matcher = matcher
    text = ("a" * 49 + "ab" * 19 + "a") * 50
    shown = "".join(map(cutter.push, text))
    assert (cutter.matched, shown + cutter.finish()) == (None, text)
    assert len(text) < count <= 5 * len(text)


@given(texts, st.integers(1, 5), stop_lists)
def test_a_cutter_may_begin_anew(text: str, size: int, stops: list[str]):
    """Behind `finish`, what was held before counts no more."""
    cutter = StopCutter(stops)
    shown = "".join(cutter.push(text[i : i + size]) for i in range(0, len(text), size))
    if cutter.matched is not None:
        return
    assert shown + cutter.finish() == text
    again, matched = expected(text, stops)
    assert (cutter.push(text) + cutter.finish(), cutter.matched) == (again, matched)
