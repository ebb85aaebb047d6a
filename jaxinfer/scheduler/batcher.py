"""The dynamic batcher: which of the waiting requests go together, and when. Decisions only."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import inf
from operator import attrgetter
from typing import Any

BY_ORDER = attrgetter("order")


@dataclass(eq=False, slots=True)
class Ask:
    """One request that waits to be batched. Requests of one `shape` may share a batch. `order` is its place in the
    queue, `at` when it came and `deadline` when it must be done, in seconds; `size` is what it takes of a batch's
    room; it was `taken` to be computed. `payload`, `sink` and `tag` are the caller's business."""

    shape: Any  # hashable
    order: tuple[float, int]
    at: float
    deadline: float = inf
    size: int = 1
    payload: Any = None
    sink: Any = None
    tag: Any = None
    taken: float | None = None


class Batcher:
    """Closes a batch when `max_batch` requests of one shape wait (or fill `room(shape)`), when the oldest has waited
    `max_delay` seconds, when waiting on would break a deadline, or at once when the device is idle. First in, first
    out within a priority (the asks' `order`); of several batches that are due, that of the first in line goes first.

    `cost(shape, n)` says how many seconds a batch of `n` will take.

    >>> batcher = Batcher(2, 0.010, lambda shape, n: 0.0)
    >>> for i in range(3): batcher.submit(Ask("any", (0.0, i), at=0.0))
    >>> [ask.order[1] for ask in batcher.take(0.0)], batcher.take(0.0), batcher.due()
    ([0, 1], [], 0.01)
    >>> [ask.order[1] for ask in batcher.take(0.0, idle=True)]
    [2]
    """

    def __init__(self, max_batch: int, max_delay: float, cost: Callable[[Any, int], float],
                 room: Callable[[Any], float] = lambda shape: inf):
        self.max_batch, self.max_delay, self.cost, self.room = max_batch, max_delay, cost, room
        self.queues: dict[Hashable, list[Ask]] = {}
        self._oldest: dict[Hashable, float] = {}  # when the oldest of a queue came,
        self._urgent: dict[Hashable, float] = {}  # the first deadline in it,
        self._size: dict[Hashable, int] = {}  # and what it takes in all

    def submit(self, ask: Ask) -> None:
        queue = self.queues.setdefault(ask.shape, [])
        if not queue or queue[-1].order < ask.order:
            queue.append(ask)
        else:
            insort(queue, ask, key=BY_ORDER)
        self._oldest[ask.shape] = min(self._oldest.get(ask.shape, inf), ask.at)
        self._urgent[ask.shape] = min(self._urgent.get(ask.shape, inf), ask.deadline)
        self._size[ask.shape] = self._size.get(ask.shape, 0) + ask.size

    def cancel(self, ask: Ask) -> bool:
        """Take back a request; False if it has been taken."""
        queue = self.queues.get(ask.shape, [])
        if ask not in queue:
            return False
        queue.remove(ask)
        self._look_again(ask.shape)
        return True

    def take(self, now: float, idle: bool = False) -> list[Ask]:
        """The batch that is due, in order, or none."""
        due = [shape for shape in self.queues if idle or self._full(shape) or self._due(shape) <= now]
        if not due:
            return []
        shape = min(due, key=lambda shape: self.queues[shape][0].order)
        queue, count, size = self.queues[shape], 0, 0
        for ask in queue[: self.max_batch]:
            if count and size + ask.size > self.room(shape):
                break
            count, size = count + 1, size + ask.size
        batch = queue[:count]
        del queue[:count]
        self._look_again(shape)
        return batch

    def take_all(self) -> list[Ask]:
        """Everything that waits, in order."""
        asks = sorted((ask for queue in self.queues.values() for ask in queue), key=BY_ORDER)
        for books in (self.queues, self._oldest, self._urgent, self._size):
            books.clear()
        return asks

    def due(self) -> float:
        """When the next batch will be due, if nothing comes in between; infinity if nobody waits."""
        return min(map(self._due, self.queues), default=inf)

    def _full(self, shape: Hashable) -> bool:
        return len(self.queues[shape]) >= self.max_batch or self._size[shape] >= self.room(shape)

    def _due(self, shape: Hashable) -> float:
        timer, deadline = self._oldest[shape] + self.max_delay, self._urgent[shape]
        if deadline == inf:
            return timer
        return min(timer, deadline - self.cost(shape, min(len(self.queues[shape]), self.max_batch)))

    def _look_again(self, shape: Hashable) -> None:
        queue = self.queues[shape]
        if not queue:
            del self.queues[shape], self._oldest[shape], self._urgent[shape], self._size[shape]
            return
        self._oldest[shape] = min(ask.at for ask in queue)
        self._size[shape] = sum(ask.size for ask in queue)
        if self._urgent[shape] < inf:
            self._urgent[shape] = min(ask.deadline for ask in queue)
