"""A byte-level BPE tokenizer trained on the mixture itself."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from glmjax.bench.synthetic import CHAT_TEMPLATE, CONTROL_TOKENS, SPECIAL_TOKENS, TEXT_TOKENS
from glmjax.errors import ConfigError
from glmjax.text.chat import ChatTemplate
from glmjax.train.data.encode import render
from glmjax.train.data.mixture import draw

# A word never takes the space before it along, so it has the same tokens wherever it stands, and
# copying it is copying tokens. Marks that only spaces part are one piece, such as JSON's `": {"`.
LOWER, MARK = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\s\p{L}\p{N}]"
PIECES = Regex(
    rf"'(?:s|t|re|ve|m|ll|d)\b|\p{{Lu}}?{LOWER}+|\p{{Lu}}| ?{MARK}+(?: {MARK}+)*|\n+| +|\s"
)
SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


def train_tokenizer(seed: int, vocab_size: int, conversations: int) -> Tokenizer:
    """Train on conversations of the train split; the same arguments give the same tokenizer.

    All 256 bytes are in it, digits are never merged, and the special tokens have the last ids.

    Raises:
        ConfigError: `vocab_size` is too small for bytes and special tokens, or too large for what
            `conversations` can teach.
    """
    size = vocab_size - len(SPECIAL_TOKENS)
    if size < 256:
        raise ConfigError(
            f"vocab_size is {vocab_size}, expected {256 + len(SPECIAL_TOKENS)} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(_texts(seed, conversations), _trainer(size))
    if tokenizer.get_vocab_size() < size:
        raise ConfigError(
            f"{conversations} conversations give {tokenizer.get_vocab_size()} tokens of the {size} "
            f"wanted; give more of them, or a smaller vocab_size"
        )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in TEXT_TOKENS])
    return tokenizer


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _trainer(size: int) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )


def _texts(seed: int, conversations: int) -> Iterator[str]:
    """Rendered conversations, cut where special tokens stand: those are never merged."""
    rng = random.Random(seed)
    template = ChatTemplate(CHAT_TEMPLATE.read_text("utf-8"))
    for _ in range(conversations):
        yield from filter(None, SPECIAL.split(render(draw(rng, "train"), template)))
