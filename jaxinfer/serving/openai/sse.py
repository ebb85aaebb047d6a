"""Server-sent events as OpenAI's clients read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from jaxinfer import events
from jaxinfer.serving.problems import ErrorBody, detail_of

DONE = b"data: [DONE]\n\n"
encoder = msgspec.json.Encoder()


def event(data: Any, name: str | None = None) -> bytes:
    """One event.

    >>> event({"a": 1}, "told")
    b'event: told\\ndata: {"a":1}\\n\\n'
    """
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + encoder.encode(data) + b"\n\n"


@contextmanager
def writing() -> Iterator[Callable[..., bytes]]:
    """`event`, for one answer: how long all of its events took is told at its end, if anybody listens."""
    seconds = 0.0

    def timed(data: Any, name: str | None = None) -> bytes:
        nonlocal seconds
        began = time.perf_counter()
        made = event(data, name)
        seconds += time.perf_counter() - began
        return made

    try:
        yield timed
    finally:
        events.emit(events.Timed("serialise", seconds))


def failed(error: BaseException) -> bytes:
    """What a stream ends with that broke off: the error instead of a chunk."""
    return event(ErrorBody(detail_of(error))) + DONE
