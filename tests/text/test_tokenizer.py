"""The tokenizer against the library that wrote it."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from glmjax.bench.synthetic import CONTROL_TOKENS, SPECIAL_TOKENS, make_tokenizer
from glmjax.errors import CheckpointError, InvalidRequestError
from glmjax.text.tokenizer import Tokenizer

VOCAB = 512
BACKEND = make_tokenizer(VOCAB)
TOKENIZER = Tokenizer(BACKEND)
token_ids = st.lists(st.integers(0, TOKENIZER.size - 1), max_size=40)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives(text: str):
    assert TOKENIZER.decode(TOKENIZER.encode(text), skip_special_tokens=False) == text


@given(token_ids, st.booleans())
def test_decoding_is_the_librarys(ids: list[int], skip: bool):
    assert TOKENIZER.decode(ids, skip) == BACKEND.decode(ids, skip_special_tokens=skip)


def test_special_tokens_are_found_by_name_and_in_text():
    for name in SPECIAL_TOKENS:
        assert TOKENIZER.encode(name) == [TOKENIZER.token_id(name)]
    assert TOKENIZER.special_ids == {TOKENIZER.token_id(name) for name in CONTROL_TOKENS}


def test_encoding_adds_nothing(tmp_path):
    backend = make_tokenizer(VOCAB)
    sop = backend.token_to_id("<sop>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<sop> $A", special_tokens=[("<sop>", sop)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=10)
    backend.save(str(tmp_path / "tokenizer.json"))
    ids = Tokenizer.from_folder(tmp_path).encode("hello world")
    assert ids == TOKENIZER.encode("hello world")


def test_ids_beyond_the_vocabulary_are_no_text():
    assert TOKENIZER.decode([*TOKENIZER.encode("a"), TOKENIZER.size + 3]) == "a"


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(InvalidRequestError, match="surrogate"):
        TOKENIZER.encode("\ud83d")


def test_unknown_token_name():
    with pytest.raises(CheckpointError, match="no token '<nope>'"):
        TOKENIZER.token_id("<nope>")


def test_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", json.dumps({"model": 3}), "[]"])
def test_damaged_file(tmp_path, content: str):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        Tokenizer.from_folder(tmp_path)


def test_another_decoder_is_refused():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece decoder, expected ByteLevel"):
        Tokenizer(backend)
