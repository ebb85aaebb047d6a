"""One handle for every way to wait: a future that can also be iterated, awaited, and called back from."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

from jaxinfer.request import Output, Piece


class Answer(Future[Output]):
    """What becomes of a request. Safe to use from any thread.

    `result(timeout)` waits for the Output and `exception(timeout)` for what went wrong; `await answer` does in asyncio
    what `result` does; `for piece in answer` and `async for piece in answer` take its pieces, once (later ones see only
    the last); `on_piece` is called with each of them, in order, on the delivery thread, and must not block. `cancel()`
    ends the request at any moment, and so do cancelling a task that awaits it and leaving an `async for`.
    """

    def __init__(self, abandon: Callable[[], None], on_piece: Callable[[Piece], object] | None = None):
        super().__init__()
        self._abandon, self._on_piece = abandon, on_piece
        self._pieces: queue.SimpleQueue[Piece | BaseException] = queue.SimpleQueue()
        self._wake: Callable[[], object] = lambda: None
        self._settled = self._noticed = False
        self._noticing = threading.Lock()

    def cancel(self) -> bool:
        """End the request. False if it had ended already."""
        if not super().cancel():
            return False
        with self._noticing:
            noticed, self._noticed = self._noticed, True
        if not noticed:
            self.set_running_or_notify_cancel()  # who waits for several futures at once hears of it by this
        self._abandon()
        self._put(CancelledError())
        return True

    def settle(self) -> bool:
        """The delivery thread's: the end is near, and it is too late to cancel. False if that has happened."""
        with self._noticing:
            if not self._noticed and not self.cancelled():
                self._noticed, self._settled = True, self.set_running_or_notify_cancel()
            return self._settled

    def show(self, piece: Piece) -> None:
        """The delivery thread's: call back with a piece. Raises what the callback raises."""
        if self._on_piece is not None:
            self._on_piece(piece)

    def deliver(self, piece: Piece) -> None:
        """The delivery thread's: one more piece for who takes them."""
        self._put(piece)
        if piece.output is not None:
            self.set_result(piece.output)

    def fail(self, error: BaseException) -> None:
        """The delivery thread's: there will be no more pieces."""
        self._put(error)
        self.set_exception(error)

    def _put(self, item: Piece | BaseException) -> None:
        self._pieces.put(item)
        try:
            self._wake()
        except RuntimeError:  # the event loop was closed under an `async for`: nobody will take more
            self._wake = lambda: None
            self.cancel()

    def _take(self) -> Piece:
        """The next piece, or the error. What comes last stays: whoever asks again does not wait for ever."""
        item = self._pieces.get()
        if isinstance(item, BaseException):
            self._pieces.put(item)
            raise item
        if item.output is not None:
            self._pieces.put(item)
        return item

    def __iter__(self) -> Iterator[Piece]:
        while True:
            piece = self._take()
            yield piece
            if piece.output is not None:
                return

    async def __aiter__(self) -> AsyncIterator[Piece]:
        loop, more = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(more.set)
        try:
            while True:
                more.clear()
                while not self._pieces.empty():
                    piece = self._take()
                    yield piece
                    if piece.output is not None:
                        return
                await more.wait()
        finally:
            self._wake = lambda: None
            self.cancel()

    def __await__(self) -> Generator[Any, None, Output]:
        return asyncio.wrap_future(self).__await__()


class Stream(Iterator[Piece]):
    """The pieces of an answer. Closing it, or dropping it, cancels the request; it keeps `model` alive."""

    def __init__(self, answer: Answer, model: Any):
        self._model, self._pieces = model, iter(answer)
        self._finalizer = weakref.finalize(self, answer.cancel)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        self._finalizer()
