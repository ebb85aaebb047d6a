"""What other threads tell an event loop: it is woken once for all that has come meanwhile, and not for each of it."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any


class Mailbox:
    """One for each loop, as long as somebody holds it: `of()` is that of the loop that runs here."""

    _boxes: weakref.WeakValueDictionary[asyncio.AbstractEventLoop, Mailbox] = weakref.WeakValueDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._woken = loop, False
        self._letters: deque[tuple[Callable[[Any], object], Any]] = deque()

    @classmethod
    def of(cls) -> Mailbox:
        loop = asyncio.get_running_loop()
        box = cls._boxes.get(loop)
        if box is None:
            box = cls._boxes[loop] = cls(loop)
        return box

    def post(self, read: Callable[[Any], object], letter: Any) -> None:
        """From any thread: `read(letter)` is called in the loop, in the order of posting."""
        self._letters.append((read, letter))
        if not self._woken:
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._open)
            except RuntimeError:
                pass  # the loop was closed: nobody reads any more

    def _open(self) -> None:
        self._woken = False  # first: who posts from now on may have come too late for this round
        while self._letters:
            read, letter = self._letters.popleft()
            read(letter)
