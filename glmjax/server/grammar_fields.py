"""Which grammar a request asks for, under the names of SGLang's, vLLM's and OpenAI's fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from glmjax.errors import InvalidRequestError
from glmjax.server.unserved import Exact
from glmjax.text.grammar import GrammarSpec
from glmjax.text.value_grammar import self_contained

Kind = Literal["json_schema", "regex", "lark", "choice"]
KINDS: dict[str, Kind] = {
    "json_schema": "json_schema",
    "regex": "regex",
    "ebnf": "lark",
    "choice": "choice",
    "guided_json": "json_schema",
    "guided_regex": "regex",
    "guided_grammar": "lark",
    "guided_choice": "choice",
}
STRUCTURED_FIELD = "structured_outputs"
STRUCTURED: dict[str, Kind] = {
    "json_schema": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "lark",
}
FORMATS = ("text", "json_object", "json_schema")


class StructuredOutputs(Exact):
    """vLLM's later form of its guided_* fields: one of these."""

    json_schema: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    disable_fallback: bool | None = None  # there is none
    disable_any_whitespace: Literal[False] | None = None
    disable_additional_properties: Literal[False] | None = None

    def grammars(self) -> list[GrammarSpec]:
        """Every grammar that is asked for."""
        given = {name: getattr(self, name) for name in STRUCTURED}
        found = [
            _spec(STRUCTURED[n], v, STRUCTURED_FIELD) for n, v in given.items() if v is not None
        ]
        free = [GrammarSpec("json_object", None, STRUCTURED_FIELD)] if self.json_object else []
        return found + free


class GrammarFields(BaseModel):
    """SGLang's fields, `choice`, and vLLM's: at most one may be given."""

    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    choice: list[str] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None

    def grammars(self) -> list[GrammarSpec]:
        """Every grammar that is asked for."""
        given = {name: getattr(self, name) for name in KINDS}
        found = [grammar(name, value) for name, value in given.items() if value is not None]
        return found + (self.structured_outputs.grammars() if self.structured_outputs else [])

    def grammar(self) -> GrammarSpec | None:
        """The one grammar. Raises InvalidRequestError where there are several."""
        found = self.grammars()
        if len(found) > 1:
            names = " and ".join(dict.fromkeys(str(spec.param) for spec in found))
            raise InvalidRequestError(
                f"{names} ask for {len(found)} grammars, but an answer follows one; leave out the "
                "others",
                found[1].param,
            )
        return found[0] if found else None


def grammar(field: str, value: Any) -> GrammarSpec:
    """What a field of `KINDS` asks for."""
    return _spec(KINDS[field], value, field)


def _spec(kind: Kind, value: Any, field: str) -> GrammarSpec:
    return GrammarSpec(kind, tuple(value) if isinstance(value, list) else value, field)


def response_format(asked: dict[str, Any] | None) -> list[GrammarSpec]:
    """What OpenAI's field asks for; nothing where it asks for text.

    Keywords of a schema that llguidance does not know count only with `strict`.

    Raises:
        InvalidRequestError: it is of a type that is not served, or has no schema, or one that is
            nested too deep.
    """
    kind = "text" if asked is None else asked.get("type")
    if kind not in FORMATS:
        raise InvalidRequestError(
            f"response_format.type is {kind!r}, but must be one of {', '.join(FORMATS)}",
            "response_format",
        )
    if asked is None or kind == "text":
        return []
    if kind == "json_object":
        return [GrammarSpec("json_object", None, "response_format")]
    return [GrammarSpec("json_schema", _schema(asked.get("json_schema")), "response_format")]


def _schema(named: Any) -> dict[str, Any]:
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequestError(
            'response_format must be {"type": "json_schema", "json_schema": {"name": ..., '
            '"schema": {...}}}, but has no schema there',
            "response_format",
        )
    try:
        bare = self_contained(schema, schema, closed=False)
    except RecursionError:
        raise InvalidRequestError("response_format is nested too deep", "response_format") from None
    return bare if named.get("strict") is True else bare | {"x-guidance": {"lenient": True}}
