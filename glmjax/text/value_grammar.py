"""How the values of a JSON schema stand in a Lark grammar: as text or as JSON. No jax."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from glmjax.text.arguments import json_kind
from glmjax.text.grammar import WHITESPACE, flaw
from glmjax.text.patterns import MAX_COUNT, is_known, search
from glmjax.text.schema_kinds import (
    Schema,
    hinted_kinds,
    kind_of,
    kinds,
    list_of,
    map_of,
    resolve,
    values_of,
    variants,
)

# Keywords of JSON schema that hold a schema, a list of them, or named ones.
_ONE = {"items", "additionalItems", "additionalProperties", "propertyNames", "contains", "not"}
_ONE |= {"if", "then", "else", "unevaluatedItems", "unevaluatedProperties"}
_LISTS = {"anyOf", "oneOf", "allOf", "prefixItems", "items"}
_MAPS = {"properties", "patternProperties", "dependentSchemas"}

# What says which properties an object has, and what brings in other schemas that say so too.
_OBJECT = {"properties", "patternProperties", "additionalProperties", "unevaluatedProperties"}
_BESIDE = {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas"}

# They say nothing of what is valid, or what they say is written in another way.
_DROPPED = {"title", "description", "default", "example", "examples", "deprecated", "nullable"}
_DROPPED |= {"readOnly", "writeOnly", "discriminator", "xml", "externalDocs", "$comment"}
_DROPPED |= {"$schema", "$id", "id", "$defs", "definitions", "x-guidance"}


def quoted(text: str) -> str:
    return json.dumps(text)


# Strings


def text_options(schema: Schema, root: Schema, text: str, lenient: bool) -> list[str] | None:
    """How the values of a schema are written that may be strings.

    Args:
        schema: the value's.
        root: what "#" means in its references.
        text: the terminal for any text.
        lenient: a pattern and lengths that nothing fits do not count.

    Returns:
        Bodies of terminals, each for a part of the values; None if they cannot be told from
        others, and none if there are too many or no values.

    Raises:
        ValueError: nothing fits a pattern and lengths.
    """
    written = kinds(schema, root)
    found = [_options(parts, written, root, text, lenient) for parts in variants(schema, root)]
    return None if None in found else [option for options in found for option in options or []]


def _options(
    parts: list[Mapping[str, Any]], written: frozenset[str], root: Schema, text: str, lenient: bool
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
    return words + ([_bounded(text, parts, lenient)] if "string" in own else [])


def _written(value: Any, allowed: frozenset[str]) -> str | None:
    """A value as it stands in a call; None for a string that would be read as another value."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return None if json_kind(value) in allowed - {"string"} else value


def _bounded(text: str, parts: list[Mapping[str, Any]], lenient: bool) -> str:
    """The terminal `text` with the lengths and patterns of schemas."""
    patterns = [search(part.get("pattern")) for part in parts]
    least = max(_lengths(parts, "minLength"), default=0)
    most = min(_lengths(parts, "maxLength"), default="")
    length = f"(?s:.{{{least},{most}}})" if (least, most) != (0, "") else None
    bounds = [f"/{regex}/" for regex in [length, *patterns] if regex]
    cause = flaw(f"start: TEXT\nTEXT: {' & '.join(bounds)}") if bounds else None
    if cause and not lenient:
        raise ValueError(f"strings of this pattern and length: {cause}")
    return " & ".join([text, *([] if cause else bounds)])


def _lengths(parts: list[Mapping[str, Any]], keyword: str) -> list[int]:
    values = [part.get(keyword) for part in parts]
    return [v for v in values if type(v) is int and 0 <= v <= MAX_COUNT]


# JSON


