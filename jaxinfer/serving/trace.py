"""Which trace a request belongs to (W3C Trace Context), and the middleware that finds it out and says how it ended."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxinfer import events

TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
# Asked for so often that nobody wants to hear of it.
QUIET = frozenset({"/health", "/livez", "/readyz", "/startupz", "/metrics", "/v2/health/live", "/v2/health/ready",
                   "/dashboard/data"})
GONE = 499  # a caller who left before the answer began, as nginx counts it
ACCESS = logging.getLogger("jaxinfer.access")


@dataclass(frozen=True)
class Parent:
    """What a caller said of the span that it asks from: hexadecimal ids, and whether it is recorded."""

    trace_id: str
    span_id: str
    sampled: bool


def parse(traceparent: str | None) -> Parent | None:
    """The header `traceparent`; None where it is absent or, as the standard wants, not understood.

    >>> parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    Parent(trace_id='0af7651916cd43dd8448eb211c80319c', span_id='b7ad6b7169203331', sampled=True)
    >>> parse("00-00000000000000000000000000000000-b7ad6b7169203331-01")
    """
    match = TRACEPARENT.fullmatch(traceparent.strip()) if traceparent else None
    if match is None:
        return None
    version, trace, span, flags, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return Parent(trace, span, bool(int(flags, 16) & 1))


@dataclass
class Trace:
    """One request over HTTP, on which gRPC lies too: the tag of what it asks of models. `span` is what an exporter made
    of it, if there is one."""

    method: str
    path: str
    trace_id: str
    span_id: str
    parent: Parent | None = None
    state: str | None = None  # the header `tracestate`
    status: int = 0
    began: float = field(default_factory=time.perf_counter)
    began_ns: int = field(default_factory=time.time_ns)  # the same, for who is shown it
    span: Any = None


class Tracing:
    """The traces of one server, and the middleware that finds them. `begin` and `end`, if they are set, are an
    exporter's: they may give a trace a span, and ids with it."""

    begin: Callable[[Trace], None] | None = None
    end: Callable[[Trace], None] | None = None

    def around(self, app: ASGIApp) -> ASGIApp:
        async def traced(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"] in QUIET:
                await app(scope, receive, send)
                return
            with self.over(scope["method"], scope["path"], Headers(scope=scope)) as trace:
                async def watched(message: Message) -> None:
                    if message["type"] == "http.response.start":
                        trace.status = message["status"]
                    await send(message)

                await app(scope, receive, watched)
                trace.status = trace.status or GONE

        return traced

    @contextmanager
    def over(self, method: str, path: str, headers: Mapping[str, str]) -> Iterator[Trace]:
        """What is asked for in the `with` block belongs to this request, whose `status` is set there."""
        parent = parse(headers.get("traceparent"))
        trace_id = parent.trace_id if parent else secrets.token_hex(16)
        trace = Trace(method, path, trace_id, secrets.token_hex(8), parent,
                      headers.get("tracestate") if parent else None)
        if self.begin is not None:
            self.begin(trace)
        try:
            with events.tagged(trace):
                yield trace
        except BaseException as error:
            trace.status = trace.status or (500 if isinstance(error, Exception) else GONE)
            raise
        finally:
            self._ended(trace)

    def _ended(self, trace: Trace) -> None:
        seconds = time.perf_counter() - trace.began
        with events.tagged(trace):
            ACCESS.info("%s %s", trace.method, trace.path, extra={"fields": {
                "status": trace.status, "seconds": round(seconds, 6)}})
        if self.end is not None:
            self.end(trace)
