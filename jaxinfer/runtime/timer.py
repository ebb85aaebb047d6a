"""One thread for all deadlines: they pass when they pass, not when a batch happens to end."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable

from jaxinfer import events

MOST = 1024  # calls that may wait until those that nobody needs are looked for


class Timer:
    """Calls back at given times (of `time.perf_counter`), from a thread that starts with the first of them."""

    def __init__(self):
        self._calls: list[tuple[float, int, Callable[[], object], Callable[[], bool]]] = []
        self._most = MOST
        self._numbers, self._wake = itertools.count(), threading.Condition()
        self._thread: threading.Thread | None = None

    def call_at(self, when: float, act: Callable[[], object], needed: Callable[[], bool]) -> None:
        """Call `act` then. A call that is not `needed` any more may be forgotten before."""
        with self._wake:
            heapq.heappush(self._calls, (when, next(self._numbers), act, needed))
            if len(self._calls) > self._most:
                self._calls = [call for call in self._calls if call[3]()]
                heapq.heapify(self._calls)
                self._most = max(MOST, 2 * len(self._calls))
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="jaxinfer-timer", daemon=True)
                self._thread.start()
            elif self._calls and self._calls[0][2] is act:
                self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._calls or self._calls[0][0] > time.perf_counter():
                    self._wake.wait(self._calls[0][0] - time.perf_counter() if self._calls else None)
                act = heapq.heappop(self._calls)[2]
            try:
                act()
            except BaseException:
                events.report()
            del act  # who is called back may be kept alive by nobody else


TIMER = Timer()
