"""A bounded queue's door: who may wait, and when to come again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping

from jaxinfer.errors import Closed, Expired, Rejected


class Admission:
    """At most `max_waiting` requests wait, and `max_waiting_tokens` tokens of theirs (None: nothing is said of that).
    What comes on top is `Rejected`. Safe to use from any thread."""

    def __init__(self, max_waiting: int, max_waiting_tokens: int | None = None):
        self.max_waiting, self.max_waiting_tokens = max_waiting, max_waiting_tokens
        self.waiting = self.waiting_tokens = 0
        self.closed = False
        self._queued: dict[int, int] = {}  # the tokens of each that waits
        self._line: deque[object] = deque()  # who waits for room to wait
        self._pace = 0.0  # seconds between two that leave the queue, on average
        self._left = 0.0  # when the last one left it, or the first one came
        self._room = threading.Condition()

    def enter(self, tokens: Mapping[int, int], wait: bool = False, patience: float | None = None) -> None:
        """Make room for all requests of `tokens` (by id), or raise Rejected; with `wait`, block until there is room,
        for `patience` seconds at most (then it is Expired). Who came first gets the first room; an empty queue takes
        anything."""
        count, total = len(tokens), sum(tokens.values())
        with self._room:
            self.check_open()
            if not wait and (self._line or not self._has_room(count, total)):
                raise self._rejected(count, total)
            if self._line or not self._has_room(count, total):
                self._wait(count, total, patience)
            if not self.waiting:
                self._left = time.perf_counter()  # nobody waited before: only from now on does time tell of the pace
            self._queued.update(tokens)
            self.waiting, self.waiting_tokens = self.waiting + count, self.waiting_tokens + total

    def check_room(self) -> None:
        """Raises Rejected if a request would be, however small."""
        with self._room:
            if self._line or not self._has_room(1, 1):
                raise self._rejected(1, 1)

    def leave(self, ids: Iterable[int]) -> None:
        """These wait no longer; who left before is no matter."""
        now = time.perf_counter()
        with self._room:
            for id in ids:
                tokens = self._queued.pop(id, None)
                if tokens is not None:
                    self.waiting, self.waiting_tokens = self.waiting - 1, self.waiting_tokens - tokens
                    self._pace += (0.1 if self._pace else 1.0) * (now - self._left - self._pace)
                    self._left = now
            if self._line:
                self._room.notify_all()

    def holds(self, id: int) -> bool:
        """Whether a request still waits."""
        return id in self._queued

    def close(self) -> None:
        """Whoever waits for room, or comes from now on, is told that the model is closed."""
        with self._room:
            self.closed = True
            self._room.notify_all()

    def check_open(self) -> None:
        if self.closed:
            raise Closed()

    def _wait(self, count: int, tokens: int, patience: float | None) -> None:
        me, end = object(), None if patience is None else time.perf_counter() + patience
        self._line.append(me)
        try:
            while self._line[0] is not me or not self._has_room(count, tokens):
                left = None if end is None else end - time.perf_counter()
                if left is not None and left <= 0:
                    raise Expired(f"the timeout of {patience:g} s is over: there was no room in the queue yet")
                self._room.wait(left)
                self.check_open()
        finally:
            self._line.remove(me)
            self._room.notify_all()

    def _has_room(self, count: int, tokens: int) -> bool:
        return not self.waiting or (self.waiting + count <= self.max_waiting and (
            self.max_waiting_tokens is None or self.waiting_tokens + tokens <= self.max_waiting_tokens))

    def _rejected(self, count: int, tokens: int) -> Rejected:
        excess, of, limits = max(1.0, self.waiting + count - self.max_waiting), "", f"max_waiting={self.max_waiting}"
        if self.max_waiting_tokens is not None:
            of, limits = f" of {self.waiting_tokens} tokens", f"{limits}, max_waiting_tokens={self.max_waiting_tokens}"
            share = (self.waiting_tokens + tokens - self.max_waiting_tokens) / max(self.waiting_tokens, 1)
            excess = max(excess, share * self.waiting)
        seconds = max(self._pace, time.perf_counter() - self._left, 0.01) * excess
        return Rejected(f"the queue is full: {self.waiting} requests{of} wait, and {limits}; try again in "
                        f"{seconds:.1f} s", self.waiting, seconds)
