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
from glmjax.text.grammar import MAX_GRAMMAR_CHARS, flaw
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


class StrictToolError(InvalidRequestError):
    """Calls of a tool with `strict` cannot be held to its parameters.

    Attributes:
        name: the tool's.
        cause: what in its parameters is not served.
    """

    def __init__(self, name: str, cause: str):
        super().__init__(f"the parameters of the strict tool {name!r}: {cause}", "tools")
        self.name, self.cause = name, cause


def tool_grammar(
    tools: Sequence[Mapping[str, Any]],
    form: Literal["glm45", "glm47"],
    tags: Mapping[str, int | None],
    *,
    least: int = 0,
    most: int | None = None,
    text: bool = False,
    answer: Mapping[str, Any] | str | None = None,
    careful: bool = False,
) -> str:
    """What a `GrammarSpec` of kind "lark" takes, for an answer that may call tools.

    Arguments come in the order of the schema's `properties`, each at most once, those required
    always. Further ones follow if `additionalProperties` says so, or no properties are declared.

    A value is of its schema, and objects in it that declare properties have no others either.
    Strings are verbatim: with their `enum`, `const`, `pattern` and length, but whatever their
    `format`; they cannot hold "</arg_value>". Lengths above `patterns.MAX_COUNT` are left out, and
    so is a pattern that is long, that counts beyond it, or that llguidance does not know. Where a
    string is one of several types, and another one has more values than `null` or `enum` name, any
    text may come.

    Args:
        tools: those that may be called, as in OpenAI's API. Keywords of JSON schema that llguidance
            does not know count only for tools with `strict`, where they are an error.
        form: "glm45", with line breaks between the parts, or "glm47", without.
        tags: of each of TAGS its token, which nothing else can stand for; None if it is spelled in
            letters. Strings within JSON might then hold it, too.
        least: how many calls must come.
        most: how many may come; None for any number.
        text: text without tags may come before calls, or alone if `least` is 0.
        answer: a JSON schema, or its JSON: with `least` 0, JSON of it may come instead of calls;
            then no text.
        careful: for schemas of which one does not compile. Values that it is of are any JSON of
            their types; where the tool is strict, it is an error. Slow, as each is compiled.

    Raises:
        StrictToolError: a tool with `strict` has parameters that are not served.
        InvalidRequestError: calls must come, but there are no tools; `answer` is no schema; or
            schemas are nested too deep.
    """
    text = text and answer is None
    writer = _Writer(tags, _SEPARATORS[form], careful)
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

    def __init__(self, tags: Mapping[str, int | None], separator: str, careful: bool):
        tokens = {tag: tags.get(tag) for tag in TAGS}
        self._tags: dict[str, Tag] = {t: t if i is None else i for t, i in tokens.items()}
        self._separator, self._careful = separator, careful
        self._names: dict[tuple[str, str], str] = {}  # kind of a rule and its body -> its name
        self._chars = 0

    def finished(self, start: str) -> str:
        lazy = {"until": "[lazy]"}
        rules = [f"{n}{lazy.get(kind, '')}: {body}" for (kind, body), n in self._names.items()]
        return "\n".join([f"start: {start}", *rules, ""])

    def plain(self, text: bool, answer: dict[str, Any] | None) -> str:
        """What may come instead of calls."""
        if answer is not None:
            return self._named("json", json_rule(answer, lenient=False))
        return self._text() if text else '""'

    def calls(
        self, tools: Iterable[Mapping[str, Any]], least: int, most: int | None, text: bool
    ) -> str:
        opening = self._tags["<tool_call>"]
        head = self._closed(self._text(), opening) if text else [_row(opening)]
        call = self._named("call", " | ".join(dict.fromkeys(map(self._call, tools))))
        bounds = f"{max(least - 1, 0)},{'' if most is None else most - 1}"
        more = f"({_row(self._separator, opening)} {call}){{{bounds}}}"
        return _joined([*head, call, more if most != 1 else ""])

    def _text(self) -> str:
        return self._named("TEXT", _without(TAGS))

    def _call(self, tool: Mapping[str, Any]) -> str:
        """A call, behind its opening tag."""
        function = map_of(tool.get("function"))
        name, parameters = str(function.get("name", "")), function.get("parameters")
        lenient = function.get("strict") is not True
        try:
            found = _shapes(parameters) if lenient else _strict_shapes(parameters)
            shapes = [self._arguments(shape, parameters, lenient) for shape in found]
        except ValueError as error:
            raise StrictToolError(name, str(error)) from None
        head = _row(name + self._separator)
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
            value = self._closed(self._string(schema, root, lenient), end)
        else:
            value = [self._json(schema, root, lenient, found), _row(end)]
        row = [_row(self._tags["<arg_key>"]), head, *value, _row(self._separator)]
        return self._named("pair", _joined(row))

    def _json(self, schema: Schema, root: Schema, lenient: bool, found: frozenset[str]) -> str:
        """A value that is one of the types `found`, none of them a string."""
        flat = found.isdisjoint({"object", "array"})
        rule = json_rule(self_contained(schema, root), lenient, flat)
        cause = flaw(f"start: {rule}") if self._careful else None
        if cause and not lenient:
            raise ValueError(cause)
        plain = json_rule({"type": sorted(found)}, lenient, flat)
        return self._named("json", plain if cause else rule)

    def _string(self, schema: Schema, root: Schema, lenient: bool) -> str:
        """A value that may be a string."""
        text = self._named("VALUE", _without(["</arg_value>"]))
        options = text_options(schema, root, text, lenient)
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
        if (kind, body) not in self._names:
            self._chars += len(body)
            if self._chars > MAX_GRAMMAR_CHARS:  # before all of it is written
                raise InvalidRequestError(
                    f"the tools' schemas make a grammar of more than {MAX_GRAMMAR_CHARS} "
                    "characters; offer fewer tools at once, or simpler ones",
                    "tools",
                )
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
    found = [_shape(parts) for parts in variants(parameters, parameters)]
    if not found:  # too many ways: what is declared besides them, and anything
        found = [_shape(conjuncts(parameters, parameters))._replace(further=[(None, {})])]
    return found


def _strict_shapes(parameters: Schema) -> list[_Shape]:
    """The same, of parameters that are held to. Raises ValueError: they are not served."""
    if parameters is None:
        return _shapes(parameters)
    if "object" not in kinds(parameters, parameters):
        raise ValueError("arguments are an object, but their type is another one")
    cause = flaw(f"start: {json_rule(self_contained(parameters, parameters), lenient=False)}")
    if cause:
        raise ValueError(cause)
    if not variants(parameters, parameters):
        raise ValueError("anyOf and oneOf have too many ways through them")
    return _shapes(parameters)


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
