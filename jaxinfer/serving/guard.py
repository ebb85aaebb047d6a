"""Around everything that a port serves: who may ask, how large and how slow, and that every failure is an answer."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import traceback
import uuid
from collections.abc import Sequence
from urllib.parse import quote

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxinfer.serving.operations import Gone
from jaxinfer.serving.problems import Problem, response_of, status_of
from jaxinfer.serving.site import Site
from jaxinfer.serving.transport import PATHSEND

# No key is asked for, and a server that stops answers these to the end.
OPEN = {"/health", "/livez", "/readyz", "/startupz", "/metrics", "/dashboard", "/v2/health/live", "/v2/health/ready"}
OURS = re.compile(r"[\w.-]{1,128}")
log = logging.getLogger("jaxinfer.serving")


class Guard:
    """ASGI middleware. `keys`: any of them as "Authorization: Bearer ..." opens the door; none: it is open.

    Only paths of `OPEN` are served without a key, and while the server stops (`site.draining`). A body larger or slower
    than the settings say is refused before it is read to its end; a client that takes nothing for `stall_timeout`
    seconds is cut off. An `admin`'s requests are not counted as running, and are served to the end. The log has
    methods, paths and kinds of errors, and never a body or a key.
    """

    def __init__(self, app: ASGIApp, site: Site, keys: Sequence[str], *, admin: bool = False):
        self.app, self.site, self.admin = app, site, admin
        self.keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = Exchange(self.site, scope, receive, send)
        counted = scope["path"] not in OPEN and not self.admin
        try:
            if counted or self.admin:
                self._check(exchange)
            self.site.running += counted
            try:
                await self.app(scope, exchange.receive, exchange.send)
            finally:
                self.site.running -= counted
        except (Gone, ClientDisconnect):
            pass
        except Exception as error:
            await exchange.fail(error)
        finally:
            exchange.close()

    def _check(self, exchange: Exchange) -> None:
        if sum(len(name) + len(value) for name, value in exchange.scope["headers"]) > self.site.settings.max_head:
            raise Problem(431, f"the headers are too large; at most {self.site.settings.max_head:,} bytes are taken",
                          "headers_too_large", headers={"Connection": "close"})
        if self.keys and not self._known(exchange.header(b"authorization")):
            raise Problem(401, "this server needs a key of its own: send it as \"Authorization: Bearer KEY\"",
                          "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self.site.draining and not self.admin:
            raise Problem(503, "the server is about to stop and takes no more requests", "server_stopping",
                          headers={"Retry-After": "5", "Connection": "close"})
        length = exchange.header(b"content-length")
        if length.isdigit() and int(length) > self.site.settings.max_body:
            raise exchange.too_large()

    def _known(self, said: bytes) -> bool:
        kind, _, key = said.partition(b" ")
        if kind.lower() != b"bearer":
            return False
        digest = hashlib.sha256(key.strip()).digest()
        return any([hmac.compare_digest(digest, known) for known in self.keys])  # all of them: no time tells which


class Stalled(Gone):
    """A client that takes nothing any more, as good as gone."""


class Exchange:
    """One request and its answer, with the limits on both."""

    def __init__(self, site: Site, scope: Scope, receive: Receive, send: Send):
        self.settings, self.scope, self._receive, self._send = site.settings, scope, receive, send
        self.begun = self.complete = False
        self.read = 0
        self._deadline: float | None = None  # for the whole body
        self._loop = asyncio.get_running_loop()
        self._sending: tuple[float, asyncio.Task] | None = None  # since when a message has been on its way, and whose
        self._look_again: asyncio.TimerHandle | None = None
        self._stalled = False
        given = self.header(b"x-request-id").decode("latin-1")
        self.id = given if OURS.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = self.id

    def header(self, name: bytes) -> bytes:
        return next((value for key, value in self.scope["headers"] if key == name), b"")

    @property
    def path(self) -> str:
        """As it was asked for: decoded, one could make lines of the log."""
        return quote(self.scope["path"])

    def too_large(self) -> Problem:
        return Problem(413, f"the body is too large; at most {self.settings.max_body:,} bytes are taken",
                       "body_too_large", headers={"Connection": "close"})

    async def receive(self) -> Message:
        if self.complete:
            return await self._receive()  # until the client hangs up
        if self._deadline is None:
            self._deadline = self._loop.time() + self.settings.body_timeout
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise Problem(408, f"the body did not come within {self.settings.body_timeout:g} seconds", "body_timeout",
                          headers={"Connection": "close"}) from None
        if message["type"] == "http.request":
            self.read += len(message.get("body", b""))
            if self.read > self.settings.max_body:
                raise self.too_large()
            self.complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.begun = True
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", self.id.encode())]}
        if message["type"] == PATHSEND:  # a file, for which the kernel watches who takes nothing
            return await self._send(message)
        task = asyncio.current_task()
        assert task is not None
        self._sending = self._loop.time(), task
        if self._look_again is None:
            self._look()
        try:
            await self._send(message)
        except asyncio.CancelledError:
            if not self._stalled:
                raise
            task.uncancel()
            log.info("%s %s: the client took nothing for %g s", self.scope["method"], self.path,
                     self.settings.stall_timeout)
            raise Stalled() from None
        finally:
            self._sending = None

    def _look(self) -> None:
        """Whether a message has been on its way for too long. One timer looks now and then: one for each message, of
        which a stream has one a token, took a tenth of what a token cost."""
        left, self._look_again = self.settings.stall_timeout, None
        if self._sending is not None:
            since, task = self._sending
            left += since - self._loop.time()
            if left <= 0:
                self._stalled = True
                task.cancel()
                return
        self._look_again = self._loop.call_later(left, self._look)

    def close(self) -> None:
        """Nothing more is sent."""
        if self._look_again is not None:
            self._look_again.cancel()

    async def fail(self, error: Exception) -> None:
        """Answer with the error, unless an answer has begun; what nobody raised on purpose goes into the log, with
        where it happened but without its message, which may quote the request."""
        if status_of(error) == 500:
            log.error("%s %s [%s]: %s\n%s", self.scope["method"], self.path, self.id, type(error).__name__,
                      "".join(traceback.format_tb(error.__traceback__)))
        if not self.begun:
            fields = self.scope["state"].get("fields", ())  # of the operation that was asked for
            flat = self.scope["path"].startswith("/v2")  # whose errors are a text, not OpenAI's object
            await response_of(error, fields, flat)(self.scope, self.receive, self.send)


async def reraise(_: object, error: Exception) -> None:
    """Starlette's handler for its own 404 and 405: the guard answers them too."""
    raise error


HANDLERS = {HTTPException: reraise}
