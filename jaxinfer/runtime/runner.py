"""The thread of everything that is stateless: it batches requests, keeps the device busy, and hands results back."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

from jaxinfer import events
from jaxinfer.errors import Closed, Expired, InvalidRequest, StepFailed
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.gate import Gate
from jaxinfer.runtime.living import call_on
from jaxinfer.runtime.replies import Result, wake_loops
from jaxinfer.runtime.timer import TIMER
from jaxinfer.scheduler.batcher import Ask, Batcher

AHEAD = 2  # batches that the device has at once: one that it computes, and one to follow
LONG, PAUSE = 0.005, 0.001  # seconds that a batch must run on to look out for others, and between two looks


@dataclass
class Flight:
    """A batch that the device computes. `work` is what its maker needs to collect it."""

    asks: list[Ask]
    version: int
    work: Any


class Pulse(NamedTuple):
    """What a runner's thread has been doing since when: it waits for `flight`, or (None) launches one."""

    since: float
    flight: Flight | None


class Abandoned(BaseException):
    """Another thread has taken over: this one must touch nothing any more."""


class Work(Protocol):
    """What a runner runs."""

    @property
    def compiling(self) -> bool:
        """Whether `dispatch` waits for a compile."""
        ...

    def usual(self, flight: Flight) -> float | None:
        """Seconds that a batch like this takes, if that is known."""
        ...

    def dispatch(self, asks: list[Ask]) -> Flight:
        """Pack the requests and launch them; waits for nothing but compiles."""
        ...

    def left(self, flight: Flight) -> float:
        """Seconds for which a batch is sure to run on, as far as is known; 0 if it is done, or may be any moment."""
        ...

    def collect(self, flight: Flight) -> list[Result]:
        """Wait for a batch, and take it apart."""
        ...


