"""From tokens to text, on a thread of its own: detokenise, look for stop strings, hand pieces to whoever waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from jaxinfer import events
from jaxinfer.errors import Closed
from jaxinfer.frontend.tokenizer import TextStream, Tokenizer
from jaxinfer.request import FinishReason, Output, Piece, Sequence, Timings
from jaxinfer.runtime.engine import News

Deliver = Callable[[Piece | BaseException], object]


@dataclass
class Ticket:
    """One request's way back: its text so far, and `deliver`, which is called with each Piece in order, the last one
    carrying the Output, or with an exception. It is called from the delivery thread and must not block."""

    sequence: Sequence
    text: TextStream
    deliver: Deliver
    submitted: float
    shown: list[str] = field(default_factory=list)
    held: str = ""  # text that a stop string may yet swallow
    tokens: list[int] = field(default_factory=list)
    fresh: list[int] = field(default_factory=list)  # tokens since the last piece
    read_at: float | None = None
    first_at: float | None = None

    def add(self, text: str, final: bool = False) -> tuple[str, bool]:
        """Text that may be shown now, and whether a stop string was found (then nothing follows)."""
        self.held += text
        stops = self.sequence.sampling.stop
        found = min((at for stop in stops if (at := self.held.find(stop)) >= 0), default=None)
        if found is not None:
            show, self.held = self.held[:found], ""
            return show, True
        keep = 0 if final else max((_overlap(self.held, stop) for stop in stops), default=0)
        show, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep:]
        return show, False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins.

    >>> _overlap("a b", "bc")
    1
    """
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Delivery:
    """Owns the tickets of one model. `cancel(id, reason)`, to be set, is the engine's: it ends a sequence whose text
    ran into a stop string."""

    cancel: Callable[[int, FinishReason], None]

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._tickets: dict[int, Ticket] = {}
        self._news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        self.tell = self._news.put
        self._thread = threading.Thread(target=self._loop, name="jaxinfer-delivery", daemon=True)
        self._thread.start()

    def expect(self, sequence: Sequence, deliver: Deliver) -> None:
        """Open a ticket; call it before the sequence is submitted."""
        now = time.perf_counter()
        self._tickets[sequence.id] = Ticket(sequence, self._tokenizer.stream(), deliver, now)

    def abandon(self, id: int) -> None:
        """End a request whose caller has gone; nothing is delivered any more."""
        ticket = self._tickets.get(id)
        if ticket:
            self._leave(ticket, "cancelled")

    def close(self) -> None:
        self._news.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _loop(self) -> None:
        while (news := self._news.get()) is not None:
            ticket = self._tickets.get(news.sequence.id)
            if ticket is None:
                continue
            try:
                self._handle(ticket, news)
            except Exception as error:  # a tokenizer or a callback that fails harms its own request only
                self._fail(ticket, error)

    def _fail(self, ticket: Ticket, error: BaseException) -> None:
        self._leave(ticket, "failed")
        try:
            ticket.deliver(error)
        except Exception:
            pass  # the callback is what failed

    def _leave(self, ticket: Ticket, reason: FinishReason) -> None:
        """Close a ticket, and end its sequence if it still runs."""
        if self._tickets.pop(ticket.sequence.id, None) is None:
            return
        if ticket.sequence.ended is None:
            try:
                self.cancel(ticket.sequence.id, reason)
            except Closed:
                pass  # the engine ends everything by itself
        sequence = ticket.sequence
        events.emit(events.RequestEnded(sequence.id, reason, sequence.prompt, len(ticket.tokens)))

    def _handle(self, ticket: Ticket, news: News) -> None:
        if news.error is not None:
            self._fail(ticket, news.error)
            return
        if news.token is None and news.ended is None:
            ticket.read_at = ticket.read_at or news.at
            return
        text, reason = "", news.ended
        if news.token is not None:
            ticket.first_at = ticket.first_at or news.at
            ticket.tokens.append(news.token)
            ticket.fresh.append(news.token)
            if news.token not in ticket.sequence.stops:
                text = ticket.text.push(news.token)
        show, stopped = ticket.add(text)
        if reason and not stopped:
            more, stopped = ticket.add(ticket.text.finish(), final=True)
            show += more
        self._show(ticket, show, "stop" if stopped else reason)

    def _show(self, ticket: Ticket, text: str, reason: FinishReason | None) -> None:
        if text:
            ticket.shown.append(text)
        if reason is None:
            if text:
                ticket.deliver(Piece(text, tuple(ticket.fresh)))
                ticket.fresh.clear()
            return
        end, start = time.perf_counter(), ticket.submitted
        read, first = ticket.read_at or end, ticket.first_at or end
        times = Timings(read - start, first - start, end - start, len(ticket.tokens))
        prompt = tuple(ticket.sequence.tokens[: ticket.sequence.prompt])
        output = Output(prompt, "".join(ticket.shown), tuple(ticket.tokens), reason, times)
        self._leave(ticket, reason)  # first: who has the Output abandons the request, which would call it cancelled
        ticket.deliver(Piece(text, tuple(ticket.fresh), output))
