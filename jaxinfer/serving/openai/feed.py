"""From an engine's threads to an event loop: requests go in together, their pieces come out as they are drawn."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from anyio import to_thread

from jaxinfer.request import Output, Piece, Request
from jaxinfer.runtime.answer import Answer
from jaxinfer.serving.mailbox import Mailbox


class Feed:
    """The answers to several requests, for one event loop. Leaving the `async with` cancels what has not ended."""

    def __init__(self, model: Any, requests: Sequence[Request], *, pieces: bool):
        self._model, self._requests, self._wanted = model, requests, pieces
        self._answers: list[Answer] = []
        self._mailbox = Mailbox.of()
        self._queue: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def __aenter__(self) -> Feed:
        """Submit all, on a thread: a long prompt is tokenized, or a grammar compiled, while the loop serves others.
        Raises what `LanguageModel.submit` raises; then nothing was submitted."""
        try:
            await to_thread.run_sync(self._submit)
        except BaseException:
            self._cancel()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel()

    def _submit(self) -> None:
        for i, request in enumerate(self._requests):
            answer = self._model.submit(request, on_piece=partial(self._put, i) if self._wanted else None)
            self._answers.append(answer)
            if self._wanted:
                answer.add_done_callback(self._ended)

    def _cancel(self) -> None:
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
