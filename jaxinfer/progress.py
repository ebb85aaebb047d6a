"""What the terminal shows while a model is fetched, loaded and compiled: an observer of `jaxinfer.events`."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from threading import Lock
from typing import Any, TextIO

from jaxinfer.events import Compiling, Event, Progress, Replicated, observe


@contextmanager
def shown(stream: TextIO | None = None) -> Iterator[None]:
    """Show the events of the `with` block on `stream` (stderr): bars on a terminal, plain lines elsewhere."""
    out: TextIO = stream or sys.stderr or StringIO()  # a program without a console has no stderr
    can_draw = out.isatty() and os.environ.get("TERM") != "dumb"
    observer = Bars(out) if can_draw else Lines(out)
    try:
        with observe(observer):
            yield
    finally:
        observer.close()


def amount(count: float) -> str:
    """A number of bytes for people, in decimal units.

    >>> amount(92_871_040), amount(512)
    ('92.9 MB', '512 B')
    """
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


class Lines:
    """One line when a job starts and one when it ends: for logs, pipes and CI."""

    def __init__(self, stream: TextIO):
        self.stream, self.started, self.lock = stream, {}, Lock()

    def __call__(self, event: Event) -> None:
        with self.lock:
            match event:
                case Progress(what, name, done, total):
                    if (what, name) not in self.started:
                        self.started[what, name] = time.monotonic()
                        self._say(f"{what} {name}: {amount(total)}")
                    if done >= total:
                        seconds = time.monotonic() - self.started.pop((what, name))
                        self._say(f"{what} {name}: done in {seconds:.1f} s")
                case Compiling(name, None):
                    self._say(f"compile {name}")
                case Compiling(name, seconds, origin):
                    self._say(f"compile {name}: {origin} in {seconds:.1f} s")
                case Replicated(axis, why):
                    self._say(f"{axis} on every device: {why}")

    def _say(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Nothing is left on a plain stream."""


class Bars:
    """Bars that vanish when their job ends. The display runs only while there is a job, so that text streamed
    to the same terminal in between stays whole."""

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Display

        self.display = Display(SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(),
                               TextColumn("{task.fields[amount]}"), TimeElapsedColumn(),
                               console=Console(file=stream), transient=True)
        self.tasks, self.lock = {}, Lock()

    def __call__(self, event: Event) -> None:
        with self.lock:
            match event:
                case Progress(what, name, done, total) if done < total:
                    so_far = f"{amount(done)} of {amount(total)}"
                    self._show(f"{what} {name}", so_far, completed=done, total=total)
                case Progress(what, name):
                    self._hide(f"{what} {name}")
                case Compiling(name, None):
                    self._show(f"compile {name}", "", total=None)
                case Compiling(name):
                    self._hide(f"compile {name}")
                case Replicated(axis, why):
                    self.display.console.print(f"{axis} on every device: {why}")

    def _show(self, job: str, amount: str, **numbers: Any) -> None:
        if job in self.tasks:
            self.display.update(self.tasks[job], amount=amount, **numbers)
            return
        if not self.tasks:
            self.display.start()
        self.tasks[job] = self.display.add_task(job, amount=amount, **numbers)
        self.display.refresh()

    def _hide(self, job: str) -> None:
        if job in self.tasks:
            self.display.remove_task(self.tasks.pop(job))
            if not self.tasks:
                self.display.stop()

    def close(self) -> None:
        """Take away what a failed job left on the screen."""
        with self.lock:
            self.display.stop()
