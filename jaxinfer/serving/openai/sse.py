"""Server-sent events as OpenAI's clients read them."""

from __future__ import annotations

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
    with events.timed("serialise"):
        return head + b"data: " + encoder.encode(data) + b"\n\n"


def failed(error: BaseException) -> bytes:
    """What a stream ends with that broke off: the error instead of a chunk."""
    return event(ErrorBody(detail_of(error))) + DONE
