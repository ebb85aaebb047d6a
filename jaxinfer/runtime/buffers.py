"""Host buffers that batches are written into, used again once their step has completed."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from jaxinfer.alignment import aligned


class Buffers:
    """Sets of arrays by key. `take` one, and `give` it back when the step that reads it has completed: the CPU backend
    aliases aligned buffers, and one overwritten earlier would be read half new."""

    def __init__(self):
        self._free: dict[Hashable, list[list[np.ndarray]]] = defaultdict(list)
        self._lock = threading.Lock()

    def take(self, key: Hashable, specs: Sequence[tuple[tuple[int, ...], Any]]) -> list[np.ndarray]:
        with self._lock:
            if free := self._free[key]:
                return free.pop()
        return [aligned(shape, dtype) for shape, dtype in specs]

    def give(self, key: Hashable, arrays: list[np.ndarray]) -> None:
        with self._lock:
            if key in self._free:  # else it was forgotten meanwhile
                self._free[key].append(arrays)

    def keep_only(self, wanted: Callable[[Any], bool]) -> None:
        """Forget the sets of all other keys, those that are taken as well."""
        with self._lock:
            for key in [key for key in self._free if not wanted(key)]:
                del self._free[key]
