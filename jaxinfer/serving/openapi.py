"""/openapi.json: the operations of a server, described from their types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jaxinfer.serving.operations import JSON, Operation
from jaxinfer.serving.problems import ErrorBody

WRONG = {400: "What was asked for cannot be", 401: "A key is needed", 404: "There is no such model",
         405: "This path takes another method",
         408: "The body was too slow", 413: "The body is too large", 415: "The body is no JSON",
         429: "The queue is full; Retry-After says when to come again", 500: "The server failed",
         503: "The model is being loaded, or the server stops", 504: "The time for the request was over"}
PLACE = re.compile(r"{(\w+):\w+}")


def document(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    used = [one for op in operations for one in (op.asks, op.gives, op.streams) if one is not None] + [ErrorBody]
    types = list(dict.fromkeys(used))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, Any] = {}
    for op in operations:
        paths.setdefault(PLACE.sub(r"{\1}", op.path), {})[op.method.lower()] = _described(op, schema_of)
    return {"openapi": "3.1.0", "info": {"title": "jaxinfer", "version": version}, "paths": paths,
            "components": {"schemas": components, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "security": [{}, {"key": []}]}


def _described(op: Operation, schema_of: dict[Any, Any]) -> dict[str, Any]:
    content = {JSON: {"schema": schema_of[op.gives]}}
    if op.streams is not None:
        piece = {"anyOf": [schema_of[op.streams], schema_of[ErrorBody]]}
        data = {"anyOf": [{"const": "[DONE]"}, {"type": "string", "contentMediaType": JSON, "contentSchema": piece}]}
        content["text/event-stream"] = {"schema": {  # of each event, as is read before OpenAPI 3.2
            "type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}}
    wrong = {JSON: {"schema": schema_of[ErrorBody]}}
    said: dict[str, Any] = {
        "operationId": f"{op.method.lower()}{op.path.replace('/', '_').replace('{model:path}', 'model')}",
        "summary": op.summary,
        "responses": {"200": {"description": op.summary, "content": content},
                      **{str(status): {"description": why, "content": wrong} for status, why in WRONG.items()}},
    }
    if op.asks is not None:
        said["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_of[op.asks]}}}
    if names := PLACE.findall(op.path):
        said["parameters"] = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
                              for name in names]
    return said


def route(operations: Sequence[Operation], version: str) -> Route:
    body = msgspec.json.encode(document(operations, version))

    async def answer(_: Request) -> Response:
        return Response(body, media_type=JSON)

    return Route("/openapi.json", answer)
