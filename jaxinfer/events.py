"""Typed events: the one hook for observers (progress bars, logs, metrics). Emitting costs nothing unobserved."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.request import Sampling


@dataclass(frozen=True)
class Progress:
    """A long job advanced: `done` of `total` units of `what` ("download", "load"); `done == total` ends it."""

    what: str
    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Compiling:
    """An Executable is about to be compiled (`seconds` is None) or was, in `seconds`, from `origin`."""

    name: str
    seconds: float | None = None
    origin: str = "compiled"


@dataclass(frozen=True)
class NotStored:
    """A program that is compiled anew in each process, or this time: `why` it was not taken from the disk, or not put
    there."""

    name: str
    why: str


@dataclass(frozen=True)
class Missed:
    """A step found no Executable for its bucket; `why` says which leaf of the input changed, `ran_on` what served."""

    name: str
    why: str
    ran_on: str


@dataclass(frozen=True)
class Replicated:
    """A logical axis of a model that its mesh should cut and cannot: every device has all of it; `why` says why."""

    axis: str
    why: str


@dataclass(frozen=True)
class Marks:
    """When what happened to a request, in seconds of `time.perf_counter`: it was `submitted`; it `began` to be read
    (None: it never was), in `chunks` (from its dispatch until it was done, and its tokens); the tokens of each sample
    came (`drawn`); it `ended`. `detokenised` is how long making text of its tokens took in all."""

    submitted: float
    ended: float
    began: float | None = None
    chunks: tuple[tuple[float, float, int], ...] = ()
    drawn: tuple[tuple[float, ...], ...] = ()
    detokenised: float = 0.0


@dataclass(frozen=True)
class RequestEnded:
    """A request left `model`; `reason` is a finish reason of `Output`. `reused` tokens of its prompt were found
    computed; `copied` bytes of an endpoint's request were copied on their way to the device. `tag` is what `tagged`
    said when it was asked. `marks` are there only if somebody listened meanwhile."""

    id: int
    reason: str
    prompt_tokens: int
    tokens: int
    model: str = ""
    reused: int = 0
    copied: int = 0
    sampling: Sampling | None = None
    tag: Any = None
    marks: Marks | None = None


@dataclass(frozen=True)
class Stepped:
    """An engine has taken a step for `rows` requests, which read `tokens` tokens and drew `drawn`: each stage, and its
    seconds."""

    model: str
    rows: int
    tokens: int
    drawn: int
    stages: dict[str, float]


@dataclass(frozen=True)
class Timed:
    """A stage of serving a request that is no part of a step took so many seconds."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Swapped:
    """New requests to `model` run on other weights, of this version."""

    model: str
    version: int


@dataclass(frozen=True)
class Retired:
    """A version of the name `model` was closed and goes: what `served` it, and its `stats` in the end."""

    model: str
    served: Any
    stats: Any


@dataclass(frozen=True)
class Stopped:
    """A thread that serves `model` has ended or stands still; `why` says which, `revived` whether another goes on."""

    model: str
    why: str
    revived: bool


@dataclass(frozen=True)
class Retried:
    """A batch of `requests` failed with `error`: each of them is tried once more, alone."""

    requests: int
    error: Exception


@dataclass(frozen=True)
class TierClosed:
    """No more prefix pages are kept on a `tier`, "host" or "disk": `why` says what went wrong with it. Whoever would
    have found them there reads them again."""

    tier: str
    why: str


@dataclass(frozen=True)
class TensorsServed:
    """A request for tensors was answered over `protocol` ("http", "grpc"): bytes of its inputs and outputs, and those
    that were copied on their way in, to the device, and out, besides what the libraries of the protocols copy."""

    model: str
    protocol: str
    bytes_in: int
    bytes_out: int
    bytes_copied: int


Event = (Progress | Compiling | NotStored | Missed | Replicated | RequestEnded | Stepped | Timed | Swapped | Retired
          | Stopped | Retried | TierClosed | TensorsServed)
_observers: tuple[Callable[[Event], None], ...] = ()
_lock = threading.Lock()
_tag: ContextVar[Any] = ContextVar("jaxinfer-tag", default=None)


def observed() -> bool:
    """Whether anybody listens: what happens a thousand times a second need not be put into an event for nobody."""
    return bool(_observers)


def emit(event: Event) -> None:
    """Hand `event` to every observer, in the caller's thread. One that raises is reported on stderr: a watcher must
    not harm what it watches."""
    for observer in _observers:
        try:
            observer(event)
        except KeyboardInterrupt:
            raise  # the user's, who is in the main thread
        except BaseException:  # sys.exit() as well
            report()


def report() -> None:
    """Print the exception that is being handled on stderr. A disk that is full, or nobody who reads, must not harm the
    thread that tells it."""
    with suppress(OSError, ValueError):
        traceback.print_exc()


@contextmanager
def observe(observer: Callable[[Event], None]) -> Iterator[None]:
    """Call `observer` with every event emitted inside the `with` block, from whichever thread emits it.

    >>> seen = []
    >>> with observe(seen.append): emit(Compiling("forward[T=8]"))
    >>> seen[0].name
    'forward[T=8]'
    """
    global _observers
    with _lock:
        _observers = (*_observers, observer)
    try:
        yield
    finally:
        with _lock:
            _observers = tuple(o for o in _observers if o is not observer)


@contextmanager
def tagged(tag: Any) -> Iterator[None]:
    """What is asked for inside the `with` block can be told apart: its `RequestEnded` carries this `tag`. It follows
    the context into asyncio's tasks and `to_thread`."""
    token = _tag.set(tag)
    try:
        yield
    finally:
        _tag.reset(token)


def tag() -> Any:
    """What `tagged` said here."""
    return _tag.get()


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Tell how long the `with` block took, if anybody listens."""
    if not _observers:
        yield
        return
    began = time.perf_counter()
    yield
    emit(Timed(stage, time.perf_counter() - began))
