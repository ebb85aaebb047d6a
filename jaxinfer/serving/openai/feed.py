"""From an engine's threads to an event loop: requests go in together, their pieces come out as they are drawn."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from jaxinfer.errors import Expired, InvalidRequest
from jaxinfer.request import Output, Piece, Request
from jaxinfer.runtime.answer import Answer
from jaxinfer.serving.aside import begun_aside
from jaxinfer.serving.mailbox import Mailbox


class Feed:
    """The answers to several requests, for one event loop. Leaving the `async with` cancels what has not ended, and
    submits no more. The requests' `timeout` counts from here: tokenizing a prompt is part of it."""

    def __init__(self, model: Any, requests: Sequence[Request], *, pieces: bool):
        self._model, self._requests, self._wanted = model, requests, pieces
        self._answers: list[Answer] = []
        self._began, self._gone, self._lock = time.monotonic(), False, threading.Lock()
        self._mailbox = Mailbox.of()
        self._queue: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def __aenter__(self) -> Feed:
        """Submit all, on a thread: a long prompt is tokenized, or a grammar compiled, while the loop serves others.
        Raises what `LanguageModel.submit` raises; then nothing was submitted."""
        try:
            await begun_aside(self._submit, lambda _: self._cancel())
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel()

    def _submit(self) -> None:
        count = sum(request.sampling.n for request in self._requests)
        if len(self._requests) > 1 and count > self._model.max_waiting:  # they would never be let in
            raise InvalidRequest(f"{count} answers are asked for at once; at most {self._model.max_waiting} can wait")
        for i, request in enumerate(self._requests):
            if self._gone:
                break
            request = replace(request, timeout=self._left(request))
            answer = self._model.submit(request, on_piece=partial(self._put, i) if self._wanted else None)
            with self._lock:
                self._answers.append(answer)
                late = self._gone
            if late:
                answer.cancel()
            if self._wanted:
                answer.add_done_callback(self._ended)

    def _left(self, request: Request) -> float | None:
        if request.timeout is None:
            return None
        if (left := request.timeout - (time.monotonic() - self._began)) <= 0:
            raise Expired(f"the request was not submitted within its timeout of {request.timeout:g} s")
        return left

    def _cancel(self) -> None:
        with self._lock:
            self._gone = True
        for answer in self._answers:
            answer.cancel()

    def _put(self, i: int, piece: Piece) -> None:
        self._tell((i, piece))

    def _ended(self, answer: Future) -> None:
        if not answer.cancelled() and (error := answer.exception()) is not None:
            self._tell(error)

    def _tell(self, item: tuple[int, Piece] | BaseException) -> None:
        self._mailbox.post(self._queue.put_nowait, item)

    async def outputs(self) -> list[Output]:
        """All Outputs, in the order of the requests; or the first error."""
        return list(await asyncio.gather(*map(asyncio.wrap_future, self._answers)))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece with the number of its request, until all have ended; or the first error."""
        left = len(self._answers)
        while left:
            item = await self._queue.get()
            if isinstance(item, BaseException):
                raise item
            left -= item[1].output is not None
            yield item
