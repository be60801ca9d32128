"""Two or three turns: something told and asked later, small talk, arithmetic that goes on."""

from __future__ import annotations

import random

from glmjax.train.data import arithmetic, english, facts, lines, words
from glmjax.train.data.problem import Exchange, Problem, Split, conversation
from glmjax.train.data.splits import redraw

TOLD_NAME = ("My name is {v}.", "I am {v}.", "Call me {v}.", "I'm {v}.", "Hello, I am {v}.")
ASKED_NAME = (
    "What is my name?",
    "Who am I?",
    "Do you remember my name?",
    "What's my name?",
    "Tell me my name.",
    "Say my name.",
)
TOLD_FACT = ("My {a} is {v}.", "Remember: my {a} is {v}.", "Note that my {a} is {v}.")
ASKED_FACT = (
    "What is my {a}?",
    "What's my {a}?",
    "Tell me my {a}.",
    "Do you remember my {a}?",
    "My {a}?",
    "Which {a} did I tell you?",
)
GO_ON = {
    "add": ("Add {b} to that.", "Plus {b}?", "Now add {b}.", "And {b} more?", "Add {b}."),
    "subtract": ("Subtract {b} from that.", "Minus {b}?", "Now subtract {b}.", "Take {b} away."),
}
MAX_GO_ON = 9
ENDS_TOLD = 0.2


def generate(rng: random.Random, split: Split) -> Problem:
    """A problem of 1 to 3 turns; the model answers the last one."""
    thinking = rng.random() < 0.4
    kind = rng.choices((_recall_name, _recall_fact, _sum_goes_on, _mixed), (3, 3, 2, 2))[0]
    return conversation("multi_turn", kind(rng, split, thinking), thinking)


def _recall_name(rng: random.Random, split: Split, thinking: bool) -> list[Exchange]:
    name = redraw(split, lambda: words.name(rng), lambda value: f"my name is {value}")
    thought = f"name: {name}"
    told = Exchange(rng.choice(TOLD_NAME).format(v=name), thought, f"Hello {name}!")
    asked = Exchange(rng.choice(ASKED_NAME), thought, name)
    return _told_and_asked(rng, split, told, asked)


def _recall_fact(rng: random.Random, split: Split, thinking: bool) -> list[Exchange]:
    def draw() -> tuple[str, str]:
        relation = rng.choice(facts.RELATIONS)
        return relation.attribute, relation.value(rng)

    noun, value = redraw(split, draw, lambda pair: f"my {pair[0]} is {pair[1]}")
    thought = f"{noun}: {value}"
    told = Exchange(rng.choice(TOLD_FACT).format(a=noun, v=value), thought, "I will remember it.")
    asked = Exchange(rng.choice(ASKED_FACT).format(a=noun), thought, value)
    return _told_and_asked(rng, split, told, asked)


def _told_and_asked(
    rng: random.Random, split: Split, told: Exchange, asked: Exchange
) -> list[Exchange]:
    """Mostly told, then asked; else it ends where it is told, so that this answer is learnt too."""
    between = [_any(rng, split, thinking=False)] if rng.random() < 0.4 else []
    return [*between, told] if rng.random() < ENDS_TOLD else [told, *between, asked]


def _sum_goes_on(rng: random.Random, split: Split, thinking: bool) -> list[Exchange]:
    """A sum, then a digit added to the result or taken from it."""
    first = arithmetic.exchange(rng, split, "add", thinking=False)
    operation, total = rng.choice(("add", "subtract")), int(first.answer)
    # A small result may have no digit of this split: then another sum is tried.
    for _ in range(100):
        b = rng.randint(0, min(total, MAX_GO_ON))
        if arithmetic.in_split(operation, total, b, split):
            user = rng.choice(GO_ON[operation]).format(b=b)
            answer = str(arithmetic.result(operation, total, b))
            return [first, Exchange(user, arithmetic.steps(operation, total, b), answer)]
    return _sum_goes_on(rng, split, thinking)


def _mixed(rng: random.Random, split: Split, thinking: bool) -> list[Exchange]:
    """Turns that have nothing to do with each other."""
    return [_any(rng, split, thinking) for _ in range(rng.randint(2, 3))]


def _any(rng: random.Random, split: Split, thinking: bool) -> Exchange:
    kind = rng.choice(("english", "copy", "extract", "add", "subtract"))
    if kind == "english":
        return english.exchange(rng, split, thinking)
    if kind in lines.MAKERS:
        return lines.exchange(rng, split, kind, thinking)
    return arithmetic.exchange(rng, split, kind, thinking)
