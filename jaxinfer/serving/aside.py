"""Work on another thread than the event loop's, which nobody may be left waiting for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from anyio import to_thread

T = TypeVar("T")


async def begun_aside(work: Callable[[], T], undo: Callable[[T], object]) -> T:
    """The result of `work`, which begins what somebody must end. A thread cannot be stopped: where whoever waits is
    cancelled, `undo` gets the result when it is there."""
    working = asyncio.ensure_future(to_thread.run_sync(work))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        working.add_done_callback(lambda done: done.cancelled() or done.exception() or undo(done.result()))
        raise
