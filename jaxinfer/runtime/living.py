"""What all that serve from a thread of their own share: how they are told something, and how they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Self

from jaxinfer.errors import Closed
from jaxinfer.runtime.admission import Admission


class Living:
    """`_admissions` are the doors of the queues, `_busy` says whether a request has not ended, and `_shut` (a
    `weakref.finalize`, so that it happens once) gives everything back."""

    _shut: Callable[[], object]

    @property
    def _admissions(self) -> list[Admission]:
        raise NotImplementedError

    @property
    def _busy(self) -> bool:
        raise NotImplementedError

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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def call_on(thread: threading.Thread, post: Callable[[Callable[[], Any]], object], action: Callable[[], object]
            ) -> None:
    """Have `thread` run what is posted to it, and wait until it has; at once if it is this one. Raises Closed if it
    ends before."""
    if threading.current_thread() is thread:
        action()
        return
    done = threading.Event()
    post(lambda: (action(), done.set()))
    while not done.wait(0.1):
        if not thread.is_alive():
            raise Closed()
