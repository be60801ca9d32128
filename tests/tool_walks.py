"""Ways through the grammars of tool calls, and a reader of what was written on them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import glmjax
from glmjax.text.grammar import GrammarConstraint, Grammars, GrammarSpec
from glmjax.text.schema_kinds import value_kinds
from glmjax.text.tokenizer import Tokenizer
from glmjax.text.tool_grammar import TAGS

NANO = Path(glmjax.__file__).parent / "assets" / "glm-nano"
ENDS = (1003, 1010, 1012)
TOKENIZER = Tokenizer.from_folder(NANO)
GRAMMARS = Grammars(TOKENIZER, 1024, ENDS)
IDS = {tag: TOKENIZER.token_id(tag) for tag in TAGS}
BYTES = {TOKENIZER.token_bytes(i)[0]: i for i in range(1003) if len(TOKENIZER.token_bytes(i)) == 1}
BREAKS = {"glm45": "\n", "glm47": ""}
CLOSERS = [b"}", b"]", b'"', b"1", b"x", b"/"]
CALL, END_CALL, KEY, END_KEY, VALUE, END_VALUE = TAGS


def tool(parameters: Any = None, name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def of(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


def nexts(constraint: GrammarConstraint) -> list[int]:
    mask = constraint.masks(())[0]
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def compiled(grammar: str, grammars: Grammars = GRAMMARS) -> GrammarConstraint:
    return grammars.constraint(GrammarSpec("lark", grammar, "tool_choice"))


def shortest(ids: list[int], rng: random.Random) -> int:
    """A token that leads to an end."""
    order = [*ENDS, *(IDS[tag] for tag in (END_CALL, END_VALUE, END_KEY, VALUE, CALL, KEY))]
    if tags := sorted(set(ids) & set(order), key=order.index):
        return tags[0]
    closers = [i for i in ids if TOKENIZER.token_bytes(i) in CLOSERS]
    letters = [i for i in ids if len(TOKENIZER.token_bytes(i)) == 1]
    return rng.choice(closers if closers and rng.random() < 0.8 else letters)


def walk(constraint: GrammarConstraint, seed: int, free: int = 30) -> list[int]:
    """Random tokens up to an end; behind the first `free`, those that lead to one."""
    rng, tokens = random.Random(seed), []
    while len(tokens) < 800:
        ids = nexts(constraint)
        tags = [i for i in ids if i >= 1003]
        some = tags if tags and rng.random() < 0.3 else ids
        token = rng.choice(some) if len(tokens) < free else shortest(ids, rng)
        if token in ENDS:
            return tokens
        tokens.append(token)
        constraint.advance([token])
    raise AssertionError(f"no end: {TOKENIZER.decode(tokens)!r}")


def marked(tokens: Iterable[int]) -> bytes:
    """Text with each tag's token as a byte that no text has."""
    marks = {IDS[tag]: bytes([0xF8 + i]) for i, tag in enumerate(TAGS)}
    return b"".join(marks.get(i) or TOKENIZER.token_bytes(i) for i in tokens)


def calls_in(tokens: list[int], form: str) -> list[tuple[str, dict[str, str]]]:
    """The calls that an answer is made of, by tokens; their values as they stand."""
    n = BREAKS[form].encode()
    text = rb"([^\xf8-\xfd]*)"
    pair = rb"\xfa%s\xfb%s\xfc%s\xfd%s" % (text, n, text, n)
    call = rb"\xf8([^\xf8-\xfd]*?)%s((?:%s)*)\xf9" % (n, pair.replace(b"(", b"(?:"))
    data = marked(tokens).removeprefix(n)
    assert re.fullmatch(rb"%s(?:%s%s)*" % (call, n, call), data), data
    found = []
    for name, arguments in (match.groups()[:2] for match in re.finditer(call, data)):
        pairs = [[x.decode() for x in match] for match in re.findall(pair, arguments)]
        assert len({key for key, _ in pairs}) == len(pairs) or name == b"open"
        found.append((name.decode(), dict(pairs)))
    return found


def read(text: str, kinds: frozenset[str]) -> Any:
    """A value as it is meant: verbatim if it is a string, else JSON."""
    table = {bool: "boolean", int: "number", float: "number", type(None): "null"}
    table |= {dict: "object", list: "array", str: ""}
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if table[type(value)] in kinds or "string" not in kinds else text


def check(tokens: list[int], form: str, tools: list[dict[str, Any]]) -> int:
    """That these are valid calls of the tools; how many."""
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in tools}
    found = calls_in(tokens, form)
    for name, pairs in found:
        parameters = schemas[name]
        values = {key: read(value, value_kinds(parameters, key)) for key, value in pairs.items()}
        jsonschema.Draft202012Validator(parameters or of({}, additionalProperties=False)).validate(
            values
        )
        assert not any(END_VALUE in value for value in pairs.values())
        named = [key for key in (parameters or {}).get("properties", {}) if key in pairs]
        assert list(pairs)[: len(named)] == named
    return len(found)


def letters(text: str) -> list[int]:
    """A token for each byte."""
    return [BYTES[byte] for byte in text.encode()]


def spelled(*parts: str) -> list[int]:
    """Tokens: of tags their own, of text its letters."""
    return list(chain(*([IDS[part]] if part in IDS else letters(part) for part in parts)))


def takes(grammar: str, tokens: list[int], grammars: Grammars = GRAMMARS) -> bool:
    """Whether all tokens are allowed, and then an end."""
    constraint = compiled(grammar, grammars)
    for token in tokens:
        if token not in nexts(constraint):
            return False
        constraint.advance([token])
    return set(ENDS) <= set(nexts(constraint))
