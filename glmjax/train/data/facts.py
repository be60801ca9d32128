"""Facts in the system prompt about made-up names, and questions about one of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from glmjax.train.data import words
from glmjax.train.data.problem import Exchange, Problem, Split, conversation
from glmjax.train.data.splits import redraw

Value = Callable[[random.Random], str]


class Relation(NamedTuple):
    """An attribute, the kind of its value, and wordings of its own besides the general ones."""

    attribute: str
    value: Value
    statements: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


class Fact(NamedTuple):
    """`entity` has `value` as the `relation`."""

    relation: Relation
    entity: str
    value: str


def _number(digits: int) -> Value:
    return lambda rng: str(words.number(rng, digits))


RELATIONS = (
    Relation("capital", words.name, ("{e} has the capital {v}.",), ("Name the capital of {e}.",)),
    Relation("city", words.name, ("{e} lives in {v}.",), ("Where does {e} live?",)),
    Relation("friend", words.name, ("{e} is a friend of {v}.",), ("Whose friend is {e}?",)),
    Relation("boss", words.name, ("{e} works for {v}.",), ("Who does {e} work for?",)),
    Relation("phone number", lambda rng: str(rng.randint(1000, 9999)), ("Call {e} at {v}.",)),
    Relation("age", _number(2), ("{e} is {v} years old.",), ("How old is {e}?",)),
    Relation("room", _number(3), ("{e} is in room {v}.",), ("Which room is {e} in?",)),
    Relation("price", _number(3), ("{e} costs {v}.",), ("How much does {e} cost?",)),
    Relation("color", lambda rng: rng.choice(words.COLORS), (), ("Which color is {e}?",)),
    Relation("code", words.code),
    Relation("password", words.word),
    Relation("email", words.email),
    Relation("pet", words.any_word, ("{e} has a pet {v}.",), ("Which pet does {e} have?",)),
    Relation("score", _number(3), ("{e} scored {v}.",), ("What did {e} score?",)),
    Relation("nickname", words.name, ("{e} is called {v}.",), ("What is {e} called?",)),
    Relation("owner", words.name, ("{e} belongs to {v}.",), ("Who owns {e}?",)),
)
STATEMENTS = ("The {a} of {e} is {v}.", "{e}'s {a} is {v}.")
QUESTIONS = (
    "What is the {a} of {e}?",
    "What is {e}'s {a}?",
    "What's {e}'s {a}?",
    "Tell me {e}'s {a}.",
    "Tell me the {a} of {e}.",
    "{e}'s {a}?",
    "Give me the {a} of {e}.",
    "I need {e}'s {a}.",
    "Do you know the {a} of {e}?",
    "The {a} of {e}, please.",
)
INTRODUCTIONS = ("", "", "Facts: ", "Answer from these facts. ", "Remember: ")


def generate(rng: random.Random, split: Split) -> Problem:
    """One question, or two in turn, about 3 to 8 facts."""
    facts = _facts(rng, split)
    sentences = [_statement(rng, fact) for fact in facts]
    # The first fact is the one of the split: it is asked last, where the model answers.
    asked = [rng.randrange(1, len(facts)), 0] if rng.random() < 0.25 else [0]
    exchanges = [Exchange(_question(rng, facts[i]), sentences[i], facts[i].value) for i in asked]
    rng.shuffle(sentences)
    system = rng.choice(INTRODUCTIONS) + " ".join(sentences)
    return conversation("facts", exchanges, rng.random() < 0.4, system)


def key(fact: Fact) -> str:
    """What the split is decided by."""
    return f"{fact.relation.attribute} of {fact.entity}"


def _facts(rng: random.Random, split: Split) -> list[Fact]:
    """Few names and few attributes, so that neither alone tells which fact is meant."""
    entities = [words.name(rng) for _ in range(rng.randint(2, 4))]
    relations = rng.sample(RELATIONS, k=rng.randint(2, 4))

    def asked() -> tuple[Relation, str]:
        return rng.choice(relations), words.name(rng)

    first, entity = redraw(split, asked, lambda pair: f"{pair[0].attribute} of {pair[1]}")
    entities[0] = entity
    others = [
        (r, e) for e in dict.fromkeys(entities) for r in relations if (r, e) != (first, entity)
    ]
    rng.shuffle(others)
    pairs = [(first, entity), *others[: rng.randint(2, 7)]]
    return [Fact(relation, e, relation.value(rng)) for relation, e in pairs]


def _statement(rng: random.Random, fact: Fact) -> str:
    form = rng.choice((*STATEMENTS, *fact.relation.statements))
    return form.format(a=fact.relation.attribute, e=fact.entity, v=fact.value)


def _question(rng: random.Random, fact: Fact) -> str:
    form = rng.choice((*QUESTIONS, *fact.relation.questions * 3))
    return form.format(a=fact.relation.attribute, e=fact.entity)
