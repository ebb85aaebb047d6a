"""One operation of an API: typed JSON in, typed JSON or a stream of events out, as a route and as documentation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jaxinfer import events
from jaxinfer.serving.problems import Problem, status_of

JSON = "application/json"
HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no")]  # nginx would wait for more


class Gone(Exception):
    """Whoever asked has hung up; nobody reads an answer."""


class Events:
    """What is sent piece by piece: ready-made server-sent events, of which the last says how it ended. `failed` makes
    one of an error that comes when others have been sent already."""

    def __init__(self, events: AsyncGenerator[bytes], failed: Callable[[BaseException], bytes]):
        self.events, self.failed = events, failed


class Operation(NamedTuple):
    """`answer(body)` or `answer(body, **path)` gives a Struct (JSON), bytes (JSON already) or `Events`. `asks` is the
    type of the body (None: there is none), `gives` of the answer, `streams` of one event's data."""

    method: str
    path: str
    summary: str
    answer: Callable[..., Awaitable[Any]]
    asks: Any = None
    gives: Any = None
    streams: Any = None

    def route(self) -> Route:
        return Route(self.path, self._endpoint, methods=[self.method])

    async def _endpoint(self, request: Request) -> Any:
        request.state.fields = getattr(self.asks, "__struct_fields__", ())
        body = () if self.asks is None else (decode(await request.body(), request.headers, self.asks),)
        given = await while_here(request.receive, self.answer(*body, **request.path_params))
        if isinstance(given, Events):
            return _Stream(given)
        with events.timed("serialise"):
            return Response(given if isinstance(given, bytes) else msgspec.json.encode(given), media_type=JSON)


class _Stream:
    """The answer as an ASGI application. What fails before the first event has a status of its own."""

    def __init__(self, stream: Events):
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await while_here(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        begun, failure = False, None
        try:
            async with aclosing(self.stream.events) as pieces:
                async for event in pieces:
                    if not begun:
                        await send({"type": "http.response.start", "status": 200, "headers": HEAD})
                        begun = True
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Gone:
            raise
        except Exception as error:
            if not begun:
                raise
            failure = error
            await send({"type": "http.response.body", "body": self.stream.failed(error), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        if failure is not None and status_of(failure) == 500:
            raise failure  # for the log: the answer has been sent


async def while_here(receive: Receive, work: Awaitable[Any]) -> Any:
    """The result of `work`, which is cancelled when the client hangs up; then Gone is raised."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Gone()
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def decode(body: bytes, headers: Any, wanted: Any) -> Any:
    """A body of JSON as `wanted`. Raises Problem, naming the field, for what it is not."""
    kind = headers.get("content-type", JSON).partition(";")[0].strip().lower()
    if kind != JSON:
        raise Problem(415, f"the content type is {kind!r}; it must be {JSON}")
    try:
        return msgspec.json.decode(body, type=wanted)
    except msgspec.ValidationError as error:
        raise invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem(400, f"the body is no JSON: {error}", "invalid_json") from error


def invalid(error: msgspec.ValidationError) -> Problem:
    """msgspec's words as ours: "Expected `int`, got `str` - at `$.n`" is about n."""
    said, _, where = str(error).partition(" - at ")
    param = where.strip("`").removeprefix("$").lstrip(".") or None
    if "unknown field" in said:
        name = said.rpartition("unknown field")[2].strip(" `")
        param = f"{param}.{name}" if param else name
        return Problem(400, f"{param} is not a parameter of this operation", "unknown_parameter", param)
    if "missing required field" in said:
        name = said.rpartition("field")[2].strip(" `")
        param = f"{param}.{name}" if param else name
        return Problem(400, f"{param} is missing", "missing_required_parameter", param)
    return Problem(400, f"{param or 'the body'} is not valid: {said}", "invalid_value", param)
