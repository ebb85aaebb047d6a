"""Programs that are compiled while their model serves already."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from typing import Any

from jaxinfer import events
from jaxinfer.compiler.programs import THREADS, Programs
from jaxinfer.errors import Closed

AHEAD = 2  # programs that are asked for at a time: more do not come at once, and what a request wants would come later


class Coming:
    """Compiles `keys` for each of several `Programs` from a thread of its own, a few at a time, so that what requests
    want goes in between. With those that were there before, `ready` of `total` are there; `failed` says which could not
    be compiled, and why. It `began` and has `ended` (None: not yet) at these times of `time.perf_counter`; it also ends
    when the programs are closed."""

    def __init__(self, each: Sequence[Programs], keys: Sequence[Any], before: int):
        self.ready, self.total = before, before + len(keys)
        self.failed: dict[str, str] = {}
        self.began, self.ended = time.perf_counter(), None
        threading.Thread(target=self._loop, args=(each, keys), name=f"{THREADS}-coming", daemon=True).start()

    def _loop(self, each: Sequence[Programs], keys: Sequence[Any]) -> None:
        asked = deque[tuple[Any, list[Future]]]()
        try:
            for key in keys:
                asked.append((key, [future for programs in each for future in programs.prepare(key)]))
                if len(asked) == AHEAD:
                    self._await(*asked.popleft())
            while asked:
                self._await(*asked.popleft())
        except (Closed, CancelledError, OSError):  # or another process of its mesh has gone
            pass
        finally:
            self.ended = time.perf_counter()

    def _await(self, key: Any, futures: list[Future]) -> None:
        try:
            for future in futures:
                future.result()
        except CancelledError:
            raise
        except Exception as error:  # a step that wants it tries again
            self.failed[str(key)] = f"{type(error).__name__}: {error}"
            events.report()
        else:
            self.ready += 1
