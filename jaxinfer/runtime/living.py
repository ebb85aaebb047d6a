"""What all that serve from a thread of their own share: how they are told something, sleep, and end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self

from jaxinfer.compiler.placement import Placement
from jaxinfer.compiler.programs import Programs
from jaxinfer.errors import Closed
from jaxinfer.runtime.admission import Admission
from jaxinfer.runtime.coming import Coming
from jaxinfer.runtime.gate import Gate


class Room(Protocol):
    """Where a model computes: its `weights` (on a `place`, of these `shapes`), a `gate` in front of it, and whether it
    is `busy`. `lie_down` lets go of all that lies on the device, unless somebody is in: then it is False. `rise` takes
    weights again, or raises and leaves it as it was."""

    gate: Gate

    @property
    def place(self) -> Placement: ...
    @property
    def shapes(self) -> Any: ...
    @property
    def weights(self) -> Any: ...
    @property
    def busy(self) -> bool: ...
    def lie_down(self) -> bool: ...
    def rise(self, params: Any) -> None: ...


class Home(Protocol):
    """Who puts a model to sleep and wakes it."""

    def keep(self, model: Any, beside: int) -> AbstractContextManager[None]: ...
    def leave(self, model: Any) -> None: ...


class Heart(Protocol):
    """A thread that serves, as its supervisor sees it. `pulse` is another object whenever it has got on, and None while
    it has nothing to do. While it is `supervised` it leaves its requests to who takes over, if it dies."""

    @property
    def supervised(self) -> bool: ...

    def supervise(self, on: bool) -> None: ...

    @property
    def pulse(self) -> Any: ...

    @property
    def alive(self) -> bool: ...

    @property
    def compiling(self) -> bool:
        """Whether it waits for a compile, which may take any time."""
        ...

    def usual(self, pulse: Any) -> float | None:
        """Seconds that what it does takes as a rule; None if that is not known."""
        ...

    def revive(self, pulse: Any, why: str) -> bool:
        """Have another thread go on in its place. False if it has got on since `pulse` or is closed. Raises
        JaxinferError if that cannot be."""
        ...

    def give_up(self, why: str) -> None:
        """Nobody will go on in its place: tell who waits."""
        ...


class Living:
    """`_admissions` are the doors of the queues, `_busy` says whether a request has not ended, `hearts` are the threads
    that serve, and `_shut` (a `weakref.finalize`, so that it happens once) gives everything back.

    It computes in `rooms`. It can sleep unless it is `restless` (and why), if it has a `home`; `again` reads the
    weights that it was made with from where they came once more, where that can be done.
    """

    _shut: Callable[[], object]
    again: Callable[[], Any] | None = None
    home: Home | None = None
    coming: Coming | None = None  # the programs that a warm-up in the background compiles

    @property
    def rooms(self) -> Sequence[Room]:
        raise NotImplementedError

    @property
    def restless(self) -> str:
        return ""

    def awake(self, beside: int = 0) -> AbstractContextManager[None]:
        """In the `with` block it is awake, and there is room for other weights of so many bytes `beside` its own: then
        they take their place. Raises OutOfMemory where there cannot be."""
        return nullcontext() if self.home is None else self.home.keep(self, beside)

    @property
    def hearts(self) -> Sequence[Heart]:
        raise NotImplementedError

    @property
    def _admissions(self) -> list[Admission]:
        raise NotImplementedError

    @property
    def _busy(self) -> bool:
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken: it was closed, is drained, or all its threads have ended."""
        return all(admission.closed for admission in self._admissions)

    def _compile(self, each: Sequence[Programs], keys: Sequence[Any], least: Sequence[Any], background: bool) -> None:
        """Compile `keys`; or those that are `least` needed, and the others in the background."""
        for future in [future for programs in each for future in programs.prepare(*(least if background else keys))]:
            future.result()
        if background:
            self.coming = Coming(each, [key for key in keys if key not in least], len(least))

    def drain(self, seconds: float = 60.0) -> None:
        """Refuse what comes from now on, wait until what is here has ended (or for so many seconds), and close."""
        for admission in self._admissions:
            admission.close()
        end = time.monotonic() + seconds
        while (any(admission.waiting for admission in self._admissions) or self._busy) and time.monotonic() < end:
            time.sleep(0.002)
        self.close()

    def close(self) -> None:
        """Give everything back: requests that have not ended fail with `Closed`. Closing twice does no harm."""
        self._shut()
        if self.home is not None:
            self.home.leave(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def call_on(thread: threading.Thread, post: Callable[[Callable[[], Any]], object], action: Callable[[], object]
            ) -> None:
    """Have `thread` run what is posted to it, and wait until it has; at once if it is this one. Raises Closed if it
    ends before; then it is not done by another either."""
    if threading.current_thread() is thread:
        action()
        return
    done, lock, runs = threading.Event(), threading.Lock(), list[threading.Thread]()

    def act() -> None:
        with lock:
            if runs:  # it was given up, or runs already: what a thread had in its inbox when it died, its successor has
                return
            runs.append(threading.current_thread())
        action()
        done.set()

    post(act)
    while not done.wait(0.1):
        with lock:
            if (runs[0] if runs else thread).is_alive():
                continue
            runs.append(thread)  # nobody has begun it: now nobody will
        if not done.is_set():
            raise Closed()
        return
