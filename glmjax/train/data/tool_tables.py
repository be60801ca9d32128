"""What tools are made of: topics, kinds of parameters, and their wordings."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from glmjax.train.data import words


@dataclass(frozen=True)
class Subject:
    """A family of tools that differ in the topic only.

    Attributes:
        topics: nouns, told apart from those of all other tools.
        names: readable names, with {t}.
        descriptions: with {t}.
        needs: what follows "please", with {t}.
    """

    topics: tuple[str, ...]
    names: tuple[str, ...]
    descriptions: tuple[str, ...]
    needs: tuple[str, ...]


_KNOWLEDGE_TOPICS = (
    "weather traffic forecast news score price menu schedule balance distance address "
    "population temperature recipe map status stock rate translation definition horoscope "
    "inventory budget humidity wind tide pollen calendar salary timetable ticket rating"
)
_ACTION_TOPICS = (
    "timer reminder meeting train taxi table hotel flight song playlist note message call "
    "photo game light heater fan lock door robot backup file folder report survey poll "
    "bill payment parcel delivery lesson"
)
KNOWLEDGE = Subject(
    tuple(_KNOWLEDGE_TOPICS.split()),
    ("get_{t}", "{t}_lookup", "find_{t}", "{t}_info", "check_{t}", "read_{t}", "{t}_search"),
    ("Get the {t}", "Look up the {t}", "Read the {t}", "Find the {t}", "Return the {t}"),
    (
        "get the {t}",
        "check the {t}",
        "look up the {t}",
        "show me the {t}",
        "find the {t}",
        "tell me the {t}",
        "give me the {t}",
        "see what the {t} is",
        "fetch the {t}",
        "read the {t}",
    ),
)
ACTION = Subject(
    tuple(_ACTION_TOPICS.split()),
    ("set_{t}", "create_{t}", "new_{t}", "start_{t}", "{t}_create", "make_{t}", "add_{t}"),
    ("Create a {t}", "Set a {t}", "Make a {t}", "Start a {t}", "Order a {t}"),
    (
        "set a {t}",
        "make a {t}",
        "create a {t}",
        "start a {t}",
        "add a {t}",
        "order a {t}",
        "get me a {t}",
        "prepare a {t}",
        "set up a {t}",
        "arrange a {t}",
    ),
)
SUBJECTS = (KNOWLEDGE, ACTION)
OPENERS = (
    "",
    "",
    "",
    "Please ",
    "Can you ",
    "Could you ",
    "Would you ",
    "I want you to ",
    "I need you to ",
    "Now ",
    "Hey, ",
    "Hello, please ",
)
JOINS = (" and ", ", then ", " and also ", ", and then ", " and ")


@dataclass(frozen=True)
class Kind:
    """A kind of parameter.

    Attributes:
        name: its key in the schema.
        type: of JSON.
        wordings: what a request says, with {v}; for booleans one for true, then one for false.
        value: draws it; None for enums and booleans.
        options: of an enum, of which a schema lists 2 to 4.
    """

    name: str
    type: str
    wordings: tuple[str, ...]
    value: Callable[[random.Random], Any] | None = None
    options: tuple[str, ...] = ()


def _integer(rng: random.Random) -> int:
    return words.number(rng, 3)


KINDS = (
    Kind("city", "string", ("in {v}", "in the city {v}"), words.name),
    Kind("person", "string", ("for {v}", "on behalf of {v}"), words.name),
    Kind("name", "string", ("named {v}", "with the name {v}", "called {v}"), words.name),
    Kind("origin", "string", ("from {v}", "starting from {v}"), words.name),
    Kind("target", "string", ("to {v}", "towards {v}"), words.name),
    Kind("title", "string", ("titled {v}", "with the title {v}"), words.any_word),
    Kind("author", "string", ("by {v}", "written by {v}"), words.name),
    Kind("tag", "string", ("tagged {v}", "with the tag {v}"), words.word),
    Kind("code", "string", ("with code {v}", "using the code {v}"), words.code),
    Kind("email", "string", ("sent to {v}", "with the email {v}"), words.email),
    Kind("color", "string", ("colored {v}", "in the color {v}"), lambda r: r.choice(words.COLORS)),
    Kind("count", "integer", ("{v} times", "repeated {v} times"), _integer),
    Kind("days", "integer", ("for {v} days", "over {v} days"), _integer),
    Kind("minutes", "integer", ("for {v} minutes", "lasting {v} minutes"), _integer),
    Kind("room", "integer", ("in room {v}", "for room {v}"), _integer),
    Kind("level", "integer", ("at level {v}", "with level {v}"), _integer),
    Kind("page", "integer", ("on page {v}", "from page {v}"), _integer),
    Kind("limit", "integer", ("with a limit of {v}", "limited to {v}"), _integer),
    Kind("id", "integer", ("with id {v}", "for id {v}"), _integer),
    Kind("price", "integer", ("under {v} dollars", "for {v} dollars"), _integer),
    Kind("unit", "string", ("in {v}", "using {v}"), None, ("celsius", "fahrenheit", "kelvin")),
    Kind("size", "string", ("in size {v}", "of size {v}"), None, ("small", "medium", "large")),
    Kind("mode", "string", ("in {v} mode", "using {v} mode"), None, ("fast", "slow", "auto")),
    Kind("day", "string", ("on {v}", "for {v}"), None, ("monday", "friday", "sunday", "today")),
    Kind("format", "string", ("as {v}", "in {v} format"), None, ("json", "csv", "text", "html")),
    Kind("priority", "string", ("with {v} priority",), None, ("low", "normal", "high")),
    Kind("urgent", "boolean", ("urgently", "not urgently")),
    Kind("silent", "boolean", ("silently", "not silently")),
    Kind("public", "boolean", ("in public", "not in public")),
)
