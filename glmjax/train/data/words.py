"""Random words, names, numbers and codes: values that a model can copy but not know by heart."""

from __future__ import annotations

import random

CONSONANTS = "bdfgjklmnprstvz"
VOWELS = "aeiou"
FINALS = ("", "", "", "l", "n", "r", "s")
_PLAIN = (
    "apple pear plum fig lemon grape bread milk cheese rice table chair lamp door window river "
    "hill stone tree leaf bird cat dog fish horse boat car train book paper pen cup plate spoon "
    "shirt shoe hat coat ring clock key box bag rope wheel road house garden sun moon star cloud "
    "rain snow wind fire salt sugar tea coffee soup"
)
_COLORS = "red blue green yellow black white brown orange purple pink gray gold"
PLAIN_WORDS = tuple(_PLAIN.split())
COLORS = tuple(_COLORS.split())
DOMAINS = ("com", "org", "net")


def syllables(rng: random.Random, count: int) -> str:
    """Consonant and vowel in turn, maybe a last consonant: "tarelo", "mipol"."""
    open_ = "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))
    return open_ + rng.choice(FINALS)


def word(rng: random.Random) -> str:
    """A made-up word in lower case."""
    return syllables(rng, rng.randint(2, 3))


def name(rng: random.Random) -> str:
    """A made-up proper name."""
    return word(rng).capitalize()


def any_word(rng: random.Random) -> str:
    """A common English word or a made-up one."""
    return rng.choice(PLAIN_WORDS) if rng.random() < 0.5 else word(rng)


def number(rng: random.Random, max_digits: int) -> int:
    """Every count of digits is equally likely."""
    digits = rng.randint(1, max_digits)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def code(rng: random.Random) -> str:
    """Two capital letters and two digits or three: "QX41"."""
    letters = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(2))
    return letters + "".join(rng.choice("0123456789") for _ in range(rng.randint(2, 3)))


def email(rng: random.Random) -> str:
    """A made-up address."""
    return f"{word(rng)}@{word(rng)}.{rng.choice(DOMAINS)}"
