"""/openapi.json: FastAPI's own description with what it cannot know, answers and limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from glmjax.server.http.endpoints import ENDPOINTS, KINDS, STATUSES, TAGS, Endpoint
from glmjax.server.http.keys import OPEN
from glmjax.server.http.request_schemas import REF, narrow, ref
from glmjax.server.openai.answers import ChatTool, ChatTurn
from glmjax.server.sglang.answers import AnthropicError, Error

Schema = dict[str, Any]

ABOUT = """A server of one model of the GLM-4.5 family: 4.5, 4.5 Air, 4.6 or 4.7.

It speaks OpenAI's API, Anthropic's Messages and SGLang's own API. A field that it does not know is
an error that names the field, unless it is null, false or empty; a field that is null is as if
left out. Errors have the shape of OpenAI's API, under /v1/messages that of Anthropic's. Any path
answers 404 with the code "unknown_path", or "not_served" where it is one of another server's; a
wrong method answers 405. Numbers and booleans may also come as strings that spell them."""

OPENAPI = "3.1.0"  # what makers of clients read
ANTHROPIC = "/v1/messages"
TEXT = {"type": "string"}
WAIT = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
WAITING = (429, 503)
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}

UNUSED = ("HTTPValidationError", "ValidationError")  # FastAPI's, for a 422 that is never sent


def describe(app: FastAPI, model: str, keyed: bool = False) -> Schema:
    """The OpenAPI description of `app`, whose endpoints should be in `ENDPOINTS`.

    Args:
        app: the application.
        model: the name of its model, for examples.
        keyed: whether clients need a key.
    """
    schema = get_openapi(
        title="glmjax",
        version=app.version,
        openapi_version=OPENAPI,
        description=ABOUT,
        routes=app.routes,
        tags=[{"name": name, "description": words} for name, words in TAGS.items()],
    )
    for path, operation in _operations(schema):
        if path in ENDPOINTS:
            _complete(operation, ENDPOINTS[path], path, model)
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for name in UNUSED:
        components.pop(name, None)
    narrow(components, model)
    components.update(answer_schemas())
    if keyed:
        _add_keys(schema)
    return schema


def _add_keys(schema: Schema) -> None:
    schema["components"]["securitySchemes"] = KEYS
    schema["security"] = [{name: []} for name in KEYS]
    for path, operation in _operations(schema):
        if path in OPEN:
            operation["security"] = []
        else:
            operation["responses"]["401"] = _error(401, path)


def _operations(schema: Schema) -> Iterator[tuple[str, Schema]]:
    for path, methods in schema["paths"].items():
        yield from ((path, operation) for operation in methods.values())


def _complete(operation: Schema, endpoint: Endpoint, path: str, model: str) -> None:
    statuses = KINDS[endpoint.kind]
    operation["tags"] = [endpoint.tag]
    operation["responses"] = {"200": _success(endpoint)} | {
        str(status): _other(status, endpoint, path) for status in statuses
    }
    if endpoint.examples:
        named = {"model": model} if 404 in statuses else {}
        examples = {name: {"value": named | dict(body)} for name, body in endpoint.examples.items()}
        operation["requestBody"]["content"]["application/json"]["examples"] = examples


def _success(endpoint: Endpoint) -> Schema:
    if endpoint.answer is None:
        return {"description": "Text.", "content": {"text/plain": {"schema": TEXT}}}
    content, words = _json(endpoint.answer), _words(endpoint.answer)
    if endpoint.event is not None:
        words += " With stream: server-sent events, each as the schema says."
        content |= {"text/event-stream": {"schema": _event(endpoint.event, endpoint.last)}}
    return {"description": words, "content": content}


def _event(model: type, last: str | None) -> Schema:
    """A server-sent event, whose data is JSON; an error may be the last before `last`."""
    content = {"anyOf": [ref(model), ref(Error)]}
    data = {"contentMediaType": "application/json", "contentSchema": content}
    either = data if last is None else {"anyOf": [{"const": last}, data]}
    properties = {"data": TEXT | either, "event": TEXT}
    return {"type": "object", "properties": properties, "required": ["data"]}


def _other(status: int, endpoint: Endpoint, path: str) -> Schema:
    if body := endpoint.answers.get(status):
        return {"description": STATUSES[status], "content": _json(body)}
    return _error(status, path)


def _error(status: int, path: str) -> Schema:
    body = AnthropicError if path.startswith(ANTHROPIC) else Error
    headers = {"headers": WAIT} if status in WAITING else {}
    return {"description": STATUSES[status], "content": _json(body)} | headers


def _json(model: type) -> Schema:
    return {"application/json": {"schema": ref(model)}}


def _words(model: type) -> str:
    return (model.__doc__ or "").strip()


def answer_schemas() -> dict[str, Schema]:
    """Schemas of all that is answered, and of what requests leave open, by their own names."""
    models = {Error, AnthropicError, ChatTurn, ChatTool}
    for endpoint in ENDPOINTS.values():
        models |= {endpoint.answer, endpoint.event, *endpoint.answers.values()} - {None}
    ordered = sorted(models, key=lambda model: model.__name__)
    _, schema = models_json_schema([(model, "validation") for model in ordered], ref_template=REF)
    return schema["$defs"]