class Runner:
    """Owns a queue, a batcher and a thread. Each request ends once: whoever takes it out of `_open` tells its
    caller. If it is `supervised`, a thread that dies or stands still is replaced (`living.Heart`)."""

    def __init__(self, work: Work, batcher: Batcher, queue: Admission, name: str):
        self.work, self.batcher, self.queue, self.name = work, batcher, queue, name
        self.requests = self.batches = 0
        self.supervised, self.pulse, self._given_up = False, None, False
        self._open: dict[int, Ask] = {}
        self.gate = Gate(lambda asks: self._post(lambda: [self.batcher.submit(ask) for ask in asks]),
                         lambda asks: any(ask.order[1] in self._open for ask in asks),
                         lambda asks, error: [self._finish(ask.order[1], Result(error=error)) for ask in asks])
        self._inbox: deque[Callable[[], object]] = deque()
        self._wake, self._sleeping, self._closing = threading.Condition(), False, False
        self._flying: deque[Flight] = deque()
        self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._loop, name=f"jaxinfer-{self.name}", daemon=True)
        self._thread.start()

    # From any thread.

    def submit(self, asks: Sequence[Ask], queue_timeout: float | None = None, timeout: float | None = None,
               wait: bool = False) -> None:
        """Queue requests, all or none of them, or raise Rejected or Closed; with `wait`, block until there is room."""
        patience = min((s for s in (queue_timeout, timeout) if s is not None), default=None)
        self.queue.enter({ask.order[1]: ask.size for ask in asks}, wait, patience)
        for ask in asks:
            id = ask.order[1]
            self._open[id] = ask
            for name, seconds in (("queue_timeout", queue_timeout), ("timeout", timeout)):
                if seconds is not None:
                    me = weakref.ref(self)
                    TIMER.call_at(ask.at + seconds, partial(_expire, me, id, name, seconds), partial(_is_open, me, id))
        self.gate.come(asks)
        if self._closing:  # they may have slipped in behind the end
            for ask in asks:
                self._finish(ask.order[1], Result(error=Closed()))

    def withdraw(self, id: int) -> bool:
        """Take a request back; False if its caller has been told, or will be."""
        ask = self._open.pop(id, None)
        if ask is not None:
            self._leave(ask, "cancelled")
        return ask is not None

    def expire(self, id: int, name: str, seconds: float) -> None:
        """A request's time is up."""
        ask = self._open.get(id)
        if ask is None or (name == "queue_timeout" and not self.queue.holds(id)) or not self._open.pop(id, None):
            return
        self._leave(ask, "expired")
        ask.sink.finish(Result(error=Expired(f"{name} of {seconds:g} s is over")), None)
        wake_loops([ask.sink])

    def _leave(self, ask: Ask, reason: str) -> None:
        self.queue.leave([ask.order[1]])
        self._post(lambda: self.batcher.cancel(ask))
        self._tell_ended(ask, reason)

    def _tell_ended(self, ask: Ask, reason: str, copied: int = 0) -> None:
        if events.observed():
            marks = events.Marks(ask.at, time.perf_counter(), ask.taken)
            events.emit(events.RequestEnded(ask.order[1], reason, 0, 0, self.name, copied=copied, tag=ask.tag,
                                            marks=marks))

    def _post(self, action: Callable[[], object]) -> None:
        self._inbox.append(action)
        if self._sleeping:
            with self._wake:
                self._wake.notify()

    def call(self, action: Callable[[], Any]) -> None:
        """Run `action` on the runner's thread, between two batches, and wait for it."""
        call_on(self._thread, self._post, action)

    def check_outside(self) -> None:
        """Raises InvalidRequest in the runner's own thread, which would wait for itself for ever."""
        if threading.current_thread() is self._thread:
            raise InvalidRequest("a done callback runs in the thread that would compute this: ask with submit there, "
                                 "and do not wait for the reply")

    def if_idle(self, action: Callable[[], Any]) -> bool:
        """Run `action` on the runner's thread if no request is there; False if one is."""
        done: list[bool] = []

        def act() -> None:
            if not (self._flying or self.batcher.queues):
                action()
                done.append(True)

        self.call(act)
        return bool(done)

    @property
    def works(self) -> bool:
        """Whether a request has passed the gate and not ended."""
        return bool(self._inbox or self._flying or self.batcher.queues)

    @property
    def closed(self) -> bool:
        return self._closing

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._open)

    def close(self) -> None:
        """Stop after the batches that run now; what waits fails with Closed."""
        self.queue.close()
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread and not self._given_up:
            self._thread.join()
            self._end_all()  # nobody, unless the thread had died

    # What supervision asks for.

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def compiling(self) -> bool:
        return self.work.compiling

    def supervise(self, on: bool) -> None:
        self.supervised = on

    def usual(self, pulse: Pulse) -> float | None:
        return None if pulse.flight is None else self.work.usual(pulse.flight)

    def revive(self, pulse: Pulse | None, why: str) -> bool:
        """Who was in a batch fails; who waits is served by another thread."""
        with self._wake:
            if self._closing or (self.alive and self.pulse is not pulse):
                return False
            self._flying, self.pulse = deque(), None
            failing = [id for id in tuple(self._open) if not self.queue.holds(id)]
            self._start()
        self._fail(failing, why)
        return True

    def give_up(self, why: str) -> None:
        with self._wake:
            self._closing = self._given_up = True
        self.queue.close()
        self._fail(tuple(self._open), why)

    def _fail(self, ids: Iterable[int], why: str) -> None:
        for id in ids:
            self._finish(id, Result(error=StepFailed(f"{self.name} stopped while this request was in it: {why}")))

    # In the runner's thread.

    def _beat(self, pulse: Pulse | None = None) -> None:
        """Say what comes next, if it could stand still."""
        with self._wake:
            if threading.current_thread() is not self._thread or self._given_up:
                raise Abandoned()
            self.pulse = pulse

    def _dispatch(self, asks: list[Ask]) -> Flight:
        self._beat(Pulse(time.perf_counter(), None))
        try:
            return self.work.dispatch(asks)
        finally:
            self._beat()

    def _results(self, flight: Flight) -> list[Result]:
        self._beat(Pulse(time.perf_counter(), flight))
        try:
            return self.work.collect(flight)
        finally:
            self._beat()

    def _loop(self) -> None:
        try:
            while not self._closing:
                self._sleep()
                while self._inbox:
                    self._inbox.popleft()()
                self._turn()
            while self._flying:
                self._collect(self._flying.popleft())
        except Abandoned:
            return
        except BaseException:
            events.report()
            if self.supervised and not self._closing:
                return  # whoever supervises it sees to the rest
        self._closing = True
        self.queue.close()
        self._end_all()

    def _end_all(self) -> None:
        for id in tuple(self._open):
            self._finish(id, Result(error=Closed("the model was closed while this request was waiting")))

    def _sleep(self) -> None:
        """Until there is something to do."""
        with self._wake:
            self._sleeping = True
            while not (self._inbox or self._closing or self._flying or self.batcher.queues):
                self._wake.wait()
            self._sleeping = False

    def _turn(self) -> None:
        """Launch a batch that is due, behind the one that the device computes if need be; else read one back."""
        asks = []
        if len(self._flying) < AHEAD:
            asks = self.batcher.take(time.perf_counter(), idle=not self._flying)
        if asks:
            if events.observed():
                now = time.perf_counter()
                for ask in asks:
                    ask.taken = now
            self.queue.leave([ask.order[1] for ask in asks])
            self._launch([ask for ask in asks if ask.order[1] in self._open])
        elif self._flying and not self._look_out(self._flying[0]):
            self._collect(self._flying.popleft())

    def _look_out(self, flight: Flight) -> bool:
        """Whether it is too early to wait for nothing but a batch that the device computes: another could follow it
        before it is done. Then pause for as long as nothing can have happened that matters."""
        if len(self._flying) >= AHEAD or self.work.left(flight) < LONG:
            return False
        with self._wake:
            if not self._closing:
                self._wake.wait(max(0.0, min(PAUSE, self.batcher.due() - time.perf_counter())))
        return True

    def _launch(self, asks: list[Ask]) -> None:
        if not asks:
            return
        try:
            self._flying.append(self._dispatch(asks))
        except Exception as error:
            self._retry(asks, error)

    def _collect(self, flight: Flight) -> None:
        try:
            results = self._results(flight)
        except Exception as error:
            self._retry(flight.asks, error)
            return
        self._tell(flight, results)

    def _retry(self, asks: list[Ask], error: Exception) -> None:
        """A batch failed: each of its requests is tried once more, alone, so that one cannot harm the others."""
        if len(asks) > 1:
            events.emit(events.Retried(len(asks), error))
        for ask in asks:
            if len(asks) > 1:
                try:
                    flight = self._dispatch([ask])
                    self._tell(flight, self._results(flight))
                    continue
                except Exception as again:
                    error = again
            failure = StepFailed(f"the function failed{' twice' if len(asks) > 1 else ''}: {error}")
            failure.__cause__ = error
            self._finish(ask.order[1], Result(error=failure))

    def _tell(self, flight: Flight, results: Iterable[Result]) -> None:
        self.batches += 1
        told = [ask.sink for ask, result in zip(flight.asks, results, strict=True)
                if self._finish(ask.order[1], result, flight.version, wake=False)]
        wake_loops(told)

    def _finish(self, id: int, result: Result, version: int | None = None, wake: bool = True) -> bool:
        ask = self._open.pop(id, None)
        if ask is None:
            return False
        self.requests += 1
        if wake:
            self.queue.leave([id])
        self._tell_ended(ask, "failed" if result.error else "stop", result.bytes_copied)
        try:
            ask.sink.finish(result, version)
        except BaseException:  # a done callback's: sys.exit() as well
            events.report()
        if wake:
            wake_loops([ask.sink])
        return True


def _expire(runner: Callable[[], Runner | None], id: int, name: str, seconds: float) -> None:
    if found := runner():
        found.expire(id, name, seconds)


def _is_open(runner: Callable[[], Runner | None], id: int) -> bool:
    found = runner()
    return found is not None and id in found._open
