"""The gate between a model's queue and its thread: shut while the model sleeps, and while it is about to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from jaxinfer.errors import Closed

MANY = 64  # requests that wait before a gate until those that have ended are looked for


class Gate:
    """Whoever has a place in the queue comes to it, and is let in by `enter`, or waits before it while it is shut, and
    calls `wanted`. Those of whom `alive` is not true any more are forgotten; who comes too late is told by `fail`.
    What came before it was shut is in; what waits goes in in its order. Safe to use from any thread.

    `hits` and `misses` count who found it open, and shut; `used` is when somebody last came (`time.monotonic`).
    """

    def __init__(self, enter: Callable[[Any], object], alive: Callable[[Any], bool],
                 fail: Callable[[Any, BaseException], object]):
        self._enter, self._alive, self._fail = enter, alive, fail
        self.wanted: Callable[[], object] = lambda: None
        self.hits = self.misses = 0
        self.used = time.monotonic()
        self._is_shut, self._many = False, MANY
        self._before: list[Any] = []
        self._lock = threading.RLock()  # whoever enters may close the model

    def come(self, request: Any) -> None:
        closed = None
        with self._lock:
            self.used = time.monotonic()
            is_shut = self._is_shut
            if is_shut:
                self.misses += 1
                self._before.append(request)
                if len(self._before) > self._many:
                    self._forget()
            else:
                self.hits += 1
                closed = self._let_in(request)
        if is_shut:
            self.wanted()
        elif closed:
            self._fail(request, closed)

    def _let_in(self, request: Any) -> Closed | None:
        try:
            self._enter(request)
        except Closed as closed:
            return closed

    def _forget(self) -> None:
        self._before = [request for request in self._before if self._alive(request)]
        self._many = max(MANY, 2 * len(self._before))

    @property
    def awaited(self) -> bool:
        """Whether somebody waits before it."""
        with self._lock:
            self._forget()
            return bool(self._before)

    def shut(self) -> None:
        with self._lock:
            self._is_shut = True

    def open(self) -> None:
        """Let those in who wait, and who come from now on."""
        with self._lock:
            self._is_shut, before, self._before = False, self._before, []
            late = [(request, closed) for request in before if (closed := self._let_in(request))]
        for request, closed in late:
            self._fail(request, closed)

    def refuse(self, error: BaseException) -> None:
        """Those who wait fail; it stays as it is."""
        with self._lock:
            before, self._before = self._before, []
        for request in before:
            self._fail(request, error)
