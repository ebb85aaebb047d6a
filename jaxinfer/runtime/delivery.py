"""From tokens to text, on a thread of its own: detokenise, look for stop strings, keep deadlines, hand pieces over."""

from __future__ import annotations

import heapq
import queue
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from jaxinfer import events
from jaxinfer.errors import Closed, Expired, RequestFailed
from jaxinfer.frontend.tokenizer import TextStream, Tokenizer
from jaxinfer.request import FinishReason, Logprob, Output, Piece, Request, Sequence, Timings
from jaxinfer.runtime.answer import Answer
from jaxinfer.runtime.engine import Chunks, News


@dataclass
class Sample:
    """One answer on its way back: its text so far, and the part of it that a stop string may yet swallow."""

    sequence: Sequence
    index: int
    text: TextStream
    echo: str = ""  # the prompt's text, if it is to be shown before the answer's
    shown: list[str] = field(default_factory=list)
    held: str = ""
    tokens: list[int] = field(default_factory=list)
    told: int = 0  # tokens that pieces have carried
    logprobs: list[Logprob] = field(default_factory=list)
    first_at: float | None = None
    drawn: list[float] = field(default_factory=list)  # when each token came, while somebody listens
    output: Output | None = None

    def add(self, text: str, final: bool = False) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was found (then nothing follows)."""
        sampling = self.sequence.sampling
        if not sampling.stop:
            return text, False
        self.held += text
        if not any(stop[0] in self.held for stop in sampling.stop):
            show, self.held = self.held, ""
            return show, False
        stops = sampling.stop if len(self.tokens) > sampling.min_tokens else ()
        found = min(((at + len(stop), at) for stop in stops if (at := self.held.find(stop)) >= 0), default=None)
        if found is not None:  # the first to be complete, so that it does not matter how tokens cut the text
            show, self.held = self.held[: found[1]], ""
            return show, True
        keep = 0 if final else max((_overlap(self.held, stop) for stop in sampling.stop), default=0)
        show, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep:]
        return show, False


@dataclass
class Ticket:
    """One request's way back: its samples, what was read of its prompt for its own sake, and who waits for it."""

    request: Request
    samples: list[Sample]
    answer: Answer
    submitted: float
    tag: Any = None
    read_at: float | None = None
    chunks: list[tuple[float, float, int]] = field(default_factory=list)  # of `Marks`, while somebody listens
    detokenised: float = 0.0
    scores: dict[int, Logprob] = field(default_factory=dict)  # by position
    pooled: list[Any] | None = None  # the sum of the prompt's hidden states, and the last one

    @property
    def prompt(self) -> tuple[int, ...]:
        sequence = self.samples[0].sequence
        return tuple(sequence.tokens[: sequence.prompt])


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins.

    >>> _overlap("a b", "bc")
    1
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Delivery:
    """Owns the tickets of one model: they are touched by its thread alone. `end(sequence, reason)`, to be set, is the
    engine's: it ends a sequence whose text ran into a stop string, whose time is up or whose caller has gone."""

    end: Callable[[Sequence, FinishReason], None]

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self.model = ""  # what its events call it
        self._tickets: dict[int, tuple[Ticket, Sample]] = {}  # by sequence
        self._deadlines: list[tuple[float, int, weakref.ref[Ticket], str]] = []
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closing, self._closed = threading.RLock(), False
        self.first: tuple[float, float] | None = None  # when the first request came, and its first token
        self._thread = threading.Thread(target=self._loop, name="jaxinfer-delivery", daemon=True)
        self._thread.start()

    # From any thread.

    def expect(self, request: Request, sequences: list[Sequence], answer: Answer, submitted: float | None = None,
               echo: str = "") -> Ticket:
        """Open a ticket; call it before the sequences are submitted. The text of each begins with `echo`."""
        samples = [Sample(s, i, self._tokenizer.stream(), echo) for i, s in enumerate(sequences)]
        submitted = time.perf_counter() if submitted is None else submitted
        ticket = Ticket(request, samples, answer, submitted, events.tag())
        self._post(partial(self._open, ticket))
        return ticket

    def abandon(self, ticket: Ticket) -> None:
        """End a request whose caller has gone; nothing is delivered any more."""
        self._post(partial(self._close, ticket, "cancelled"))

    def tell(self, news: News) -> None:
        self._post(partial(self._hear, news))

    def failed(self, sequence: Sequence, error: BaseException) -> None:
        self._post(partial(self._failed, sequence.id, error))

    def _post(self, action: Callable[[], None]) -> None:
        """A request that slipped in while the model closed is told of it by its own thread: the other has gone."""
        with self._closing:
            if not self._closed:
                self._inbox.put(action)
                return
            action()

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._tickets) or not self._inbox.empty()

    def close(self) -> None:
        self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # In the delivery thread.

    def _loop(self) -> None:
        while True:
            self._safely(self._expire)
            wait = self._deadlines[0][0] - time.perf_counter() if self._deadlines else None
            try:
                action = self._inbox.get(timeout=None if wait is None else min(max(wait, 0), 3600))
            except queue.Empty:
                continue
            if action is None:
                break
            self._safely(action)
        with self._closing:
            self._closed = True
            while not self._inbox.empty():
                if action := self._inbox.get():
                    self._safely(action)

    def _safely(self, action: Callable[[], None]) -> None:
        """Whatever a done callback raises (sys.exit() included), the others are waiting."""
        try:
            action()
        except BaseException:
            events.report()

    def _open(self, ticket: Ticket) -> None:
        for sample in ticket.samples:
            self._tickets[sample.sequence.id] = ticket, sample
        for name in ("queue_timeout", "timeout"):
            seconds = getattr(ticket.request, name)
            if seconds is not None:
                entry = ticket.submitted + seconds, ticket.samples[0].sequence.id, weakref.ref(ticket), name
                heapq.heappush(self._deadlines, entry)
        if len(self._deadlines) > 2 * len(self._tickets) + 64:  # most are of requests that have long ended
            self._deadlines = [entry for entry in self._deadlines if (t := entry[2]()) and self._is_open(t)]
            heapq.heapify(self._deadlines)

    def _is_open(self, ticket: Ticket) -> bool:
        return any(sample.sequence.id in self._tickets for sample in ticket.samples)

    def _expire(self) -> None:
        now = time.perf_counter()
        while self._deadlines and self._deadlines[0][0] <= now:
            ticket, name = self._deadlines[0][2](), heapq.heappop(self._deadlines)[3]
            if ticket is None or not self._is_open(ticket) or (name == "queue_timeout" and ticket.read_at is not None):
                continue
            doing = "its prompt had not begun to be read" if ticket.read_at is None else "it was still running"
            seconds = getattr(ticket.request, name)
            self._fail(ticket, Expired(f"{name} of {seconds:g} s is over: {doing}"), "expired")

    def _failed(self, id: int, error: BaseException) -> None:
        if id in self._tickets:
            self._fail(self._tickets[id][0], error)

    def _fail(self, ticket: Ticket, error: BaseException, reason: FinishReason = "failed") -> None:
        if not ticket.answer.settle():
            return  # cancelled just now
        if isinstance(error, RequestFailed):
            error.output = self._output(ticket, ticket.samples[0], reason)
        self._close(ticket, reason)
        ticket.answer.fail(error)

    def _close(self, ticket: Ticket, reason: FinishReason) -> None:
        """Forget a ticket, and end what still runs of it."""
        if not self._is_open(ticket):
            return
        for sample in ticket.samples:
            if self._tickets.pop(sample.sequence.id, None) and sample.sequence.ended is None:
                self._end(sample.sequence, reason)
        if events.observed():
            sequence, tokens = ticket.samples[0].sequence, sum(len(sample.tokens) for sample in ticket.samples)
            marks = events.Marks(ticket.submitted, time.perf_counter(), ticket.read_at, tuple(ticket.chunks),
                                 tuple(tuple(sample.drawn) for sample in ticket.samples), ticket.detokenised)
            events.emit(events.RequestEnded(sequence.id, reason, sequence.prompt, tokens, self.model, sequence.reused,
                                            sampling=ticket.request.sampling, tag=ticket.tag, marks=marks))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        try:
            self.end(sequence, reason)
        except Closed:
            pass  # the engine ends everything by itself

    def _hear(self, news: News) -> None:
        for sequence in news.began:
            if sequence.id in self._tickets:
                ticket = self._tickets[sequence.id][0]
                ticket.read_at = ticket.read_at or news.at
        if news.chunks is not None:
            self._note(news.chunks, news.at)
        if news.read:
            sequence, start, arrays = news.read
            self._guard(sequence.id, lambda ticket, _: self._read(ticket, start, arrays))
        for sequence, token, reason in news.drawn:
            told = news.logprobs and news.logprobs.get(sequence.id)
            self._guard(sequence.id, self._add, token, reason, told, news.at)

    def _note(self, chunks: Chunks, at: float) -> None:
        """When chunks of prompts were read. One from which nothing is drawn is waited for here: what is told of later
        steps cannot have come before."""
        if chunks.logits_RV is not None:
            with suppress(Exception):  # its step has failed: the engine tells whom it was for
                chunks.logits_RV.block_until_ready()
            at = time.perf_counter()
        for id, tokens in chunks.tokens:
            if id in self._tickets:
                self._tickets[id][0].chunks.append((chunks.began, at, tokens))

    def _guard(self, id: int, act: Callable[..., None], *args: Any) -> None:
        """A tokenizer or a callback that fails harms its own request only."""
        found = self._tickets.get(id)
        if found is None or found[0].answer.cancelled():  # what was drawn before the engine hears of it is for nobody
            return
        try:
            act(*found, *args)
        except BaseException as error:  # sys.exit() in a callback as well
            if found[0].answer.done():  # a done callback's: its request has ended
                events.report()
            else:
                self._fail(found[0], error)

    def _read(self, ticket: Ticket, start: int, arrays: Any) -> None:
        prompt, most = ticket.prompt, ticket.request.sampling.prompt_logprobs
        if most is None:
            sum_D, last_D = arrays
            ticket.pooled = [sum_D + (ticket.pooled[0] if ticket.pooled and start else 0), last_D]  # 0: read again
            return
        for t in range(min(len(arrays.chosen), len(prompt) - 1 - start)):
            ticket.scores[start + t + 1] = _logprob(arrays, t, prompt[start + t + 1], most)

    def _add(self, ticket: Ticket, sample: Sample, token: int | None, reason: FinishReason | None, told: Any,
             at: float) -> None:
        text = ""
        if token is not None:
            sample.first_at = sample.first_at or at
            self.first = self.first or (ticket.submitted, at)
            sample.tokens.append(token)
            most = sample.sequence.sampling.logprobs
            if most is not None:
                sample.logprobs.append(_logprob(told[0], told[1], token, most))
            watched = events.observed()
            began = time.perf_counter() if watched else 0.0
            if reason != "stop" or token not in sample.sequence.stops:
                text = sample.text.push(token)
            if watched:
                sample.drawn.append(at)
                ticket.detokenised += time.perf_counter() - began
        show, stopped = sample.add(text)
        if reason and not stopped:
            more, stopped = sample.add(sample.text.finish(), final=True)
            show += more
        self._show(ticket, sample, show, "stop" if stopped else reason)

    def _show(self, ticket: Ticket, sample: Sample, text: str, reason: FinishReason | None) -> None:
        if not text and reason is None:
            return
        if sample.echo:
            text, sample.echo = sample.echo + text, ""
        sample.shown.append(text)
        output = None
        if reason is not None:
            sample.output = self._output(ticket, sample, reason)
            if all(s.output is not None for s in ticket.samples):
                output = ticket.samples[0].output
                assert output is not None
                if len(ticket.samples) > 1:
                    output = replace(output, samples=tuple(s.output for s in ticket.samples))  # type: ignore[misc]
        tokens, logprobs = tuple(sample.tokens[sample.told:]), None
        if sample.logprobs:
            logprobs = tuple(sample.logprobs[sample.told:])
        sample.told += len(tokens)
        piece = Piece(text, tokens, output, sample.index, reason, logprobs)
        if output is not None and not ticket.answer.settle():
            return  # cancelled just now
        ticket.answer.show(piece)
        if output is not None:
            self._close(ticket, output.finish_reason)  # first: who has the Output may abandon the request
        elif reason is not None:
            del self._tickets[sample.sequence.id]
            if sample.sequence.ended is None:
                self._end(sample.sequence, reason)
        ticket.answer.deliver(piece)

    def _output(self, ticket: Ticket, sample: Sample, reason: FinishReason) -> Output:
        end, start = time.perf_counter(), ticket.submitted
        read, first = ticket.read_at or end, sample.first_at or end
        times = Timings(read - start, first - start, end - start, len(sample.tokens))
        sampling, prompt = ticket.request.sampling, ticket.prompt
        scores = None
        if sampling.prompt_logprobs is not None:
            scores = tuple(ticket.scores.get(i) for i in range(len(prompt)))
        logprobs = tuple(sample.logprobs) if sampling.logprobs is not None else None
        return Output(prompt, "".join(sample.shown), tuple(sample.tokens), reason, times, logprobs, scores, (),
                      sample.sequence.reused, sample.sequence.version)


def _logprob(arrays: Any, row: int, token: int, most: int) -> Logprob:
    top = zip(arrays.top_tokens[row, :most].tolist(), arrays.top[row, :most].tolist(), strict=True)
    return Logprob(token, float(arrays.chosen[row]), int(arrays.rank[row]), tuple(top))
