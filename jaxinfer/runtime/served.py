"""What all stateless models are to their callers: ask and wait, ask for a future, ask in asyncio; swap, look, close."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import events
from jaxinfer.compiler import Ledger
from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.programs import Programs
from jaxinfer.errors import Closed, InvalidRequest
from jaxinfer.request import check_options
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.gate import Gate
from jaxinfer.runtime.living import Living
from jaxinfer.runtime.memory import held
from jaxinfer.runtime.replies import Reply, Task, Waiter
from jaxinfer.runtime.runner import Flight, Runner, Work
from jaxinfer.runtime.versions import Version, fit, own
from jaxinfer.scheduler import AGEING
from jaxinfer.scheduler.batcher import Ask

SURE = 0.8  # of the average time of a batch: before, it is hardly ever done


@dataclass(frozen=True)
class Statistics:
    """`waiting` requests; `requests` that ended, and `batches` that ran; bytes that came in, and were copied on their
    way to the device; the `version` of the weights that new batches run on."""

    waiting: int
    requests: int
    batches: int
    bytes_in: int
    bytes_copied: int
    version: int


class VersionedWork(Work):
    """Work on weights that can be replaced: each batch reads `version` once. Counts bytes, and knows how long batches
    of each shape take, on average."""

    def __init__(self, version: Version, programs: Programs):
        self.version, self.programs = version, programs
        self.bytes_in = self.bytes_copied = 0

    def seconds(self, key: Hashable) -> float:
        """That a batch of this shape will take, as far as is known."""
        return self.programs.usual.get(key, 0.0)

    def usual(self, flight: Flight) -> float | None:
        return self.programs.usual.get(flight.work.key)

    @property
    def compiling(self) -> bool:
        return self.programs.awaited is not None

    def left(self, flight: Flight) -> float:
        sure = SURE * self.programs.usual.get(flight.work.key, inf) - (time.perf_counter() - flight.work.started)
        if sure <= 0:
            return 0.0
        return 0.0 if all(leaf.is_ready() for leaf in jax.tree.leaves(flight.work.outputs)) else sure

    def took(self, key: Hashable, started: float) -> None:
        """A batch of this shape, launched at `started`, has just come back."""
        self.programs.took(key, time.perf_counter() - started)


class Workshop:
    """Where a stateless model computes (`living.Room`)."""

    def __init__(self, runner: Runner, work: VersionedWork, programs: Programs):
        self._runner, self._work, self._programs = runner, work, programs
        self.gate: Gate = runner.gate

    @property
    def place(self) -> Placement:
        return self._programs.place

    @property
    def shapes(self) -> Any:
        return self._programs.params

    @property
    def weights(self) -> Any:
        return self._work.version.params

    @property
    def busy(self) -> bool:
        return self._runner.works

    def lie_down(self) -> bool:
        return self._runner.if_idle(lambda: self.rise(None))

    def rise(self, params: Any) -> None:
        self._work.version = self._work.version._replace(params=params)


class Served(Living):
    """A stateless model behind a queue and a dynamic batcher. Safe to use from any number of threads and event loops
    at once. `priority`, `queue_timeout` and `timeout` of each request are as in `jaxinfer.Request`.

    Raises InvalidRequest (before anything is queued), Rejected (the queue is full), Expired, StepFailed or Closed.
    """

    def __init__(self, runner: Runner, work: VersionedWork, programs: Programs, name: str):
        self.name, self._runner, self._work, self._programs = name, runner, work, programs
        self._ids, self._numbers, self._swapping = itertools.count(1), itertools.count(2), threading.Lock()
        self._rooms, self._weights = [Workshop(runner, work, programs)], held(programs.params)  # bytes
        self._shut = weakref.finalize(self, _shut, runner, work, programs)

    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, int, Any]:
        """What a request is to the batcher: its shape, its size and its payload. Raises InvalidRequest."""
        raise NotImplementedError

    # Asking.

    def __call__(self, *args: Any, priority: int = 0, queue_timeout: float | None = None,
                 timeout: float | None = None, **kwargs: Any) -> Any:
        """The result of one request."""
        self._runner.check_outside()
        waiter = Waiter()
        ask = self._submit(waiter, args, kwargs, priority, queue_timeout, timeout)
        try:
            return waiter.wait()
        except KeyboardInterrupt:
            self._runner.withdraw(ask.order[1])
            raise

    def submit(self, *args: Any, priority: int = 0, queue_timeout: float | None = None,
               timeout: float | None = None, **kwargs: Any) -> Reply:
        """Queue a request and return at once: the `Reply` is a future, and an awaitable."""
        reply = Reply()
        ask = self._submit(reply, args, kwargs, priority, queue_timeout, timeout)
        reply.withdraw = partial(self._withdraw, ask.order[1])
        return reply

    async def asubmit(self, *args: Any, priority: int = 0, queue_timeout: float | None = None,
                      timeout: float | None = None, **kwargs: Any) -> Any:
        """`__call__` for asyncio; cancelling the task cancels the request."""
        task = Task()
        ask = self._submit(task, args, kwargs, priority, queue_timeout, timeout)
        try:
            return await task.future
        finally:
            if not task.future.done() or task.future.cancelled():
                self._runner.withdraw(ask.order[1])

    def submit_all(self, requests: Iterable[tuple[tuple, dict[str, Any]]], *, priority: int = 0,
                   queue_timeout: float | None = None, timeout: float | None = None) -> list[Reply]:
        """`submit` for several requests, each a pair of positional and named arguments: all are queued, or none."""
        check_options(priority=priority, queue_timeout=queue_timeout, timeout=timeout)
        replies, asks = [], []
        for args, kwargs in requests:
            replies.append(Reply())
            asks.append(self._ask(replies[-1], args, kwargs, priority, timeout))
            replies[-1].withdraw = partial(self._withdraw, asks[-1].order[1])
        self._runner.submit(asks, queue_timeout, timeout)
        return replies

    def _submit(self, sink: Any, args: tuple, kwargs: dict[str, Any], priority: int, queue_timeout: float | None,
                timeout: float | None, wait: bool = False) -> Ask:
        if priority or queue_timeout is not None or timeout is not None:
            check_options(priority=priority, queue_timeout=queue_timeout, timeout=timeout)
        ask = self._ask(sink, args, kwargs, priority, timeout)
        self._runner.submit((ask,), queue_timeout, timeout, wait)
        return ask

    def _ask(self, sink: Any, args: tuple, kwargs: dict[str, Any], priority: int, timeout: float | None) -> Ask:
        shape, size, payload = self._enter(args, kwargs)
        now = time.perf_counter()
        return Ask(shape, (priority * AGEING + now, next(self._ids)), now, inf if timeout is None else now + timeout,
                   size, payload, sink, events.tag())

    def _many(self, requests: list[tuple[tuple, dict[str, Any]]], options: dict[str, Any]) -> list[Any]:
        """The results of many requests, in their order; waits for room in the queue where it is full."""
        self._runner.check_outside()
        replies: list[Reply] = []
        how = {"priority": 0, "queue_timeout": None, "timeout": None}
        if unknown := sorted(set(options) - set(how)):
            raise InvalidRequest(f"unknown options {unknown}; known are {list(how)}")
        how |= options
        try:
            for args, kwargs in requests:
                replies.append(Reply())
                ask = self._submit(replies[-1], args, kwargs, **how, wait=True)
                replies[-1].withdraw = partial(self._withdraw, ask.order[1])
            return [reply.result() for reply in replies]
        finally:
            for reply in replies:
                reply.cancel()

    def _withdraw(self, id: int) -> bool:
        """A method of ours, not the runner's: a model that is dropped is closed, but not while a reply is awaited."""
        return self._runner.withdraw(id)

    # Weights.

    @property
    def params(self) -> Any:
        """The weights that new batches run on; None once it is closed."""
        with self.awake():
            return self._work.version.params

    @property
    def version(self) -> int:
        """The number of these weights: 1, and more with every swap."""
        return self._work.version.number

    def swap(self, params: Any) -> int:
        """Run new batches on other weights of the same structure, shapes and dtypes, with no compile; batches that run
        now end on the old ones. Where a weight is quantised, floats in its place are quantised as it was. Returns the
        new version's number. Raises InvalidOption if they do not match."""
        params = fit(params, self._programs.params)
        with self.awake(beside=self._weights):
            params = own(params, self.device)
            with self._swapping:
                if self._runner.closed:
                    raise Closed()
                number = next(self._numbers)
                self._work.version = Version(number, params)
        events.emit(events.Swapped(self._runner.name, number))
        return number

    def renumber(self, version: int, numbers: Iterator[int]) -> None:
        """Be this version, and take the next `numbers` for those to come: a registry counts all of a name."""
        with self._swapping:
            self._numbers, self._work.version = numbers, self._work.version._replace(number=version)

    # Looking.

    @property
    def device(self) -> jax.Device:
        return self._programs.place.device

    @property
    def max_waiting(self) -> int:
        """The requests that may wait; more are Rejected."""
        return self._runner.queue.max_waiting

    @property
    def nbytes(self) -> int:
        """Bytes of the weights, and of what the largest Executable needs beside them."""
        return self._weights + max((entry.bytes for entry in self.ledger), default=0)

    @property
    def ledger(self) -> Ledger:
        """Every Executable: where it came from, what it cost, how it was used."""
        return self._programs.ledger

    @property
    def stats(self) -> Statistics:
        """What the model is doing, and has done so far."""
        runner, work = self._runner, self._work
        return Statistics(runner.queue.waiting, runner.requests, runner.batches, work.bytes_in, work.bytes_copied,
                          self.version)

    # Living.

    @property
    def rooms(self) -> list[Workshop]:
        """Where requests are computed."""
        return self._rooms

    @property
    def restless(self) -> str:
        """Why it cannot sleep, if it cannot."""
        odd = [x for x in jax.tree.leaves(self._programs.params) if jnp.issubdtype(x.dtype, jax.dtypes.extended)]
        return f"{odd[0].dtype} among its weights cannot be written down" if odd else ""

    @property
    def _admissions(self) -> list[Admission]:
        return [self._runner.queue]

    @property
    def _busy(self) -> bool:
        return self._runner.busy

    @property
    def hearts(self) -> tuple[Runner]:
        return (self._runner,)

    def rename(self, name: str) -> None:
        """Be called this in events."""
        self._runner.name = name


def _shut(runner: Runner, work: VersionedWork, programs: Programs) -> None:
    runner.close()
    programs.close()
    work.version = Version(work.version.number, None)  # whoever still holds the model does not hold its weights
