"""How the values of a JSON schema stand in a Lark grammar: as text or as JSON. No jax."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import orjson

from glmjax.text.grammar import _WHITESPACE
from glmjax.text.patterns import is_known, search
from glmjax.text.schema_kinds import (
    Schema,
    hinted_kinds,
    kind_of,
    kinds,
    resolve,
    values_of,
    variants,
)

_MAX_LENGTH = 2**12  # longer bounds of strings are left out

# Keywords of JSON schema that hold a schema, a list of them, or named ones.
_ONE = {"items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not"}
_ONE |= {"if", "then", "else", "unevaluatedItems", "unevaluatedProperties"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
_MAPS = {"properties", "patternProperties", "dependentSchemas"}

# They say nothing of what is valid, or what they say is written in another way.
_DROPPED = {"title", "description", "default", "example", "examples", "deprecated", "nullable"}
_DROPPED |= {"readOnly", "writeOnly", "discriminator", "xml", "externalDocs", "$comment"}
_DROPPED |= {"$schema", "$id", "id", "$defs", "definitions", "x-guidance"}


def quoted(text: str) -> str:
    return json.dumps(text)


# Strings


def text_options(schema: Schema, root: Schema, text: str) -> list[str] | None:
    """How the values of a schema are written that may be strings.

    Args:
        schema: the value's.
        root: what "#" means in its references.
        text: the terminal for any text.

    Returns:
        Bodies of terminals, each for a part of the values; None if they cannot be told from
        others, and none if there are too many or no values.
    """
    written = kinds(schema, root)
    found = [_options(parts, written, root, text) for parts in variants(schema, root)]
    return None if None in found else [option for options in found for option in options or []]


def _options(
    parts: list[Mapping[str, Any]], written: frozenset[str], root: Schema, text: str
) -> list[str] | None:
    """As `text_options`, for schemas that hold at once, of a value that is one of `written`."""
    own = kinds({"allOf": parts}, root)
    if limits := [values for part in parts for values in values_of(part)]:
        spellings = [set(map(json.dumps, values)) for values in limits]
        valid = [v for v in limits[0] if all(json.dumps(v) in spelling for spelling in spellings)]
        words = [_written(value, written) for value in valid if kind_of(value) in own]
        return [quoted(word) for word in words if word is not None]
    literals = {"null": ["null"], "boolean": ["true", "false"]}
    if not own <= {"string", *literals}:
        return None
    words = [quoted(word) for kind in sorted(own - {"string"}) for word in literals[kind]]
    return words + ([_bounded(text, parts)] if "string" in own else [])


def _written(value: Any, allowed: frozenset[str]) -> str | None:
    """A value as it stands in a call; None for a string that would be read as another value."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return None if _json_kind(value) in allowed - {"string"} else value


def _json_kind(text: str) -> str | None:
    """Of which kind the value is that a text is as JSON."""
    try:
        return kind_of(orjson.loads(text))
    except orjson.JSONDecodeError:
        return None


def _bounded(text: str, parts: list[Mapping[str, Any]]) -> str:
    """The terminal `text` with the lengths and patterns of schemas."""
    patterns = [search(part.get("pattern")) for part in parts]
    least = max(_lengths(parts, "minLength"), default=0)
    most = min(_lengths(parts, "maxLength"), default="")
    length = f"(?s:.{{{least},{most}}})" if (least, most) != (0, "") else None
    return " & ".join([text, *(f"/{regex}/" for regex in [length, *patterns] if regex)])


def _lengths(parts: list[Mapping[str, Any]], keyword: str) -> list[int]:
    values = [part.get(keyword) for part in parts]
    return [v for v in values if type(v) is int and 0 <= v <= _MAX_LENGTH]


# JSON


def json_rule(schema: dict[str, Any], lenient: bool, flat: bool = False) -> str:
    """JSON of a schema that holds all that it refers to.

    Args:
        lenient: what llguidance does not know does not count.
        flat: there are no parts, with blanks between them.
    """
    options = {} if flat else {"whitespace_pattern": _WHITESPACE}
    options |= {"lenient": True} if lenient else {}
    whole = schema | ({"x-guidance": options} if options else {})
    return f"%json {json.dumps(whole, ensure_ascii=False, separators=(',', ':'))}"


def self_contained(schema: Schema, root: Schema) -> dict[str, Any]:
    """The same schema, with the definitions that it uses and without what is not for llguidance."""
    numbers: dict[str, int] = {}  # of the references

    def local(reference: Any) -> Any:
        if resolve(reference, root) is None:
            return reference
        return f"#/$defs/{numbers.setdefault(reference, len(numbers))}"

    bare = _bare(schema, root, local)
    definitions = {}
    for number, reference in _growing(numbers):
        definitions[str(number)] = _bare(resolve(reference, root), root, local)
    whole = bare if isinstance(bare, dict) else {"enum": []}  # False
    return whole | ({"$defs": definitions} if definitions else {})


def _growing(numbers: dict[str, int]) -> Iterable[tuple[int, str]]:
    """Its items, those too that are added meanwhile."""
    done = 0
    while done < len(numbers):
        yield done, list(numbers)[done]
        done += 1


def _bare(
    schema: Schema, root: Schema, local: Callable[[Any], Any], joined: bool = False
) -> Schema:
    """A schema for llguidance.

    Args:
        local: makes a new reference of one.
        joined: it is one of several that hold at once, and the others may say of which type.
    """
    if not isinstance(schema, Mapping):
        return schema
    kept = {key: value for key, value in schema.items() if key not in _DROPPED}
    bare = {key: _bare_keyword(key, value, root, local) for key, value in kept.items()}
    if "pattern" in bare and not is_known(bare["pattern"]):
        del bare["pattern"]
    if not joined and "$ref" not in schema and (hinted := hinted_kinds(schema, root)):
        bare["type"] = sorted(hinted)
    return {"anyOf": [bare, {"type": "null"}]} if schema.get("nullable") is True else bare


def _bare_keyword(key: str, value: Any, root: Schema, local: Callable[[Any], Any]) -> Any:
    if key == "$ref":
        return local(value)
    if key in _MAPS and isinstance(value, Mapping):
        return {name: _bare(inner, root, local) for name, inner in value.items()}
    if key in _LISTS and isinstance(value, list):
        return [_bare(inner, root, local, joined=key == "allOf") for inner in value]
    return _bare(value, root, local) if key in _ONE else value
