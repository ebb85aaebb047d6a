"""The token scheduler: `plan` decides rows and pages from host data, `commit` applies what the device drew.

No array library in sight. A plan is made while the one before it still runs, so tokens that are being drawn are
planned as -1: the device finds them by the row's slot. A page freed by a commit is reused only by steps that are
dispatched later, which the device runs later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from jaxinfer.request import FinishReason, Sampling, Sequence
from jaxinfer.scheduler.pages import PageGroup, Pool


@dataclass(frozen=True)
class Row:
    """One sequence's part of a step: read `tokens` at positions `start`, `start + 1`, ...

    `pages` are the pages new to the row's table, per group: (index in the table, page). With `draws`, the step
    draws the sequence's `count`-th token from the logits of the row's last position.
    """

    sequence: int
    slot: int
    start: int
    tokens: tuple[int, ...]
    pages: dict[str, tuple[tuple[int, int], ...]]
    draws: bool
    count: int
    sampling: Sampling


@dataclass(frozen=True)
class Plan:
    """A step: either one row that reads a chunk of its prompt, or rows that read one token each."""

    number: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Drawn:
    """A token that a commit added to a sequence, and how the sequence ended, if it did."""

    sequence: Sequence
    token: int
    ended: FinishReason | None


class Scheduler:
    """Continuous batching over `max_rows` slots and a pool of pages per state group.

    `chunk` is the most tokens of a prompt that one step reads. Prompts are read in the order of arrival; a step that
    reads a prompt is followed by one that decodes, so no decoding row waits for more than one chunk. Under page
    pressure the youngest sequence gives its pages back and is read again later.
    """

    def __init__(self, groups: Iterable[PageGroup], *, max_rows: int, chunk: int):
        self.groups = tuple(groups)
        self.pools = {group.name: Pool(group.pages) for group in self.groups}
        self.max_rows, self.chunk = max_rows, chunk
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self.sequences: dict[int, Sequence] = {}
        self.slots = list(range(max_rows - 1, -1, -1))
        self.steps = 0
        self.preempted = 0
        self._read_prompt = False

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens could run if it were alone."""
        return all(self._most(group, tokens) <= group.pages for group in self.groups)

    def _most(self, group: PageGroup, tokens: int) -> int:
        """The most pages that a sequence of `tokens` tokens ever holds at once."""
        start = max(0, tokens - self.chunk)
        return max(group.need(start, tokens), group.need(0, min(tokens, self.chunk))) + (group.window is not None)

    def submit(self, sequence: Sequence) -> None:
        self.sequences[sequence.id] = sequence
        self.waiting.append(sequence)

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> Sequence | None:
        """End a sequence now, wherever it is; None if it had ended already."""
        sequence = self.sequences.get(id)
        if sequence:
            self._end(sequence, reason)
        return sequence

    def plan(self) -> Plan | None:
        """The next step, or None when there is nothing to do (until a commit or a submission)."""
        decoding = [s for s in self.running if s.wants and s.unread == 1]
        row = None if decoding and self._read_prompt else self._read_chunk()
        rows = (row,) if row else self._decode()
        if not rows:
            return None
        self._read_prompt = row is not None
        self.steps += 1
        return Plan(self.steps, rows)

    def _read_chunk(self) -> Row | None:
        sequence = next((s for s in self.running if s.wants and s.unread > 1), None) or self._admit()
        if sequence is None:
            return None
        count = min(sequence.unread, self.chunk)
        return self._row(sequence, count) if self._reserve(sequence, count) else None

    def _admit(self) -> Sequence | None:
        """The first waiting sequence, if there is a slot, and pages for all it has to read and one page more."""
        sequence = self.waiting[0] if self.waiting else None
        if sequence is None or not self.slots or sequence.drawing:
            return None
        tokens = len(sequence.tokens)
        if self.running and any(
            self.pools[group.name].free < self._most(group, tokens) + 1 for group in self.groups
        ):
            return None
        self.waiting.popleft()
        sequence.slot = self.slots.pop()
        sequence.pages = {group.name: [] for group in self.groups}
        at = next((i for i, s in enumerate(self.running) if s.id > sequence.id), len(self.running))
        self.running.insert(at, sequence)
        return sequence

    def _decode(self) -> tuple[Row, ...]:
        ready = lambda s: s.slot is not None and s.wants and s.unread == 1  # a reservation may preempt the youngest
        return tuple(self._row(s, 1) for s in tuple(self.running) if ready(s) and self._reserve(s, 1))

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        """Give back the pages that no window shows any more, then make sure of pages for `count` more tokens,
        preempting the youngest for them; False if that was the sequence itself."""
        end = sequence.read + count
        for group in self.groups:
            held, first = sequence.pages[group.name], group.first(sequence.read)
            for i in range(min(first, len(held)) - 1, -1, -1):
                if held[i] is None:
                    break
                self.pools[group.name].release((held[i],))
                held[i] = None
        for group in self.groups:
            held, pool = sequence.pages[group.name], self.pools[group.name]
            while len(held) * group.page_size < end:
                while not pool.free:
                    youngest = self.running[-1]
                    self._preempt(youngest)
                    if youngest is sequence:
                        return False
                held.append(pool.take())
        return True

    def _row(self, sequence: Sequence, count: int) -> Row:
        start, end = sequence.read, sequence.read + count
        known = sequence.tokens[start:end]
        tokens = (*known, *(-1 for _ in range(count - len(known))))
        new = {}
        for group in self.groups:
            held, first = sequence.pages[group.name], -(-start // group.page_size)
            new[group.name] = tuple((i, page) for i, page in enumerate(held[first:], first) if page is not None)
        draws = end == len(sequence.tokens) + sequence.drawing
        row = Row(sequence.id, sequence.slot, start, tokens, new, draws, sequence.drawn, sequence.sampling)  # type: ignore[arg-type]
        sequence.read = end
        sequence.drawing += draws
        return row

    def commit(self, plan: Plan, tokens: Iterable[int]) -> list[Drawn]:
        """Add the drawn tokens (one per row of the plan) to their sequences; the ended ones release their pages."""
        drawn = []
        for row, token in zip(plan.rows, tokens, strict=True):
            sequence = self.sequences.get(row.sequence)
            if sequence is None or not row.draws:
                continue
            sequence.drawing -= 1
            sequence.tokens.append(token)
            reason: FinishReason | None = None
            if token in sequence.stops:
                reason = "stop"
            elif len(sequence.tokens) - sequence.prompt >= sequence.sampling.max_tokens:
                reason = "length"
            if reason:
                self._end(sequence, reason)
            drawn.append(Drawn(sequence, token, reason))
        return drawn

    def rewind(self, failed: Plan | None = None) -> list[Sequence]:
        """The device's state is lost: every running sequence is read again from its committed tokens.

        Sequences of the failed plan that had failed before end as "failed" and are returned.
        """
        ended = []
        for id in [row.sequence for row in failed.rows] if failed else ():
            sequence = self.sequences.get(id)
            if sequence is None:
                continue
            sequence.failures += 1
            if sequence.failures > 1:
                self._end(sequence, "failed")
                ended.append(sequence)
        for sequence in reversed(tuple(self.running)):
            self._preempt(sequence)
        for sequence in self.waiting:
            sequence.drawing = 0
        return ended

    def _preempt(self, sequence: Sequence) -> None:
        self._leave(sequence)
        sequence.read = 0
        self.waiting.appendleft(sequence)
        self.preempted += 1

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        for name, pages in sequence.pages.items():
            self.pools[name].release(pages)
        sequence.pages = {}
        self.slots.append(sequence.slot)  # type: ignore[arg-type]
        sequence.slot = None

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.ended = reason
        del self.sequences[sequence.id]
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave(sequence)
