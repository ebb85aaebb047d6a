"""What the host's CPU time goes to: the stacks of all threads, looked at fifty times a second."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from jaxinfer.serving import flame, pprof

RATE = 50  # looks a second
TASKS = Path("/proc/self/task")  # Linux says here how long each thread has computed


@dataclass
class Profile:
    """Stacks, from the thread's name down to the function that ran, and the nanoseconds that they were computed in
    (where the system does not say: in which they were seen). A notebook shows it as a flame graph."""

    nanoseconds: Counter[pprof.Stack] = field(default_factory=Counter)
    looks: Counter[pprof.Stack] = field(default_factory=Counter)
    began_ns: int = 0
    duration_ns: int = 0

    def pprof(self) -> bytes:
        """The profile for `go tool pprof` and its kin."""
        both = {stack: (self.looks[stack], nanoseconds) for stack, nanoseconds in self.nanoseconds.items()}
        return pprof.encode(both, (("samples", "count"), ("cpu", "nanoseconds")), began_ns=self.began_ns,
                            duration_ns=self.duration_ns, period_ns=10**9 // RATE)

    def flame(self) -> str:
        """A page that needs nothing else: a flame graph, in which a click shows one part alone."""
        return flame.page(self.nanoseconds, self.duration_ns)

    def _repr_html_(self) -> str:
        return flame.framed(self.flame())


@contextmanager
def profiled() -> Iterator[Profile]:
    """Profile this process while the `with` block runs.

    >>> with profiled() as profile: sum(range(3_000_000))
    4499998500000
    >>> profile.duration_ns > 0
    True
    """
    profile, stop = Profile(began_ns=time.time_ns()), threading.Event()
    sampler = threading.Thread(target=_sample, args=(profile, stop), name="jaxinfer-profiler", daemon=True)
    began = time.perf_counter_ns()
    sampler.start()
    try:
        yield profile
    finally:
        stop.set()
        sampler.join()
        profile.duration_ns = time.perf_counter_ns() - began


def profile(seconds: float) -> Profile:
    """Profile this process for so long."""
    with profiled() as found:
        time.sleep(seconds)
    return found


def _sample(found: Profile, stop: threading.Event) -> None:
    before, last = _computed(), time.perf_counter_ns()
    while not stop.wait(1 / RATE):
        now, computed = time.perf_counter_ns(), _computed()
        frames, threads = sys._current_frames(), {t.native_id: t for t in threading.enumerate()}
        if computed is None:
            spent = {id: now - last for id in threads if id is not None}
        else:
            spent = {id: ns - (before or {}).get(id, ns) for id, ns in computed.items()}
        for id, nanoseconds in spent.items():
            if nanoseconds > 0 and id != threading.get_native_id():
                thread = threads.get(id)
                frame = frames.get(thread.ident) if thread is not None and thread.ident is not None else None
                name = thread.name if thread is not None else _name(id)
                stack = ((name, "thread", 0), *_stack(frame))
                found.nanoseconds[stack] += nanoseconds
                found.looks[stack] += 1
        before, last = computed, now


def _computed() -> dict[int, int] | None:
    """Nanoseconds that each thread has computed for, by its number in the system; None where that is not told."""
    found = {}
    try:
        for id in os.listdir(TASKS):
            try:
                found[int(id)] = int((TASKS / id / "schedstat").read_bytes().split()[0])
            except (OSError, IndexError):
                pass  # it has ended just now
    except OSError:
        return None
    return found or None


def _name(id: int) -> str:
    """A thread that is not Python's: XLA's, mostly."""
    try:
        return f"[{(TASKS / str(id) / 'comm').read_text().strip()}]"
    except OSError:
        return "[native]"


def _stack(frame: FrameType | None) -> pprof.Stack:
    found = []
    while frame is not None:
        code = frame.f_code
        found.append((code.co_qualname, code.co_filename, frame.f_lineno or code.co_firstlineno))
        frame = frame.f_back
    return tuple(reversed(found))
