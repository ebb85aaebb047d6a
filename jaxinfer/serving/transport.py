"""uvicorn's connections with fewer copies: a large piece goes to the socket from where it lies, a file by sendfile."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from functools import partial
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

PATHSEND = "http.response.pathsend"  # the ASGI extension by which Starlette's FileResponse hands over a path


class Protocol(H11Protocol):
    """For uvicorn's `http`. A connection on which nothing is answered is closed unless the whole head of a request
    comes within `timeout_keep_alive` seconds, which uvicorn gives only who was answered to send the next byte."""

    _idle: asyncio.TimerHandle | None = None

    def __init__(self, config: Config, *args: Any, **options: Any):
        super().__init__(config, *args, **options)
        limit = config.h11_max_incomplete_event_size
        self.conn = Connection(h11.SERVER) if limit is None else Connection(h11.SERVER, limit)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app = Sendfile(self.app, transport)  # type: ignore[assignment]
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._watch()

    def _watch(self) -> None:
        idle = not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete)
        if idle and self._idle is None:
            self._idle = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        elif not idle and self._idle is not None:
            self._idle.cancel()
            self._idle = None


class Hollow:
    """Bytes of a body that go to the socket in another way: here they are only counted."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self) -> int:
        return self.size


class Connection(h11.Connection):
    """h11 joins what it sends, which would copy each piece of a body once."""

    def send(self, event: h11.Event) -> Any:
        parts = self.send_with_data_passthrough(event)
        if parts is None:
            return None
        if len(parts) == 1:
            return b"" if isinstance(parts[0], Hollow) else parts[0]
        return b"".join(parts)


class Sendfile:
    """The application with that extension: the kernel sends the file, where the connection is not encrypted."""

    def __init__(self, app: Any, transport: asyncio.Transport):
        self.app: ASGIApp = app
        self.transport = transport

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope.setdefault("extensions", {})[PATHSEND] = {}
            send = partial(self._send, send)
        await self.app(scope, receive, send)

    async def _send(self, send: Send, message: Message) -> None:
        if message["type"] != PATHSEND:
            return await send(message)
        with open(message["path"], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            await send({"type": "http.response.body", "body": Hollow(size), "more_body": True})
            if size and not self.transport.is_closing():
                sent = 0
                with suppress(ConnectionError):  # whoever asked has hung up
                    sent = await asyncio.get_running_loop().sendfile(self.transport, file, 0, size)
                if sent < size:  # or the file was cut off: a connection that ends says that there should be more
                    self.transport.abort()
                    await asyncio.sleep(0)  # in which the connection hears of it
        await send({"type": "http.response.body", "body": b"", "more_body": False})
