"""Which JSON types a tool's parameter may have, by the tool's JSON schema. No jax.

Schemas are what clients send: whatever says nothing that can be understood allows every type, and
nothing here raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any
from urllib.parse import unquote

from glmjax.text.patterns import matches

Schema = Any  # a mapping, True or False; or junk, which allows everything

ALL_KINDS = frozenset({"string", "number", "boolean", "null", "object", "array"})

_MAX_DEPTH = 50  # of unions in unions; what lies deeper may be anything
_MAX_VARIANTS, _MAX_UNIONS = 64, 8  # and how deep unions are taken apart

# What a schema can cost: what is beyond is taken to allow everything.
_MAX_BRANCHES, _MAX_CONJUNCTS, _MAX_PATTERNS = 256, 1000, 64

# Keywords that concern one type. By JSON schema a value of another type passes them, but a tool
# that gives `properties` and leaves out `type` means an object. Only where nothing else tells.
_HINTS = {
    keyword: kind
    for kind, keywords in {
        "object": "properties patternProperties additionalProperties required minProperties "
        "maxProperties propertyNames",
        "array": "items prefixItems additionalItems minItems maxItems uniqueItems contains",
        "string": "minLength maxLength pattern",
        "number": "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    }.items()
    for keyword in keywords.split()
}


def value_kinds(parameters: Schema, name: str) -> frozenset[str]:
    """The JSON types that the argument `name` may have.

    Args:
        parameters: a tool's JSON schema; None without one.
        name: a parameter, declared or not.

    Returns:
        Out of ALL_KINDS, where an integer is a "number"; all of them if nothing is known.
    """
    return kinds(parameter_schema(parameters, name), parameters)


def parameter_schema(parameters: Schema, name: str) -> Schema:
    """The schema of the argument `name`; {} if nothing is known of it."""
    return _found(parameters, name, parameters, {}, 0) or {}


def kinds(schema: Schema, root: Schema) -> frozenset[str]:
    """The JSON types that a schema allows, as `value_kinds` has it.

    Args:
        schema: a JSON schema, of any version, or OpenAPI's with `nullable`.
        root: what "#" means in its references.
    """
    return _kinds(schema, root, {}, 0) or ALL_KINDS


def hinted_kinds(schema: Schema, root: Schema) -> frozenset[str]:
    """The types that keywords hint at, of a schema that says nothing of types or values itself."""
    keywords = {keyword for part in conjuncts(schema, root) for keyword in part}
    if keywords & {"type", "enum", "const", "anyOf", "oneOf"}:
        return frozenset()
    return frozenset(_HINTS[keyword] for keyword in keywords & _HINTS.keys())


def kind_of(value: Any) -> str:
    """The kind of a JSON value, as json.loads makes it."""
    table = {bool: "boolean", str: "string", type(None): "null", list: "array", tuple: "array"}
    return table.get(type(value), "object" if isinstance(value, Mapping) else "number")


def conjuncts(schema: Schema, root: Schema) -> list[Mapping[str, Any]]:
    """The schemas that hold all at once: `schema`, and what it has in `$ref` and `allOf`."""
    found: dict[int, Mapping[str, Any]] = {}
    pending = [schema]
    while pending and len(found) < _MAX_CONJUNCTS:
        part = pending.pop()
        if isinstance(part, Mapping) and id(part) not in found:
            found[id(part)] = part
            inner = list_of(part.get("allOf"))
            pending += [*reversed(inner), resolve(part.get("$ref"), root)]
    return list(found.values())


def branches(part: Mapping[str, Any]) -> Iterator[list[Schema]]:
    """The unions of one schema: the branches of its `anyOf` and of its `oneOf`."""
    for key in ("anyOf", "oneOf"):
        if union := [branch for branch in list_of(part.get(key)) if branch is not False]:
            yield union if len(union) <= _MAX_BRANCHES else [True]


def variants(schema: Schema, root: Schema, depth: int = 0) -> list[list[Mapping[str, Any]]]:
    """The ways to take one branch of each union: for each, the schemas that then hold at once.

    None are returned if they are too many.
    """
    found = [conjuncts(schema, root)]
    for union in (union for part in found[0] for union in branches(part)):
        taken = []
        for branch in union:
            inner = variants(branch, root, depth + 1) if depth < _MAX_UNIONS else []
            taken += [first + more for first in found for more in inner]
            size = sum(map(len, taken))
            if not inner or len(taken) > _MAX_VARIANTS or size > _MAX_CONJUNCTS:
                return []
        found = taken
    return found


def values_of(part: Mapping[str, Any]) -> list[list[Any]]:
    """The lists of values that one schema is limited to, by `const` and `enum`."""
    enum = part.get("enum")
    consts = [[part["const"]]] if "const" in part else []
    return consts + ([enum] if isinstance(enum, list) else [])


def own_schemas(part: Mapping[str, Any], name: str) -> list[Schema]:
    """The schemas that one part has for a property, by name, by pattern or for all others."""
    declared = map_of(part.get("properties"))
    if name in declared:
        return [declared[name]]
    patterns = islice(map_of(part.get("patternProperties")).items(), _MAX_PATTERNS)
    matching = [inner for pattern, inner in patterns if matches(pattern, name)]
    others = part.get("additionalProperties")
    return matching or ([others] if isinstance(others, Mapping) else [])


def resolve(reference: Any, root: Schema) -> Any:
    """What a local `$ref` points to, "#" or "#" with a JSON pointer (RFC 6901); None if nothing."""
    if not isinstance(reference, str) or not re.match(r"#(/|$)", reference):
        return None
    found = root
    for step in unquote(reference[1:]).split("/")[1:]:
        found = _member(found, step.replace("~1", "/").replace("~0", "~"))
    return found


def list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def map_of(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _member(value: Any, key: str) -> Any:
    if isinstance(value, list):
        fits = key.isdecimal() and key.isascii() and len(key) < 10 and int(key) < len(value)
        return value[int(key)] if fits else None
    return map_of(value).get(key)


def _found(schema: Schema, name: str, root: Schema, seen: dict[int, Schema], depth: int) -> Schema:
    """As `parameter_schema`; None if nothing is known. Of a union, what its branches know.

    `seen` has what was found in a schema as soon as it is met, at first nothing.
    """
    if depth > _MAX_DEPTH or id(schema) in seen:
        return seen.get(id(schema))
    seen[id(schema)] = None
    parts = conjuncts(schema, root)
    found = [inner for part in parts for inner in own_schemas(part, name)]
    for union in (union for part in parts for union in branches(part)):
        known = [_found(branch, name, root, seen, depth + 1) for branch in union]
        known = [inner for inner in known if inner is not None]
        found += [{"anyOf": known}] if known else []
    seen[id(schema)] = found[0] if len(found) == 1 else {"allOf": found} if found else None
    return seen[id(schema)]


def _kinds(
    schema: Schema, root: Schema, seen: dict[int, frozenset[str]], depth: int
) -> frozenset[str]:
    """As `kinds`; `seen` has a schema's as soon as it is met, at first none.

    So a union that leads back to itself adds nothing to itself.
    """
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return ALL_KINDS
    if id(schema) not in seen:
        seen[id(schema)] = frozenset()
        parts = conjuncts(schema, root)
        limits = [hinted_kinds(schema, root) or ALL_KINDS, *map(_named_kinds, parts)]
        for union in (union for part in parts for union in branches(part)):
            inner = [_kinds(branch, root, seen, depth + 1) for branch in union]
            limits.append(frozenset().union(*inner))
        null = {"null"} if any(part.get("nullable") is True for part in parts) else set()
        seen[id(schema)] = ALL_KINDS.intersection(*limits) | null
    return seen[id(schema)]


def _named_kinds(part: Mapping[str, Any]) -> frozenset[str]:
    """The kinds that one schema allows by `type` and by its values."""
    named = part.get("type")
    names = [str(x) for x in (named if isinstance(named, list) else [named])]
    types = frozenset("number" if x == "integer" else x for x in names)
    limits = [types] if types and types <= ALL_KINDS else []
    limits += [frozenset(map(kind_of, values)) for values in values_of(part)]
    return ALL_KINDS.intersection(*limits)
