"""The language model: text in, text out, over one engine."""

from __future__ import annotations

import asyncio
import itertools
import operator
import os
import queue
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import CancelledError
from contextlib import closing
from typing import Any

from jaxinfer.compiler import Ledger
from jaxinfer.errors import Closed, InvalidRequest
from jaxinfer.frontend.tokenizer import Tokenizer
from jaxinfer.graph import Graph
from jaxinfer.request import Output, Piece, Sampling, Sequence
from jaxinfer.runtime.delivery import Deliver, Delivery
from jaxinfer.runtime.engine import Engine

Prompt = str | SequenceOf[int]


class LanguageModel:
    """What `jaxinfer.load` returns. Safe to use from any number of threads and event loops at once.

    A prompt is text or token ids. Options of `Sampling` may be given by name and override `sampling`. All methods
    raise `InvalidRequest` before anything is queued, and `Closed` after `close()`.
    """

    def __init__(self, graph: Graph, tokenizer: Tokenizer, engine: Engine, delivery: Delivery, *, config: Any,
                 eos: frozenset[int], max_context: int, load_seconds: float):
        self.graph, self.tokenizer, self.config = graph, tokenizer, config
        self.max_context = max_context
        self._engine, self._delivery, self._eos = engine, delivery, eos
        self._ids = itertools.count(1)
        self._load_seconds = load_seconds
        delivery.cancel = engine.cancel
        self._shut = weakref.finalize(self, _shut, engine, delivery)  # also when it is dropped, and at exit

    # Asking.

    def __call__(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> Output:
        """The whole answer to one prompt."""
        return self._last(self.stream(prompt, sampling, **options))

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> Iterator[Piece]:
        """The answer piece by piece; the last piece carries the `Output`. Closing the iterator cancels the request."""
        return self._stream(self._sequence(self._encode(prompt), sampling, options))

    def generate(self, prompts: Prompt | Iterable[Prompt], sampling: Sampling | SequenceOf[Sampling] | None = None,
                 **options: Any) -> list[Output]:
        """The answers to many prompts, batched, in their order. `sampling` is one for all, or one for each."""
        many: list[Any] = [prompts] if isinstance(prompts, str) else list(prompts)
        if many and not isinstance(prompts, str) and hasattr(many[0], "__index__"):
            many = [prompts]  # one prompt of token ids
        each = list(sampling) if isinstance(sampling, SequenceOf) else [sampling] * len(many)
        if len(each) != len(many):
            raise InvalidRequest(f"{len(each)} samplings were given for {len(many)} prompts; give one, or one for each")
        sequences = [self._sequence(self._encode(p), s, options) for p, s in zip(many, each, strict=True)]
        answers = [queue.SimpleQueue() for _ in sequences]
        try:
            self._submit(*zip(sequences, (a.put for a in answers), strict=True))
            return [self._last(_pieces(answer)) for answer in answers]
        finally:
            self._abandon(*sequences)

    async def agenerate(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> Output:
        """`__call__` for asyncio and notebook cells; cancelling the task cancels the request."""
        output = None
        async for piece in self.astream(prompt, sampling, **options):
            output = piece.output
        assert output is not None
        return output

    async def astream(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> AsyncIterator[Piece]:
        """`stream` for asyncio."""
        sequence = self._sequence(self._encode(prompt), sampling, options)
        loop, answer = asyncio.get_running_loop(), asyncio.Queue()
        self._submit((sequence, lambda item: loop.call_soon_threadsafe(answer.put_nowait, item)))
        try:
            last = False
            while not last:
                item = await answer.get()
                if isinstance(item, BaseException):
                    raise item
                last = item.output is not None
                yield item
        finally:
            self._abandon(sequence)

    def chat(self, messages: str | SequenceOf[Mapping[str, Any]], sampling: Sampling | None = None, *,
             stream: bool = False, tools: Any = None, **options: Any) -> Any:
        """The answer to a conversation, by the model's own chat template: an Output, or with `stream` its pieces.

        `messages` is a list of {"role": ..., "content": ...}, or a text, which is one message of the user's.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        text = self.tokenizer.render_chat(messages, tools=tools)  # type: ignore[arg-type]
        prompt = self.tokenizer.encode(text, add_special=False)
        pieces = self._stream(self._sequence(prompt, sampling, options))
        return pieces if stream else self._last(pieces)

    # Looking.

    @property
    def ledger(self) -> Ledger:
        """Every Executable: where it came from, what it cost, how it was used."""
        return self._engine.executables.ledger

    @property
    def params(self) -> Any:
        """The weights, a pytree in the shape of `graph.spec`."""
        self._check_open()
        return self._engine.params

    @property
    def timings(self) -> dict[str, float]:
        """Seconds spent: `load_seconds` on weights, `compile_seconds` on Executables so far."""
        return {"load_seconds": self._load_seconds, "compile_seconds": sum(e.seconds for e in self.ledger)}

    # Living.

    def warmup(self) -> None:
        """Compile every bucket now, so that no request waits for a compile afterwards."""
        self._check_open()
        try:
            self._engine.executables.warmup()
        except (CancelledError, RuntimeError):
            self._check_open()
            raise

    def close(self) -> None:
        """Give everything back: requests that still run fail with `Closed`. Closing twice does no harm."""
        self._shut()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Inside.

    def _check_open(self) -> None:
        if self._engine.closed:
            raise Closed("this model is closed; load it again to use it")

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        try:
            ids = None if isinstance(prompt, bytes | bytearray) else [operator.index(i) for i in prompt]
        except TypeError:
            ids = None
        if ids is None:
            raise InvalidRequest(f"prompt is a {type(prompt).__name__}; it must be a string or a sequence of token ids")
        wrong = [i for i in ids if not 0 <= i < self.graph.vocab]
        if wrong:
            raise InvalidRequest(f"prompt has the token id {wrong[0]}; this model's are 0 to {self.graph.vocab - 1}")
        return ids

    def _sequence(self, prompt: list[int], sampling: Sampling | None, options: dict[str, Any]) -> Sequence:
        sampling = (sampling or Sampling()).but(**options)
        if not prompt:
            raise InvalidRequest("prompt is empty: there is no token to continue from; give at least one")
        room = self.max_context - len(prompt)
        if room < 1:
            raise InvalidRequest(
                f"prompt has {len(prompt)} tokens; at most {self.max_context - 1} fit, with one new token, into "
                f"max_context={self.max_context}"
            )
        if sampling.seed is None and sampling.temperature > 0:
            sampling = sampling.but(seed=int.from_bytes(os.urandom(4), "little"))
        sampling = sampling.but(max_tokens=min(sampling.max_tokens, room))
        return Sequence(next(self._ids), prompt, len(prompt), sampling, self._eos | set(sampling.stop_tokens))

    def _submit(self, *tickets: tuple[Sequence, Deliver]) -> None:
        for sequence, deliver in tickets:
            self._delivery.expect(sequence, deliver)
        self._engine.submit(*(sequence for sequence, _ in tickets))

    def _stream(self, sequence: Sequence) -> Iterator[Piece]:
        answer: queue.SimpleQueue = queue.SimpleQueue()
        self._submit((sequence, answer.put))

        def pieces():
            try:
                yield from _pieces(answer)
            finally:
                self._abandon(sequence)

        return _Closing(pieces(), lambda: self._abandon(sequence))

    def _abandon(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self._delivery.abandon(sequence.id)

    @staticmethod
    def _last(pieces: Iterator[Piece]) -> Output:
        output = None
        with closing(pieces):  # type: ignore[type-var]
            for piece in pieces:
                output = piece.output
        assert output is not None
        return output


class _Closing(Iterator[Piece]):
    """A generator that was never started runs no `finally` when it is dropped; this one cancels all the same."""

    def __init__(self, pieces: Any, abandon: Any):
        self._pieces, self._finalizer = pieces, weakref.finalize(self, abandon)

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        self._pieces.close()
        self._finalizer()


def _pieces(answer: queue.SimpleQueue) -> Iterator[Piece]:
    while True:
        item = answer.get()
        if isinstance(item, BaseException):
            raise item
        yield item
        if item.output is not None:
            return


def _shut(engine: Engine, delivery: Delivery) -> None:
    engine.close()
    delivery.close()
    engine.executables.close()
