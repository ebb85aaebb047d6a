"""The Open Inference Protocol (version 2) over HTTP."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxinfer.alignment import ALIGNMENT, aligned
from jaxinfer.errors import InvalidRequest, JaxinferError
from jaxinfer.serving.inference.about import is_model_ready, is_ready, model_metadata, repository, server_metadata, told
from jaxinfer.serving.inference.datatypes import short
from jaxinfer.serving.inference.question import answer, by_size
from jaxinfer.serving.inference.regions import Regions
from jaxinfer.serving.inference.rest import grouped, read, write
from jaxinfer.serving.operations import while_here
from jaxinfer.serving.problems import Problem, headers_of, status_of
from jaxinfer.serving.site import Site

HEADER = "Inference-Header-Content-Length"
PIECE = 2**20  # bytes that a slow reader must take within the server's patience
MODEL, VERSION, REGION = "/v2/models/{model:path}", "/versions/{version}", "/v2/systemsharedmemory/region/{region}"

Asked = Callable[[Request], Awaitable[Any]]


class Operations:
    """Over a site; `regions` is None where clients' shared memory is not taken."""

    def __init__(self, site: Site, regions: Regions | None):
        self.site, self.regions = site, regions

    def routes(self) -> list[Route]:
        table: list[tuple[str, str, Asked]] = [
            ("GET", "/v2", self.server), ("GET", "/v2/health/live", self.live), ("GET", "/v2/health/ready", self.ready)]
        for verb, method, asked in (("/infer", "POST", self.infer), ("/ready", "GET", self.model_ready),
                                    ("", "GET", self.model)):
            table += [(method, MODEL + VERSION + verb, asked), (method, MODEL + verb, asked)]
        return [_route(*row) for row in table]

    def admin(self) -> list[Route]:
        return [_route("POST", "/v2/repository/index", self.index)]

    async def live(self, request: Request) -> Any:
        return _json({"live": True})

    async def ready(self, request: Request) -> Any:
        ready = is_ready(self.site)
        return _json({"ready": ready}, 200 if ready else 503)

    async def server(self, request: Request) -> Any:
        return _json(server_metadata(self.regions is not None))

    async def model_ready(self, request: Request) -> Any:
        name, version = _model(request)
        ready = is_model_ready(self.site, name, version)
        return _json({"name": name, "ready": ready}, 200 if ready else 503)

    async def model(self, request: Request) -> Any:
        return _json(await model_metadata(self.site, *_model(request)))

    async def infer(self, request: Request) -> Any:
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Problem(415, "the body is compressed; send it as it is, without a Content-Encoding")
        header = _length(request.headers.get(HEADER))
        body, copied = await _body(request, header or 0)
        return await while_here(request.receive, self._infer(*_model(request), body, header, copied))

    async def _infer(self, model: str, version: str, body: memoryview, header: int | None, received: int) -> Any:
        question = await by_size(len(body), partial(read, model, version, body, header, self.regions))
        question.copied += received
        found = await answer(self.site, question)
        head, pieces, copied = await by_size(found.nbytes, partial(write, found))
        groups, joined = grouped([head, *pieces])
        found.leaves("http", copied + joined)
        return Pieces(groups, len(head) if pieces else None)

    async def index(self, request: Request) -> Any:
        ready = (await _object(request)).get("ready", False)
        return _json([row for row in repository(self.site) if row["state"] == "READY" or not ready])


class MemoryOperations:
    """What clients say of their shared memory."""

    def __init__(self, regions: Regions):
        self.regions = regions

    def routes(self) -> list[Route]:
        all_ = "/v2/systemsharedmemory"
        return [_route("GET", f"{all_}/status", self.status), _route("GET", f"{REGION}/status", self.status),
                _route("POST", f"{REGION}/register", self.register),
                _route("POST", f"{all_}/unregister", self.unregister),
                _route("POST", f"{REGION}/unregister", self.unregister)]

    async def status(self, request: Request) -> Any:
        return _json([told(region) for region in self.regions.status(request.path_params.get("region", ""))])

    async def register(self, request: Request) -> Any:
        said = await _object(request)
        self.regions.register(request.path_params["region"], said.get("key"), said.get("offset", 0),
                              said.get("byte_size"))
        return _json({})

    async def unregister(self, request: Request) -> Any:
        self.regions.unregister(request.path_params.get("region", ""))
        return _json({})


class Pieces:
    """An answer as an ASGI application: pieces that go out one after the other from where they lie, without being
    joined. The first `header` bytes are JSON (None: all)."""

    def __init__(self, pieces: list[Any], header: int | None):
        self.pieces, self.header = pieces, header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = "application/json" if self.header is None else "application/octet-stream"
        headers = {"content-type": kind, "content-length": str(sum(map(len, self.pieces)))}
        if self.header is not None:
            headers[HEADER.lower()] = str(self.header)
        await send({"type": "http.response.start", "status": 200,
                    "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
        for piece in map(memoryview, self.pieces):
            for start in range(0, len(piece), PIECE):
                await send({"type": "http.response.body", "body": piece[start: start + PIECE], "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _route(method: str, path: str, asked: Asked) -> Route:
    """A failure is answered in the protocol's JSON; what nobody raised on purpose is the guard's."""
    async def endpoint(request: Request) -> Any:
        try:
            return await asked(request)
        except JaxinferError as error:
            return _json({"error": str(error)}, status_of(error), headers_of(error))
    return Route(path, endpoint, methods=[method])


def _json(said: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII: what a client sent and is told of may be no Unicode."""
    return Response(json.dumps(said), status, headers, "application/json")


def _model(request: Request) -> tuple[str, str]:
    return request.path_params["model"], request.path_params.get("version", "")


def _length(said: str | None) -> int | None:
    if said is not None and not (said.isascii() and said.isdigit() and len(said) < 19):
        raise InvalidRequest(f"{HEADER} is {short(said)}; it must be a number of bytes")
    return None if said is None else int(said)


async def _body(request: Request, header: int) -> tuple[memoryview, int]:
    """The body, and how many bytes of it were copied here. One that comes in pieces is written into memory in which
    what follows the header begins at a 64-byte boundary: a device can read the first tensor where it lies."""
    said = request.headers.get("content-length", "")
    if not said.isdigit() or "transfer-encoding" in request.headers:  # which decides the length, whatever is said
        body = await request.body()
        return memoryview(body), len(body)
    size, at = int(said), 0
    room: np.ndarray | None = None
    async for piece in request.stream():
        if room is None and len(piece) == size:
            return memoryview(piece), 0
        if room is None:
            before = -header % ALIGNMENT
            room = aligned((before + size,), np.uint8)[before:]
        room[at: at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    return memoryview(b"" if room is None else room[:at]), at


async def _object(request: Request) -> Mapping[str, Any]:
    """The JSON object that a body is; an empty one says nothing."""
    body = await request.body()
    try:
        said = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the body is no JSON: {short(str(error))}") from error
    if not isinstance(said, dict):
        raise InvalidRequest(f"the body is {short(said)}; it must be an object")
    return said
