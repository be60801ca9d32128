"""The trained tokenizer: deterministic, lossless, digits apart, words the same everywhere."""

from __future__ import annotations

import random

import pytest

from glmjax.bench.synthetic import CONTROL_TOKENS, SPECIAL_TOKENS
from glmjax.errors import ConfigError
from glmjax.text.tokenizer import Tokenizer
from glmjax.train.data import words
from glmjax.train.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(seed=0, vocab_size=1024, conversations=1500))


def test_same_arguments_same_tokenizer():
    first, second = (train_tokenizer(seed=5, vocab_size=400, conversations=200) for _ in range(2))
    assert first.to_str() == second.to_str()


def test_special_tokens_are_last_and_single(tokenizer: Tokenizer):
    ids = [tokenizer.token_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(1024 - len(SPECIAL_TOKENS), 1024))
    assert tokenizer.size == 1024
    assert tokenizer.special_ids == {tokenizer.token_id(token) for token in CONTROL_TOKENS}
    assert tokenizer.encode("".join(SPECIAL_TOKENS)) == ids


def test_digits_are_single_tokens(tokenizer: Tokenizer):
    assert len(tokenizer.encode("4821")) == 4
    assert tokenizer.encode("48") == [*tokenizer.encode("4"), *tokenizer.encode("8")]


@pytest.mark.parametrize(
    "text", ["a  b\n\n c", "Größe 北京 🙂", 'it\'s {"a": [1, 2]}', " \t x", ""]
)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_has_the_same_tokens_wherever_it_stands(tokenizer: Tokenizer):
    rng = random.Random(0)
    for _ in range(100):
        word = words.name(rng) if rng.random() < 0.5 else words.word(rng)
        alone, inside = tokenizer.encode(word), tokenizer.encode(f'in {word}, "{word}"')
        text = " ".join(map(str, inside))
        assert text.count(" ".join(map(str, alone))) == 2


def test_the_scaffold_of_a_tool_is_short(tokenizer: Tokenizer):
    assert len(tokenizer.encode('{"type": "function", "function": {"name": "')) <= 9


def test_sizes_that_cannot_be():
    with pytest.raises(ConfigError, match="expected 277 or more"):
        train_tokenizer(seed=0, vocab_size=200, conversations=10)
    with pytest.raises(ConfigError, match="give more of them"):
        train_tokenizer(seed=0, vocab_size=9000, conversations=10)
