"""An open load generator: each request goes out when it is due, whatever became of those before it.

It runs in a process of its own, so that it shares no interpreter with a server. Each request has a connection of its
own. What comes back is put aside with its time, and read only when all is over.
"""

from __future__ import annotations

import asyncio
import json
import re
import resource
import subprocess
import sys
from typing import Any, NamedTuple
from urllib.parse import urlsplit

SOON = 0.3  # seconds from the beginning until the first request is due
EVENT = re.compile(rb"data: (\[DONE\]|\{.*\})\n")


class Reply(NamedTuple):
    """What one request got, in seconds since the load began: its `status` (0: none came) and when that came (`head`),
    when each piece of text came (`times`), and when the connection was closed. `tokens` were drawn, as its usage says.
    It is `whole` if its stream ended as it should."""

    due: float
    status: int
    head: float
    times: list[float]
    end: float
    tokens: int
    whole: bool
    retry_after: str

    @property
    def first(self) -> float:
        """Seconds from when it was due to its first text."""
        return self.times[0] - self.due

    @property
    def took(self) -> float:
        return self.end - self.due

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def offer(url: str, requests: list[tuple[float, dict[str, Any]]], patience: float) -> list[Reply]:
    """POST each body to `url` when it is due (in seconds), all from another process. What has not ended `patience`
    seconds after the last was due is hung up on."""
    ask = json.dumps({"url": url, "requests": requests, "patience": patience})
    done = subprocess.run([sys.executable, __file__], input=ask, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr}")
    return [Reply(*reply) for reply in json.loads(done.stdout)]


class Exchange(asyncio.Protocol):
    """One request; `pieces` are what came, and when."""

    def __init__(self, request: bytes):
        self.request, self.pieces, self.closed = request, list[tuple[float, bytes]](), asyncio.Event()
        self.loop, self.ended = asyncio.get_running_loop(), 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((self.loop.time(), data))

    def connection_lost(self, _: Exception | None) -> None:
        self.ended = self.loop.time()
        self.closed.set()

    def reply(self, due: float, begun: float) -> Reply:
        """Each event came with the piece that has its last byte."""
        body, ends = b"".join(data for _, data in self.pieces), []
        for at, data in self.pieces:
            ends.append((len(data) + (ends[-1][0] if ends else 0), at - begun))
        head, _, _ = body.partition(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/") else 0
        retry = re.search(rb"(?i)\r\nretry-after: *(\S+)", head)
        times, tokens, whole, piece = list[float](), 0, False, 0
        for found in EVENT.finditer(body):
            while ends[piece][0] < found.end():
                piece += 1
            whole = found[1] == b"[DONE]"
            event = {} if whole else json.loads(found[1])
            if any(choice.get("text") or choice.get("delta", {}).get("content") for choice in event.get("choices", ())):
                times.append(ends[piece][1])
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        return Reply(due, status, ends[0][1] if ends else 0.0, times, self.ended - begun, tokens, whole,
                     retry[1].decode() if retry else "")


async def run(url: str, requests: list[tuple[float, dict[str, Any]]], patience: float) -> list[Reply]:
    where, loop = urlsplit(url), asyncio.get_running_loop()
    begun = loop.time() + SOON
    wires = [_wire(where.netloc, where.path, body) for _, body in requests]  # before the first is due
    last = begun + max(due for due, _ in requests) + patience

    async def one(due: float, wire: bytes) -> Exchange:
        await asyncio.sleep(begun + due - loop.time())
        exchange = Exchange(wire)
        try:
            async with asyncio.timeout_at(last):
                await loop.create_connection(lambda: exchange, where.hostname, where.port)
                await exchange.closed.wait()
        except (TimeoutError, OSError):
            exchange.ended = loop.time()
            if hasattr(exchange, "transport"):
                exchange.transport.abort()
        return exchange

    done = await asyncio.gather(*(one(due, wire) for (due, _), wire in zip(requests, wires, strict=True)))
    return [exchange.reply(due, begun) for (due, _), exchange in zip(requests, done, strict=True)]


def _wire(host: str, path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    return (f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            f"Content-Length: {len(content)}\r\n\r\n").encode() + content


def main() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    print(json.dumps(asyncio.run(run(**json.load(sys.stdin)))))


if __name__ == "__main__":
    main()