def json_rule(schema: dict[str, Any], lenient: bool, flat: bool = False) -> str:
    """JSON of a schema that holds all that it refers to.

    Args:
        lenient: what llguidance does not know does not count.
        flat: there are no parts, with blanks between them.
    """
    options = dict(map_of(schema.get("x-guidance"))) | ({"lenient": True} if lenient else {})
    options |= {} if flat else {"whitespace_pattern": WHITESPACE}
    whole = schema | ({"x-guidance": options} if options else {})
    return f"%json {json.dumps(whole, ensure_ascii=False, separators=(',', ':'))}"


def self_contained(schema: Schema, root: Schema, closed: bool = True) -> dict[str, Any]:
    """The same schema, with the definitions that it uses and without what is not for llguidance.

    Args:
        schema: a JSON schema, or OpenAPI's with `nullable`.
        root: what "#" means in its references.
        closed: objects that declare properties have no others, unless a schema says so, or several
            schemas that hold at once tell what they have.
    """
    numbers: dict[tuple[str, bool], int] = {}  # of the references, and whether objects stay open

    def local(reference: Any, as_is: bool) -> Any:
        if resolve(reference, root) is None:
            return reference
        return f"#/$defs/{numbers.setdefault((reference, as_is), len(numbers))}"

    bare = _bare(schema, root, local, not closed)
    definitions = {}
    for number, (reference, as_is) in _growing(numbers):
        definitions[str(number)] = _bare(resolve(reference, root), root, local, as_is)
    whole = bare if isinstance(bare, dict) else {"enum": []}  # False
    return whole | ({"$defs": definitions} if definitions else {})


def _growing(numbers: dict[tuple[str, bool], int]) -> Iterable[tuple[int, tuple[str, bool]]]:
    """Its items, those too that are added meanwhile."""
    done = 0
    while done < len(numbers):
        yield done, list(numbers)[done]
        done += 1


Local = Callable[[Any, bool], Any]


def _bare(schema: Schema, root: Schema, local: Local, as_is: bool, joined: bool = False) -> Schema:
    """A schema for llguidance.

    Args:
        schema: anything.
        root: what "#" means in its references.
        local: makes a new reference of one, and of whether what it leads to is `as_is`.
        as_is: objects are not closed.
        joined: it is one of several that hold at once, and the others may say of which type.
    """
    if not isinstance(schema, Mapping):
        return schema
    as_is = as_is or len(schema.keys() & _BESIDE) + bool(schema.keys() & _OBJECT) > 1
    kept = {key: value for key, value in schema.items() if _counts(key, value)}
    bare = {key: _bare_keyword(key, value, root, local, as_is) for key, value in kept.items()}
    if not joined and "$ref" not in schema and (hinted := hinted_kinds(schema, root)):
        bare["type"] = sorted(hinted)
    if not as_is and _is_closed(schema):
        bare["additionalProperties"] = False
    return {"anyOf": [bare, {"type": "null"}]} if schema.get("nullable") is True else bare


def _counts(key: str, value: Any) -> bool:
    """Whether a keyword is for llguidance."""
    if key in ("pattern", "format"):
        return is_known(key, value)
    too_long = key in ("minLength", "maxLength") and type(value) is int and value > MAX_COUNT
    return key not in _DROPPED and not too_long


def _is_closed(schema: Mapping[str, Any]) -> bool:
    """Whether a schema that alone tells of an object's properties means just those."""
    declared, required = map_of(schema.get("properties")), list_of(schema.get("required"))
    named = all(isinstance(name, str) and name in declared for name in required)
    return bool(declared) and named and schema.keys() & _OBJECT == {"properties"}


def _bare_keyword(key: str, value: Any, root: Schema, local: Local, as_is: bool) -> Any:
    if key == "$ref":
        return local(value, as_is)
    if key in _MAPS and isinstance(value, Mapping):
        return {name: _bare(inner, root, local, as_is) for name, inner in value.items()}
    if key in _LISTS and isinstance(value, list):
        joined = key == "allOf"
        as_is = as_is or (joined and len(value) > 1)
        return [_bare(inner, root, local, as_is, joined) for inner in value]
    return _bare(value, root, local, as_is) if key in _ONE else value
