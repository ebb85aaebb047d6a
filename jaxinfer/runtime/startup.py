"""What a model's start was made of: each phase, when it ran, and what it moved. Phases overlap."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from jaxinfer.compiler.ledger import Table


@dataclass
class Phase:
    """From `began` to `ended` (seconds since the start), at work for `busy` seconds in all its threads together.
    `origin` says of a program whether it was compiled or came from the disk."""

    name: str
    began: float
    ended: float
    busy: float
    bytes: int = 0
    origin: str = ""


COLUMNS = "phase", "from s", "to s", "busy s", "MB", "origin"


@dataclass(repr=False)
class Startup(Table):
    """A table, in a terminal and in a notebook; iterate over it for the phases, in the order in which they began.

    >>> startup = Startup(began=10.0)
    >>> startup.note("weights read", 11.0, 12.0, 5_000_000)
    >>> startup.note("weights read", 11.5, 13.0, 1_000_000)
    >>> print(startup)
    phase         from s  to s  busy s  MB   origin
    weights read  1.00    3.00  2.50    6.0
    """

    columns = COLUMNS
    began: float = field(default_factory=time.perf_counter)
    phases: dict[str, Phase] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def note(self, name: str, began: float, ended: float, nbytes: int = 0, origin: str = "") -> None:
        """A phase, or another part of one, ran between these times of `time.perf_counter`. From any thread."""
        began, ended = began - self.began, ended - self.began
        with self._lock:
            phase = self.phases.setdefault(name, Phase(name, began, ended, 0.0, 0, origin))
            phase.began, phase.ended = min(phase.began, began), max(phase.ended, ended)
            phase.busy, phase.bytes = phase.busy + ended - began, phase.bytes + nbytes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The `with` block is one."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.note(name, began, time.perf_counter())

    def __iter__(self) -> Iterator[Phase]:
        with self._lock:
            return iter(sorted(self.phases.values(), key=lambda phase: phase.began))

    def __getitem__(self, name: str) -> Phase:
        return self.phases[name]

    def rows(self) -> list[tuple[str, ...]]:
        return [(p.name, f"{p.began:.2f}", f"{p.ended:.2f}", f"{p.busy:.2f}", f"{p.bytes / 1e6:.1f}" if p.bytes else "",
                 p.origin) for p in self]
