"""Texts cut at added tokens, encoded in pieces, against the library on whole texts."""

from __future__ import annotations

import threading

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from glmjax.bench.synthetic import SPECIAL_TOKENS, make_tokenizer
from glmjax.text.pieces import ENTRY_BYTES, PieceEncoder

# Beginnings of each other, ends that begin another; LATER is found in what those leave only.
ADDED = ("<a>", "<a><b>", "<b>", "b>c", "/no", "/nothink")
LATER = AddedToken("x<a", normalized=True)


def with_added(**flags: bool) -> tokenizers.Tokenizer:
    backend = make_tokenizer(512)
    backend.add_tokens([AddedToken(name, normalized=False, **flags) for name in ADDED])
    backend.add_tokens([LATER])
    return backend


PLAIN = with_added()
BACKENDS = [make_tokenizer(512), PLAIN, *(with_added(**{f: True}) for f in ("lstrip", "rstrip"))]
BACKENDS.append(with_added(single_word=True))
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
scraps = st.sampled_from(
    [*SPECIAL_TOKENS, *ADDED, "<", "x<a", "x", "b>", "/", " ", "\n", "a", "<|user"]
)
texts = st.lists(st.lists(words | scraps, max_size=12).map("".join), max_size=4)


@pytest.mark.parametrize("backend", BACKENDS)
@given(batches=st.lists(texts, max_size=3), room=st.sampled_from([0, 3 * ENTRY_BYTES, 2**20]))
def test_pieces_are_the_whole(backend: tokenizers.Tokenizer, batches: list[list[str]], room: int):
    encoder = PieceEncoder(backend, room)
    for batch in [*batches, *batches]:
        whole = [e.ids for e in backend.encode_batch(batch, add_special_tokens=False)]
        assert encoder.encode_batch(batch) == whole


class Counting:
    """A backend that tells what it is asked to encode."""

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        self.asked: list[str] = []

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> list:
        self.asked += texts
        return self._backend.encode_batch_fast(texts, add_special_tokens)

    def __getattr__(self, name: str):
        return getattr(self._backend, name)


def test_only_what_is_new_is_encoded():
    backend = Counting(PLAIN)
    encoder = PieceEncoder(backend)  # type: ignore[arg-type]
    (ids,) = encoder.encode_batch(["<a>one<b>two<a>one"])
    assert backend.asked == ["one", "two"]
    assert encoder.encode_batch(["<a>one<b>two<a>one", "<b>two<b>three"])[0] == ids
    assert backend.asked == ["one", "two", "three"]


def test_the_latest_are_kept():
    backend = Counting(PLAIN)
    encoder = PieceEncoder(backend, 2 * ENTRY_BYTES + 100)  # type: ignore[arg-type]
    long = "w" * 5000  # larger than all room: never kept, and pushes nothing out
    for text in ("one", "two", "one", long, "three", "one", long, "two"):
        encoder.encode_batch([text])
    assert backend.asked == ["one", "two", long, "three", long, "two"]


def test_many_threads():
    encoder = PieceEncoder(PLAIN, 20 * ENTRY_BYTES)
    batch = [f"<a>{i}<b>{i * i}" for i in range(40)]
    whole = [e.ids for e in PLAIN.encode_batch(batch, add_special_tokens=False)]
    wrong: list[int] = []

    def work() -> None:
        wrong.extend(i for i in range(50) if encoder.encode_batch(batch) != whole)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
