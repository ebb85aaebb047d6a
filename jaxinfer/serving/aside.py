"""Work on another thread than the event loop's, which nobody may be left waiting for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from anyio import to_thread

T = TypeVar("T")


async def aside(work: Callable[[], T]) -> T:
    """The result of `work`. Whoever is cancelled goes at once; the thread keeps its place among those that may be until
    it has ended."""
    return await begun_aside(work, lambda _: None)


async def begun_aside(work: Callable[[], T], undo: Callable[[T], object]) -> T:
    """The result of `work`, which begins what somebody must end. A thread cannot be stopped: where whoever waits is
    cancelled, `undo` gets the result when it is there."""
    working = asyncio.ensure_future(to_thread.run_sync(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        working.add_done_callback(lambda done: done.cancelled() or done.exception() or undo(done.result()))
        raise


def withdraw(asked: Iterable[Any]) -> None:
    """Cancel what has not ended of replies or answers."""
    for one in asked:
        one.cancel()
