"""Watches the threads that serve: one that has died or stands still is told of, and another goes on in its place."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from jaxinfer import events
from jaxinfer.errors import JaxinferError
from jaxinfer.runtime.living import Heart, Living

PERIOD = 0.2  # seconds between two looks
TIMES, LEAST = 10, 5.0  # a thread stands still after so many times what is usual, and so many seconds at least;
UNKNOWN = 60.0  # or after so many seconds, where nothing is known of what it does
MOST, WINDOW = 3, 600.0  # so many times in so many seconds another goes on


@dataclass
class Watch:
    """What is known of one thread: the `pulse` that was seen last, for how many seconds it has been the same, and
    when another thread has gone on; `hopeless` says why none will any more."""

    pulse: Any = None
    still: float = 0.0
    revived: deque[float] = field(default_factory=deque)
    hopeless: str | None = None


class Supervisor:
    """Looks at `models()`, pairs of a name and what serves it, from a thread of its own between `start` and `close`.

    A thread stands still if for ten times the seconds that its step usually takes (the ledger's `usual`), and at least
    five, it has not got on; time spent on compiles does not count, nor time in which this process did not run. Another
    goes on in its place (`Heart.revive`), three times in ten minutes at most.
    """

    def __init__(self, models: Callable[[], Iterable[tuple[str, Living]]]):
        self._models = models
        self._watches: weakref.WeakKeyDictionary[Heart, Watch] = weakref.WeakKeyDictionary()
        self._last = time.monotonic()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name="jaxinfer-supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for heart in self._watches:
            _supervise(heart, -1)

    def trouble(self, model: Living) -> str | None:
        """Why a model cannot serve now; None if it can."""
        for heart in model.hearts:
            watch = self._watches.get(heart)
            if watch is not None and watch.hopeless:
                return watch.hopeless
            if not heart.alive:
                return DEAD
        return None

    def hopeless(self, model: Living) -> bool:
        """Whether a model will not serve again: nothing could go on in the place of a thread of its."""
        return any(watch.hopeless is not None for heart in model.hearts if (watch := self._watches.get(heart)))

    def _loop(self) -> None:
        while not self._stop.wait(PERIOD):
            try:
                self.look()
            except Exception:
                events.report()

    def look(self) -> None:
        """Look at every thread once."""
        now = time.monotonic()
        passed, self._last = min(now - self._last, 2 * PERIOD), now  # more: this process did not run itself
        for name, model in self._models():
            if not model.closed:
                for heart in model.hearts:
                    self._look_at(name, heart, now, passed)

    def _look_at(self, name: str, heart: Heart, now: float, passed: float) -> None:
        watch = self._watches.get(heart)
        if watch is None:
            watch = self._watches[heart] = Watch()
            _supervise(heart, 1)
        if watch.hopeless:
            return
        pulse, alive = heart.pulse, heart.alive
        if pulse is not watch.pulse or heart.compiling:
            watch.pulse, watch.still = pulse, 0.0
        elif pulse is not None:
            watch.still += passed
        if not alive:
            self._revive(name, heart, watch, now, DEAD)
        elif pulse is not None and watch.still >= (most := patience(heart.usual(pulse))):
            why = f"a thread that serves it has not got on for {most:.1f} s"
            self._revive(name, heart, watch, now, why)

    def _revive(self, name: str, heart: Heart, watch: Watch, now: float, why: str) -> None:
        while watch.revived and watch.revived[0] < now - WINDOW:
            watch.revived.popleft()
        try:
            if len(watch.revived) >= MOST:
                raise JaxinferError(f"it has been started again {MOST} times in {WINDOW / 60:.0f} minutes")
            if not heart.revive(watch.pulse, why):
                return
            watch.revived.append(now)
            watch.pulse, watch.still = None, 0.0
        except Exception as error:
            watch.hopeless = f"{why}, and it was not started again: {error}"
            heart.give_up(watch.hopeless)
        events.emit(events.Stopped(name, watch.hopeless or why, revived=watch.hopeless is None))


DEAD = "a thread that serves it has ended"
_supervisors: weakref.WeakKeyDictionary[Heart, int] = weakref.WeakKeyDictionary()  # of servers on one registry, say
_lock = threading.Lock()


def _supervise(heart: Heart, more: int) -> None:
    with _lock:
        _supervisors[heart] = _supervisors.get(heart, 0) + more
        heart.supervise(_supervisors[heart] > 0)


def patience(usual: float | None) -> float:
    """For how many seconds a thread may do something that usually takes so many.

    >>> patience(2.0), patience(0.01), patience(None)
    (20.0, 5.0, 60.0)
    """
    return UNKNOWN if usual is None else max(LEAST, TIMES * usual)
