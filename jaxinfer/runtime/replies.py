"""How an endpoint's results come back: to a thread that waits, as a future, or to an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from typing import Any


class Reply(Future):
    """What becomes of a request: a future of the function's result, which can also be awaited. `version` is that of
    the weights that made it, `flagged` names the arrays with NaN in them where the endpoint looks for that."""

    version: int | None = None
    flagged: tuple[str, ...] = ()
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

    def finish(self, value: Any, error: BaseException | None, version: int | None, flagged: tuple[str, ...]) -> None:
        if not self.set_running_or_notify_cancel():
            return  # cancelled just now
        self.version, self.flagged = version, flagged
        if error is not None:
            self.set_exception(error)
        else:
            self.set_result(value)


class Waiter:
    """A thread that waits for its result: a future for one, at a tenth of the cost."""

    def __init__(self):
        self._lock = threading.Lock()
        self._lock.acquire()
        self.value: Any = None
        self.error: BaseException | None = None

    def finish(self, value: Any, error: BaseException | None, version: int | None, flagged: tuple[str, ...]) -> None:
        self.value, self.error = value, error
        self._lock.release()

    def wait(self) -> Any:
        self._lock.acquire()
        if self.error is not None:
            raise self.error
        return self.value


class Task:
    """A coroutine that waits for its result in an event loop, which is woken once for all results of a batch."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.future = self.loop.create_future()
        self._outcome: tuple[Any, BaseException | None] = (None, None)

    def finish(self, value: Any, error: BaseException | None, version: int | None, flagged: tuple[str, ...]) -> None:
        self._outcome = value, error

    def land(self) -> None:
        """In the event loop."""
        value, error = self._outcome
        if self.future.done():
            return  # cancelled meanwhile
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(value)


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
