"""Tasks on a short line of text: copy it, find something in it, count, reverse, capitalise."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from glmjax.train.data import words
from glmjax.train.data.problem import Exchange, Problem, Split, conversation
from glmjax.train.data.splits import redraw

Maker = Callable[[random.Random, bool], Exchange]
MAX_COUNT = 12
MAX_COUNT_AT_ONCE = 5


class Target(NamedTuple):
    """Something to find in a line.

    Attributes:
        noun: what the question calls it.
        value: draws it.
        shown: how it stands in the line.
    """

    noun: str
    value: Callable[[random.Random], str]
    shown: str = "{v}"


TARGETS = (
    Target("number", lambda rng: str(words.number(rng, 4))),
    Target("email", words.email),
    Target("code", words.code),
    Target("name", words.name),
    Target("word in quotes", words.word, '"{v}"'),
    Target("word in brackets", words.word, "({v})"),
)
COPY = (
    "Repeat exactly: {x}",
    "Repeat: {x}",
    "Copy this: {x}",
    "Copy exactly: {x}",
    "Say: {x}",
    "Say exactly this: {x}",
    "Echo: {x}",
    "Write this again: {x}",
    "Please repeat: {x}",
    "Repeat after me: {x}",
)
EXTRACT = (
    "Find the {n}: {x}",
    "What is the {n} in: {x}",
    "Extract the {n}: {x}",
    "Give me the {n} in this: {x}",
    "Which {n} is in: {x}",
    "Get the {n} from: {x}",
    "{x}\nWhat is the {n}?",
    "{x}\nFind the {n}.",
    "{x}\nWhich {n} is in this line?",
    "Here is a line: {x}\nExtract the {n}.",
)
COUNT_ITEMS = (
    "How many items: {x}",
    "Count the items: {x}",
    "How many items are in this list: {x}",
    "Count: {x}",
    "How many words are there: {x}",
    "Count the words: {x}",
    "{x}\nHow many items?",
    "{x}\nCount them.",
    "What is the number of items in: {x}",
    "Please count these: {x}",
)
COUNT_WORD = (
    "How often does {w} occur: {x}",
    "How many times does {w} occur in: {x}",
    "Count {w} in: {x}",
    "How many {w} are in: {x}",
    "{x}\nHow often is {w} in it?",
    "{x}\nCount {w}.",
)
REVERSE = (
    "Reverse the order: {x}",
    "Reverse the words: {x}",
    "Write these words backwards: {x}",
    "Turn the order around: {x}",
    "Last word first: {x}",
    "Reverse: {x}",
)
UPPER = (
    "Write in capitals: {x}",
    "Upper case: {x}",
    "Make it upper case: {x}",
    "In capital letters: {x}",
    "Capitals: {x}",
    "Write {x} in upper case.",
)


def copy(rng: random.Random, thinking: bool) -> Exchange:
    """A line of 1 to 8 words, names, numbers and codes, to be written again."""
    makers = (words.word, words.any_word, words.name, words.code, lambda r: str(words.number(r, 4)))
    pieces = [rng.choice(makers)(rng) for _ in range(rng.randint(1, 8))]
    line = rng.choice((" ", " ", " ", ", ")).join(pieces)
    return Exchange(_ask(rng, COPY, x=line), "Copy the text.", line)


def extract(rng: random.Random, thinking: bool) -> Exchange:
    """One thing of another kind than the rest of the line, or the word after a given one."""
    if rng.random() < 0.25:
        return _word_after(rng)
    target, other = rng.sample(TARGETS, 2)
    value = target.value(rng)
    pieces = [rng.choice(words.PLAIN_WORDS) for _ in range(rng.randint(2, 6))]
    if rng.random() < 0.6:
        pieces.insert(rng.randint(0, len(pieces)), other.shown.format(v=other.value(rng)))
    pieces.insert(rng.randint(0, len(pieces)), target.shown.format(v=value))
    user = _ask(rng, EXTRACT, n=target.noun, x=" ".join(pieces))
    return Exchange(user, f"{target.noun}: {value}", value)


def count(rng: random.Random, thinking: bool) -> Exchange:
    """Items of a list, or how often one word occurs; short lists only without thinking."""
    most = MAX_COUNT if thinking else MAX_COUNT_AT_ONCE
    if rng.random() < 0.6:
        items = [words.any_word(rng) for _ in range(rng.randint(1, most))]
        thought = "\n".join(f"{n} {item}" for n, item in enumerate(items, 1))
        return Exchange(_ask(rng, COUNT_ITEMS, x=", ".join(items)), thought, str(len(items)))
    kinds = rng.sample(words.PLAIN_WORDS, 3)
    items = [rng.choice((kinds[0], *kinds)) for _ in range(rng.randint(2, most))]
    so_far = [f"{item} {items[: i + 1].count(kinds[0])}" for i, item in enumerate(items)]
    user = _ask(rng, COUNT_WORD, w=kinds[0], x=" ".join(items))
    return Exchange(user, "\n".join(so_far), str(items.count(kinds[0])))


def reverse(rng: random.Random, thinking: bool) -> Exchange:
    """2 to 6 words in the opposite order."""
    items = [words.any_word(rng) for _ in range(rng.randint(2, 6))]
    thought = "\n".join(f"{n} {item}" for n, item in reversed([*enumerate(items, 1)]))
    return Exchange(_ask(rng, REVERSE, x=" ".join(items)), thought, " ".join(reversed(items)))


def upper(rng: random.Random, thinking: bool) -> Exchange:
    """One word in capital letters; the thought spells it."""
    text = words.any_word(rng)
    return Exchange(_ask(rng, UPPER, x=text), "-".join(text), text.upper())


# Task -> its maker and how often it thinks.
MAKERS: dict[str, tuple[Maker, float]] = {
    "copy": (copy, 0.3),
    "extract": (extract, 0.3),
    "count": (count, 0.7),
    "reverse": (reverse, 0.5),
    "upper": (upper, 0.5),
}


def exchange(rng: random.Random, split: Split, task: str, thinking: bool) -> Exchange:
    """One question of `task`; the split is decided by the line without its wording."""
    maker, _ = MAKERS[task]
    return redraw(
        split, lambda: maker(rng, thinking), lambda item: f"{task} {item.thought} {item.answer}"
    )


def generate(rng: random.Random, split: Split, task: str) -> Problem:
    """A problem of one question; `task` is a key of MAKERS."""
    thinking = rng.random() < MAKERS[task][1]
    return conversation(task, [exchange(rng, split, task, thinking)], thinking)


def _word_after(rng: random.Random) -> Exchange:
    pieces = rng.sample(words.PLAIN_WORDS, rng.randint(3, 7))
    at = rng.randrange(len(pieces) - 1)
    user = _ask(rng, EXTRACT, n=f"word after {pieces[at]}", x=" ".join(pieces))
    return Exchange(user, f"{pieces[at]} {pieces[at + 1]}", pieces[at + 1])


def _ask(rng: random.Random, wordings: tuple[str, ...], **parts: str) -> str:
    return rng.choice(wordings).format(**parts)
