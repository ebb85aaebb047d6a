"""How an endpoint's results come back: to a thread that waits, as a future, or to an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple


class Result(NamedTuple):
    """What became of one request of a batch; `flagged` names arrays with NaN in them, `bytes_copied` counts what was
    copied of its arrays on their way to the device."""

    value: Any = None
    error: BaseException | None = None
    flagged: tuple[str, ...] = ()
    bytes_copied: int = 0


class Reply(Future):
    """What becomes of a request: a future of the function's result, which can also be awaited. `version` is that of
    the weights that made it, `flagged` names the arrays with NaN in them where the endpoint looks for that, and
    `bytes_copied` counts what the host copied of the request: 0 where all of it was read where it lay."""

    version: int | None = None
    flagged: tuple[str, ...] = ()
    bytes_copied: int = 0
    withdraw: Callable[[], bool] = staticmethod(lambda: False)  # the endpoint's: True if nobody else ends the request

    def cancel(self) -> bool:
        """End the request. False if it had ended already."""
        if not super().cancel():
            return False
        if self.withdraw():
            self.set_running_or_notify_cancel()  # who waits for several futures at once hears of it by this
        return True

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    def finish(self, result: Result, version: int | None) -> None:
        if not self.set_running_or_notify_cancel():
            return  # cancelled just now
        self.version, self.flagged, self.bytes_copied = version, result.flagged, result.bytes_copied
        if result.error is not None:
            self.set_exception(result.error)
        else:
            self.set_result(result.value)


class Waiter:
    """A thread that waits for its result: a future for one, at a tenth of the cost."""

    def __init__(self):
        self._lock = threading.Lock()
        self._lock.acquire()
        self._result = Result()

    def finish(self, result: Result, version: int | None) -> None:
        self._result = result
        self._lock.release()

    def wait(self) -> Any:
        self._lock.acquire()
        if self._result.error is not None:
            raise self._result.error
        return self._result.value


class Task:
    """A coroutine that waits for its result in an event loop, which is woken once for all results of a batch."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.future = self.loop.create_future()
        self._result = Result()

    def finish(self, result: Result, version: int | None) -> None:
        self._result = result

    def land(self) -> None:
        """In the event loop."""
        if self.future.done():
            return  # cancelled meanwhile
        if self._result.error is not None:
            self.future.set_exception(self._result.error)
        else:
            self.future.set_result(self._result.value)


def wake_loops(sinks: Iterable[Any]) -> None:
    """Tell the event loops that results have come."""
    loops: dict[asyncio.AbstractEventLoop, list[Task]] = {}
    for sink in sinks:
        if isinstance(sink, Task):
            loops.setdefault(sink.loop, []).append(sink)
    for loop, tasks in loops.items():
        try:
            loop.call_soon_threadsafe(_land, tasks)
        except RuntimeError:
            pass  # the loop was closed: nobody waits any more


def _land(tasks: list[Task]) -> None:
    for task in tasks:
        task.land()
