"""A Lark grammar for answers with tool calls, in the form that GLM models write them. No jax.

A call is `<tool_call>name`, then for each argument `<arg_key>key</arg_key>` and
`<arg_value>value</arg_value>`, then `</tool_call>`. A value that can only be a string is verbatim,
others are JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple

from glmjax.errors import InvalidRequestError
from glmjax.text.patterns import ANY, search
from glmjax.text.schema_kinds import (
    Schema,
    conjuncts,
    kinds,
    list_of,
    map_of,
    own_schemas,
    variants,
)
from glmjax.text.value_grammar import json_rule, quoted, self_contained, text_options

Tag = str | int  # in letters, or a token

TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

# Form -> what stands between the parts of a call and between calls.
_SEPARATORS = {"glm45": "\n", "glm47": ""}

_KEY = r"/[^\s]|[^\s][^\r\n]*[^\s]/"  # blanks at its ends might not be read


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    form: Literal["glm45", "glm47"],
    tags: Mapping[str, int | None],
    *,
    least: int = 0,
    most: int | None = None,
    text: bool = False,
    answer: Mapping[str, Any] | str | None = None,
) -> str:
    """What a `GrammarSpec` of kind "lark" takes, for an answer that may call tools.

    Arguments come in the order of the schema's `properties`, each at most once, those required
    always. Further ones follow if `additionalProperties` says so, or no properties are declared.

    A value is of its schema. Strings are verbatim: with their `enum`, `const`, `pattern` and
    length, but whatever their `format`; they cannot hold "</arg_value>". A pattern that is long,
    or that llguidance does not know, is left out. Where a string is one of several types, and
    another one has more values than `null` or `enum` name, any text may come.

    Args:
        tools: those that may be called, as in OpenAI's API. Keywords of JSON schema that llguidance
            does not know count only for tools with `strict`, where they are an error as soon as
            the grammar is compiled.
        form: "glm45", with line breaks between the parts, or "glm47", without.
        tags: of each of TAGS its token, which nothing else can stand for; None if it is spelled in
            letters. Strings within JSON might then hold it, too.
        least: how many calls must come.
        most: how many may come; None for any number.
        text: text without tags may come before calls, or alone if `least` is 0.
        answer: a JSON schema, or its JSON: with `least` 0, JSON of it may come instead of calls;
            then no text.

    Raises:
        InvalidRequestError: calls must come, but there are no tools; `answer` is no schema; or
            schemas are nested too deep.
    """
    text = text and answer is None
    writer = _Writer(tags, _SEPARATORS[form])
    try:
        options = [] if least else [writer.plain(text, _read(answer))]
        if tools and most != 0:
            options.append(writer.calls(tools, least, most, text))
    except RecursionError:
        raise InvalidRequestError("the parameters of a tool are nested too deep", "tools") from None
    if not options:
        raise InvalidRequestError("a tool must be called, but there is none", "tools")
    return writer.finished(" | ".join(options))


class _Shape(NamedTuple):
    """What the arguments of a tool may be.

    Attributes:
        properties: name -> schema.
        required: the names that must come.
        further: pairs of a pattern for names, or None for those of no pattern, and a schema.
    """

    properties: dict[str, Schema]
    required: set[str]
    further: list[tuple[str | None, Schema]]


class _Writer:
    """Writes one grammar: methods return what may stand in a rule. Equal rules are written once."""

    def __init__(self, tags: Mapping[str, int | None], separator: str):
        tokens = {tag: tags.get(tag) for tag in TAGS}
        self._tags: dict[str, Tag] = {t: t if i is None else i for t, i in tokens.items()}
        self._separator = separator
        self._names: dict[tuple[str, str], str] = {}  # kind of a rule and its body -> its name

    def finished(self, start: str) -> str:
        lazy = {"until": "[lazy]"}
        rules = [f"{n}{lazy.get(kind, '')}: {body}" for (kind, body), n in self._names.items()]
        return "\n".join([f"start: {start}", *rules, ""])

    def plain(self, text: bool, answer: dict[str, Any] | None) -> str:
        """What may come instead of calls."""
        if answer is not None:
            return _joined([self._lead(), self._named("json", json_rule(answer, lenient=False))])
        return self._text() if text else '""'

    def calls(
        self, tools: Iterable[Mapping[str, Any]], least: int, most: int | None, text: bool
    ) -> str:
        opening = self._tags["<tool_call>"]
        head = self._closed(self._text(), opening) if text else [self._lead(), _row(opening)]
        call = self._named("call", " | ".join(dict.fromkeys(map(self._call, tools))))
        bounds = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
        more = f"({_row(self._separator, opening)} {call}){{{bounds}}}"
        return _joined([*head, call, more if most != 1 else ""])

    def _lead(self) -> str:
        """An answer may begin with a line break, where calls are separated by one."""
        return f"{quoted(self._separator)}?" if self._separator else ""

    def _text(self) -> str:
        return self._named("TEXT", _without(TAGS))

    def _call(self, tool: Mapping[str, Any]) -> str:
        """A call, behind its opening tag."""
        function = map_of(tool.get("function"))
        parameters, lenient = function.get("parameters"), function.get("strict") is not True
        shapes = [self._arguments(shape, parameters, lenient) for shape in _shapes(parameters)]
        head = _row(str(function.get("name", "")) + self._separator)
        return _joined([head, _either(shapes), _row(self._tags["</tool_call>"])])

    def _arguments(self, shape: _Shape, root: Schema, lenient: bool) -> str:
        found = []
        for name, schema in shape.properties.items():
            head = _row(name, self._tags["</arg_key>"], self._separator, self._tags["<arg_value>"])
            pair = self._pair(head, schema, root, lenient)
            found.append(pair if name in shape.required else f"{pair}?")
        further = [
            self._pair(self._key(pattern, shape), schema, root, lenient)
            for pattern, schema in shape.further
        ]
        return _joined([*found, f"({_either(further)})*" if further else ""]) or '""'

    def _key(self, pattern: str | None, shape: _Shape) -> str:
        """A name that is not declared, up to its value."""
        others = [quoted(name) for name in shape.properties]
        if pattern is None:
            patterns = [search(other) for other, _ in shape.further if other is not None]
            others += [f"/{other}/" for other in patterns if other]
        excluded = [f"~({' | '.join(others)})"] if others else []
        included = [] if pattern is None else [f"/{search(pattern)}/"]
        key = self._named("KEY", " & ".join([_KEY, _without(TAGS), *included, *excluded]))
        end = self._closed(key, self._tags["</arg_key>"])
        return _joined([*end, _row(self._separator, self._tags["<arg_value>"])])

    def _pair(self, head: str, schema: Schema, root: Schema, lenient: bool) -> str:
        """An argument; `head` is what stands between <arg_key> and the value."""
        end, found = self._tags["</arg_value>"], kinds(schema, root)
        if "string" in found:
            value = self._closed(self._string(schema, root), end)
        else:
            flat = found.isdisjoint({"object", "array"})
            rule = self._named("json", json_rule(self_contained(schema, root), lenient, flat))
            value = [rule, _row(end)]
        row = [_row(self._tags["<arg_key>"]), head, *value, _row(self._separator)]
        return self._named("pair", _joined(row))

    def _string(self, schema: Schema, root: Schema) -> str:
        """A value that may be a string."""
        text = self._named("VALUE", _without(["</arg_value>"]))
        options = text_options(schema, root, text)
        if options in (None, [], [text]):
            return text
        return self._named("VALUE", " | ".join(dict.fromkeys(options)))

    def _closed(self, terminal: str, tag: Tag) -> list[str]:
        """A text, and the tag that ends it."""
        if isinstance(tag, int):
            return [terminal, _row(tag)]
        # A greedy terminal would take the tag's first letters as its own.
        return [self._named("until", f"{terminal} {quoted(tag)}")]

    def _named(self, kind: str, body: str) -> str:
        """The name of the rule with this body: a terminal if `kind` is in capitals."""
        return self._names.setdefault((kind, body), f"{kind}{len(self._names)}")


def _row(*parts: Tag) -> str:
    """Texts and tokens one after another; texts side by side become one, to be matched as one."""
    row = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        group = [*map(str, group)]
        row += [quoted("".join(group))] if is_text else [f"<[{token}]>" for token in group]
    return _joined(row)


def _joined(row: Iterable[str]) -> str:
    """What is not empty, one after another."""
    return " ".join(part for part in row if part not in ("", '""'))


def _either(options: Iterable[str]) -> str:
    different = list(dict.fromkeys(options))
    return f"({' | '.join(different)})" if len(different) > 1 else different[0]


def _without(texts: Iterable[str]) -> str:
    """Any text that has none of these in it."""
    avoided = "|".join(re.escape(text).replace("/", r"\/") for text in texts)
    return f"/{ANY}/ & ~/{ANY}({avoided}){ANY}/"


# Arguments


def _shapes(parameters: Schema) -> list[_Shape]:
    """The shapes that arguments may have: one for each way through the unions."""
    found = variants(parameters, parameters) or [conjuncts(parameters, parameters)]
    return [_shape(parts) for parts in found]


def _shape(parts: list[Mapping[str, Any]]) -> _Shape:
    """Of schemas that hold at once."""
    declared = {name: None for part in parts for name in map_of(part.get("properties"))}
    required = {str(name): None for part in parts for name in list_of(part.get("required"))}
    names = declared | required
    schemas = {
        name: _all_of(s for part in parts for s in own_schemas(part, name)) for name in names
    }
    allowed = {name: s for name, s in schemas.items() if s is not False or name in required}
    return _Shape(allowed, set(required), _further(parts))


def _further(parts: list[Mapping[str, Any]]) -> list[tuple[str | None, Schema]]:
    """As `_Shape` has it. JSON schema allows them by default, but who declares means just those."""
    patterns = [item for part in parts for item in map_of(part.get("patternProperties")).items()]
    known: list[tuple[str | None, Schema]] = [item for item in patterns if search(item[0])]
    others = [part["additionalProperties"] for part in parts if "additionalProperties" in part]
    open_ended = any(parts) and not any("properties" in part for part in parts)
    if False in others or not (others or open_ended):
        return known
    return [*known, (None, _all_of(schema for schema in others if isinstance(schema, Mapping)))]


def _all_of(schemas: Iterable[Schema]) -> Schema:
    """A schema that is all of them."""
    found = list(schemas)
    return {"allOf": found} if len(found) > 1 else found[0] if found else {}


def _read(schema: Mapping[str, Any] | str | None) -> dict[str, Any] | None:
    """A schema of an answer."""
    if schema is None:
        return None
    try:
        found = json.loads(schema) if isinstance(schema, str) else schema
    except ValueError:
        found = None
    if not isinstance(found, Mapping):
        raise InvalidRequestError("the answer's JSON schema must be a JSON object")
    return dict(found)
