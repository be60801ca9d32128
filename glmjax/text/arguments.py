"""A tool call's arguments as JSON, written while the values arrive."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

import orjson

from glmjax.text.nesting import MAX_NESTING, levels
from glmjax.text.schema_kinds import kind_of, value_kinds

STRING = frozenset({"string"})


class Arguments:
    """The text of a JSON object, piece by piece: each method returns what it adds.

    A value that can only be a string is written as it arrives, character for character. Any other
    is written when it is whole: as it stands if it is JSON, else as a string; and where the schema
    allows strings too, as a string unless it is JSON of another type that the schema allows. Of
    equal keys the first counts.

    Args:
        parameters: JSON schema of the tool's parameters; None: nothing is known of them.
    """

    def __init__(self, parameters: Mapping[str, Any] | None):
        self._parameters = parameters
        self._keys: set[str] = set()
        self._kinds: frozenset[str] | None = None  # of the value under way, if one is to come
        self._key = ""
        self._pieces: list[str] = []
        self._begun = False

    def open(self, key: str) -> str:
        """A value of `key` begins; none is under way."""
        if key in self._keys:
            return ""
        self._keys.add(key)
        self._key, self._pieces = key, []
        self._kinds = value_kinds(self._parameters, key)
        return self._lead() + '"' if self._kinds == STRING else ""

    def add(self, text: str) -> str:
        """More of the value."""
        if self._kinds == STRING:
            return _escaped(text)
        if self._kinds is not None:
            self._pieces.append(text)
        return ""

    def close(self) -> str:
        """The value is whole, if one is under way."""
        kinds, self._kinds = self._kinds, None
        if kinds is None:
            return ""
        return '"' if kinds == STRING else self._lead() + _value("".join(self._pieces), kinds)

    def cut(self) -> str:
        """The value under way, if any, stays as it is: a string ends here, others do not come."""
        if self._kinds != STRING:
            self._kinds = None
        return self.close()

    def finish(self) -> str:
        """There are no more values."""
        return "}" if self._begun else "{}"

    def _lead(self) -> str:
        lead = ", " if self._begun else "{"
        self._begun = True
        return f'{lead}"{_escaped(self._key)}": '


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _value(text: str, kinds: frozenset[str]) -> str:
    """A whole value: JSON as it was written, with all its digits, or a string.

    Where the schema allows strings too, quoted text is a string that has quotes: strings are
    written without them.
    """
    kind = json_kind(text)
    if kind and ("string" not in kinds or kind in kinds - STRING):
        return text.strip()
    return f'"{_escaped(text)}"'


def json_kind(text: str) -> str | None:
    """The kind of JSON that a text is; None if it is none that every client can read.

    So numbers that are no finite double and half surrogate pairs, which orjson refuses, are none;
    nor is what would be refused as too deep when the call is sent back.
    """
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return kind_of(value) if _is_shallow(value) else None


def _is_shallow(value: Any) -> bool:
    """Whether a value in an object is nested no more than MAX_NESTING deep, with that object."""
    return sum(1 for _ in itertools.islice(levels(value), MAX_NESTING)) < MAX_NESTING
