"""Threads for what would hold up the event loop, of three kinds that do not wait for one another: requests are prepared
on anyio's own, who watches a server and who operates it have others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

PREPARING = 256  # requests at a time: a grammar is compiled for seconds, and what is quick must not wait for many such
T = TypeVar("T")


class Threads:
    """At most so many at a time, in each event loop."""

    def __init__(self, name: str, most: int):
        self._most, self._limiter = most, RunVar[CapacityLimiter | None](name, None)

    async def run(self, work: Callable[..., T], *args: object, abandon: bool = False) -> T:
        """What `work(*args)` returns. A caller who is cancelled waits for its end, or abandons it."""
        limiter = self._limiter.get()
        if limiter is None:
            self._limiter.set(limiter := CapacityLimiter(self._most))
        return await to_thread.run_sync(work, *args, limiter=limiter, abandon_on_cancel=abandon)


WATCHING = Threads("watching", 8)
OPERATING = Threads("operating", 32)


def prepare_many() -> None:
    """In this event loop, of which anyio would prepare 40."""
    limiter = to_thread.current_default_thread_limiter()
    limiter.total_tokens = max(limiter.total_tokens, PREPARING)
