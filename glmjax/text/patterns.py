"""The patterns of JSON schemas, which are regular expressions of clients. No jax.

They go to llguidance, which reads them in linear time; Python's own can take for ever.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLTokenizer

ANY = "(?s:.*)"

_MAX_LENGTH = 1000  # of a pattern: longer ones could take minutes
MAX_COUNT = 512  # of characters that are counted; masks take 0.1 ms for each

# An escape, a class in brackets, or a character of a regular expression.
_REGEX_PART = re.compile(r"\\.|\[\^?(?:\\.|[^\]\\])*\]|.", re.DOTALL)
# ECMA's meaning of them is ASCII; Rust's regexes know set operations in classes.
_CLASSES = {r"\d": "0-9", r"\w": "0-9A-Za-z_", "[": r"\[", "&": r"\&", "~": r"\~"}
_ESCAPES = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}
_REPEATED = re.compile(r"\{(\d+)(?:,(\d*))?\}", re.ASCII)
_IN_LARK = {"/": r"\/"}


def search(pattern: Any) -> str | None:
    """A regular expression for Lark, of the texts that a schema's pattern finds something in.

    None if llguidance does not know it, or it is long. "^" and "$" are known where the pattern, or
    one of its alternatives, begins and ends.
    """
    if not isinstance(pattern, str) or _is_heavy(pattern):
        return None
    depth, alternatives = 0, list[list[str]]([[]])
    for part in _REGEX_PART.findall(pattern):
        depth += (part == "(") - (part == ")")
        if part == "|" and not depth:
            alternatives.append([])
        else:
            alternatives[-1].append(part)
    regex = "|".join(map(_unanchored, alternatives))
    return regex if _compiles(LLMatcher.grammar_from_lark, f"start: /{regex}/") else None


def _is_heavy(pattern: str) -> bool:
    """Whether the engine might give up on it in the middle of an answer."""
    counts = [max(int(n or 0) for n in found) for found in _REPEATED.findall(pattern)]
    return len(pattern) > _MAX_LENGTH or sum(counts) > MAX_COUNT


def _unanchored(parts: list[str]) -> str:
    begins, ends = parts[:1] == ["^"], parts[-1:] == ["$"]
    inner = "".join(map(_in_lark, parts[begins : len(parts) - ends]))
    return f"{'' if begins else ANY}(?:{inner}){'' if ends else ANY}"


def _in_lark(part: str) -> str:
    """A part of a regular expression, from ECMA's dialect to Rust's, as it stands in Lark."""
    if len(part) > 1 and part[0] == "[":
        inner = re.findall(r"\\.|.", part[1:-1], re.DOTALL)
        return f"[{''.join(map(_in_class, inner))}]"
    return (_ESCAPES | _IN_LARK).get(part, part)


def _in_class(part: str) -> str:
    return (_CLASSES | _IN_LARK).get(part, part)


@lru_cache(maxsize=1024)  # half a millisecond each, and tools come with every turn of a chat
def _compiles(read: Callable[[str], str], source: str) -> bool:
    try:
        return not LLMatcher.validate_grammar(read(source))
    except ValueError:  # half a surrogate pair
        return False


def is_known(keyword: str, value: Any) -> bool:
    """Whether llguidance takes a `pattern` or a `format` in a schema."""
    if keyword == "pattern" and isinstance(value, str) and _is_heavy(value):
        return False
    schema = {"type": "string", keyword: value}
    return _compiles(LLMatcher.grammar_from_json_schema, json.dumps(schema))


@lru_cache(maxsize=1024)
def matches(pattern: Any, text: str) -> bool:
    """Whether a pattern finds something in a text; False if llguidance does not know it."""
    regex = search(pattern)
    if regex is None:
        return False
    grammar = LLMatcher.grammar_from_lark(f"start: /{regex}/")
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0)
    data = list(text.encode("utf-8", "replace"))
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


@lru_cache(maxsize=1)
def byte_tokenizer() -> LLTokenizer:
    """One whose tokens are the bytes."""
    return LLTokenizer("byte")
