"""The token scheduler: `plan` decides rows and pages from host data, `commit` applies what the device drew.

No array library in sight. A plan is made while the one before it still runs, so tokens that are being drawn are
planned as -1: the device finds them by the row's slot. A page freed by a commit is reused only by steps that are
dispatched later, which the device runs later.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate, compress
from operator import attrgetter, eq
from typing import Literal, NamedTuple

from jaxinfer.request import FinishReason, Sampling, Sequence
from jaxinfer.scheduler.fit import fit
from jaxinfer.scheduler.lower import Move
from jaxinfer.scheduler.pages import PageGroup
from jaxinfer.scheduler.prefix import PrefixTree

AGEING = 10.0  # seconds of waiting that make up for one level of priority
BY_ORDER = attrgetter("order")


class Began(NamedTuple):
    """A sequence that was given a slot: what the device keeps per slot starts from these `tokens`."""

    sequence: int
    slot: int
    tokens: tuple[int, ...]
    prompt: int
    sampling: Sampling


@dataclass(slots=True)
class Plan:
    """A step, in columns: row r reads `lens[r]` of the flat `tokens` at positions `starts[r]`, `starts[r]` + 1, ...

    `draws[r]`: the step draws the token after the row's last one; `prompts[r]` tokens of the row are its prompt. First
    come the `singles` rows that read one token each (decode), then the prompt chunks. Before the step, `moves` are
    made, in order, and `pages` (group, slot, index, page) enter the tables; `began` are new in their slots. A plan of
    several `steps` draws that many tokens for each of its rows. The single rows in `turns` fill a page, or draw their
    last token. `task` is what its prompts are read for. All rows run on one `version` of the weights.

    A decode step of the same rows as the one before has the same list objects in the columns that stay the same.
    """

    number: int
    singles: int = 0
    steps: int = 1
    task: Literal["draw", "score", "embed"] = "draw"
    ids: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lens: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    draws: list[bool] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    pages: list[tuple[str, int, int, int]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    began: list[Began] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    version: int = 0

    @property
    def counts(self) -> list[int]:
        """How many tokens each row's sequence has drawn before."""
        return [start + n - prompt for start, n, prompt in zip(self.starts, self.lens, self.prompts, strict=True)]

    def only(self, rows: list[int]) -> Plan:
        """The same step with some of its rows; whoever was let in without being in a row stays."""
        ends = list(accumulate(self.lens))
        pick = lambda column: [column[r] for r in rows]
        ids = pick(self.ids)
        out = set(self.ids) - set(ids)
        return replace(
            self, singles=sum(r < self.singles for r in rows), ids=ids, slots=pick(self.slots),
            turns=[i for i, r in enumerate(rows) if r in self.turns],
            starts=pick(self.starts), lens=pick(self.lens), draws=pick(self.draws), prompts=pick(self.prompts),
            tokens=[token for r in rows for token in self.tokens[ends[r] - self.lens[r]: ends[r]]],
            began=[began for began in self.began if began.sequence not in out],
        )


# What a commit did to a sequence: a token drawn (None: none was asked for), and how it ended, if it did. A token below
# zero could not be drawn: the sequence has failed. A plain tuple: naming its parts takes longer than all the rest.
Drawn = tuple[Sequence, int | None, FinishReason | None]


class Scheduler:
    """Continuous batching over `max_rows` slots and a pool of pages per state group.

    A step reads at most `budget` tokens, at most `chunk` of one prompt, and carries at most `chunks` prompt chunks
    beside its decode rows (None: any number). With `chunks=0` a step is one prompt chunk or all decode; one that reads
    a prompt is followed by one that decodes, so no decoding row waits for more than one chunk. Waiting sequences enter
    by `order`: first in, first out within a level of priority, and levels age. Under page pressure the youngest
    gives its pages back and is read again later, as far as nobody has taken what the prefix tree kept of it.

    Steps that read prompts are padded to `rungs`: of their prompts' tokens, or of all tokens where any number of chunks
    goes; one more step costs as much as `again` tokens (`fit`). `host` and `disk` are the pages of each group that are
    kept there once the device has no room for them (`Lower`).
    """

    def __init__(self, groups: Iterable[PageGroup], *, max_rows: int, chunk: int, budget: int | None = None,
                 chunks: int | None = 0, rungs: Iterable[int] = (), again: int = 0,
                 host: Mapping[str, int] | None = None, disk: Mapping[str, int] | None = None):
        self.groups = tuple(groups)
        self.below = {"host": host, "disk": disk}
        self.tree = PrefixTree(self.groups, host, disk)
        self.max_rows, self.chunk, self.chunks = max_rows, chunk, chunks
        self.budget = budget or (max(chunk, max_rows) if chunks == 0 else chunk + max_rows)
        self.prompts = max_rows if chunks is None else max(1, chunks)  # that one step may read
        self.rungs, self.again = tuple(sorted(rungs)), again
        assert self.budget >= max_rows, f"a budget of {self.budget} tokens is too small for {max_rows} rows"
        self.waiting: list[Sequence] = []  # both by order
        self.running: list[Sequence] = []
        self.reading: list[Sequence] = []  # those running that have more than one token to read
        self.sequences: dict[int, Sequence] = {}
        self.slots = list(range(max_rows - 1, -1, -1))
        self.steps = self.preempted = self.read = self.reused = 0
        self.version = 1  # of the weights that whoever begins now runs on
        self.versions: Counter[int] = Counter()  # of those running
        self._turned: dict[int, tuple[int, bool]] = {}  # the last step of each, or before it came; whether it decoded
        self.drawing = self.fancy = 0  # running sequences that draw at random, and that want more than to draw
        self.stops: Counter[int] = Counter()  # tokens at which somebody stops
        self._last: Plan | None = None
        self._decoding: list[Sequence] | None = None  # the rows of the last plan, while nobody comes or goes
        self._due: list[int] = []  # where in its sequence each of them has its next turn
        self._refused: tuple | None = None
        self._fitting: list[int] = []  # the rungs that the next step may be made to fit
        self._fetching: Sequence | None = None  # for whom pages are read from the disk

    def anew(self) -> Scheduler:
        """One like this, for which nothing runs or waits."""
        made = Scheduler(self.groups, max_rows=self.max_rows, chunk=self.chunk, budget=self.budget, chunks=self.chunks,
                         rungs=self.rungs, again=self.again, **self.below)
        made.version = self.version
        return made

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of this many tokens could run if it were alone."""
        return all(self._most(group, tokens) <= group.pages for group in self.groups)

    def _most(self, group: PageGroup, tokens: int) -> int:
        """The most pages that a sequence of `tokens` tokens ever holds at once."""
        start = max(0, tokens - self.chunk)
        return max(group.need(start, tokens), group.need(0, min(tokens, self.chunk))) + (group.window is not None)

    def submit(self, sequence: Sequence) -> None:
        self.sequences[sequence.id], sequence.version = sequence, self.version
        self.stops.update(sequence.stops)
        insort(self.waiting, sequence, key=BY_ORDER)

    def swap(self, version: int, onward: bool = False) -> None:
        """From now on sequences begin on another version of the weights. Those that have begun end on their own,
        taking turns; or go `onward` on the new one, and share no page any more: theirs are of two makes."""
        self.version = version
        for sequence in self.sequences.values():
            if not sequence.begun:
                sequence.version = version
            elif onward:
                sequence.version, sequence.namespace, sequence.node = version, None, None
        self.versions = Counter(sequence.version for sequence in self.running)
        if onward and self._turned:
            self._turned = {version: max(self._turned.values())}
        self._decoding = None

    def keep_versions(self) -> set[int]:
        """The versions of the weights that somebody runs on, or will. What is known of others' pages is forgotten:
        nobody could ask for it."""
        used = {self.version, *(sequence.version for sequence in self.sequences.values())}
        for space in self.tree.namespaces:
            if space[0] not in used:
                self.tree.forget(space)
        return used

    def cancel(self, id: int, reason: FinishReason = "cancelled") -> Sequence | None:
        """End a sequence now, wherever it is; None if it had ended already."""
        sequence = self.sequences.get(id)
        if sequence:
            self._end(sequence, reason)
        return sequence

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until somebody comes, or what is read from the disk does."""
        first = self.waiting[0] if self.waiting else None
        return not self.sequences or (not self.running and first is not None and first is self._fetching)

    def plan(self, steps: int = 1, ready: Container[int] = ()) -> Plan | None:
        """The next step, or None when there is nothing to do (until a commit or a submission); `moves` may be left to
        be made even then. `steps` > 1 asks for as many decode steps in one, which is granted when nobody waits and
        every row will draw so many tokens. `ready` are the rungs that a step may be made to fit."""
        plan = Plan(self.steps + 1)
        self._fitting = [size for size in self.rungs if size in ready]
        self._index_prompts()
        self._admit(plan)
        for plan.version in self._turns():
            self._fill(plan, steps)
            if plan.ids:
                self.steps, self._last = plan.number, plan
                self._turned[plan.version] = plan.number, plan.singles > 0
                plan.moves = self.moves()
                return plan
        return None

    def moves(self) -> list[Move]:
        """What is to be moved, which is told once."""
        moves = list(self.tree.moves)
        self.tree.moves.clear()
        return moves

    def arrived(self, group: str, there: int, slot: int) -> None:
        """A page has been read from its place on the disk to one on the host, or cannot be: then the disk is closed."""
        assert self.tree.lower is not None
        self.tree.lower.arrived(group, there, slot)
        if not self.tree.lower.reading:
            self._fetching = None

    def _turns(self) -> list[int]:
        """The versions of those running, the one whose turn is the longest ago first."""
        return sorted(self.versions, key=self._turned.__getitem__)

    def _fill(self, plan: Plan, steps: int) -> None:
        first = next((s for s in self.reading if s.version == plan.version), None)
        if self.chunks != 0 and not (first and first.task != "draw"):
            if first:  # its pages first: no row that is in the plan already can be preempted for them
                self._reserve(plan, first, min(first.unread, self.chunk), preempt=True)
            self._decode(plan, self._together(steps))
            self._read(plan)
        else:  # steps of one kind: they take turns
            _, decoded = self._turned.get(plan.version, (0, False))  # none if it has lost all its pages just now
            if decoded:
                self._read(plan)
            if not plan.ids:
                self._decode(plan, self._together(steps))
            if not plan.ids:
                self._read(plan)

    # Admission.

    def _admit(self, plan: Plan) -> None:
        """Let the first in the queue in, as long as there is budget for more than is being read already."""
        while self.waiting and self.slots:
            if len(self.reading) >= self.prompts or sum(s.unread for s in self.reading) >= self.budget:
                break
            if not self._enter(plan, self.waiting[0]):
                break

    def _enter(self, plan: Plan, sequence: Sequence) -> bool:
        """Give a sequence a slot if there are pages for all it has to read and one page more."""
        if sequence.total > len(sequence.tokens):
            return False  # it was preempted, and a token of its is still being drawn
        if sequence.after and sequence.after.ended is None and sequence.after.known < sequence.prompt - 1:
            return False
        room = (sequence.id, len(self.running), *(self.tree.obtainable(group.name) for group in self.groups))
        if room == self._refused:
            return False
        match, shares = None, sequence.namespace is not None and sequence.task == "draw"
        if shares and self.tree.lower and self._fetch(sequence):
            return False
        if shares:
            match = self.tree.match(sequence.space, sequence.tokens, len(sequence.tokens) - 1)
        if match and match.copies and not all(self.tree.obtainable(group.name) for group in self.groups):
            self._forget(match)  # the one page left is that to be copied
            match = None
        if self.running and not self._room(sequence, match):
            self._forget(match)
            self._refused = room
            return False
        self._refused = None
        self.waiting.pop(0)
        self._place(plan, sequence, match)
        return True

    def _room(self, sequence: Sequence, match) -> bool:
        shared = lambda group: sum(page is not None for page in match.pages[group.name]) if match else 0
        needed = lambda group: self._most(group, len(sequence.tokens)) + 1 - shared(group)
        return all(self.tree.obtainable(group.name) >= needed(group) for group in self.groups)

    def _forget(self, match) -> None:
        if match:
            self.tree.give_up(match)

    def _fetch(self, sequence: Sequence) -> bool:
        """Whether a sequence waits for pages from the disk, of which it is asked once."""
        if self._fetching is None and not sequence.fetched:
            sequence.fetched = True
            if self.tree.fetch(sequence.space, sequence.tokens, len(sequence.tokens) - 1):
                self._fetching = sequence
        return self._fetching is sequence

    def _place(self, plan: Plan, sequence: Sequence, match) -> None:
        """Give a sequence its slot, and the pages whose contents are known already."""
        slot = sequence.slot = self.slots.pop()
        self._decoding = None
        sequence.pages = {group.name: [] for group in self.groups}
        insort(self.running, sequence, key=BY_ORDER)
        self.versions[sequence.version] += 1
        self._turned.setdefault(sequence.version, (self.steps, False))  # behind those that wait already
        self.drawing += sequence.sampling.temperature > 0
        self.fancy += not sequence.plain
        plan.began.append(Began(sequence.id, slot, tuple(sequence.tokens), sequence.prompt, sequence.sampling))
        sequence.node, sequence.indexed, sequence.known = None, 0, 0
        if len(sequence.tokens) > sequence.prompt:
            sequence.task = "draw"  # what its prompt was to be read for was told with its first token
        if match and match.again:
            self.tree.lower.decline(match.again)  # type: ignore[union-attr]
        if match and match.length:
            self.tree.bring(match)
            sequence.node = match.node
            for name, held in match.pages.items():
                sequence.pages[name] = held
                plan.pages.extend((name, slot, i, page) for i, page in enumerate(held) if page is not None)
                sequence.indexed = len(held) * self.tree.page_size
            self._copy(plan, sequence, match)
            sequence.read = sequence.known = match.length
            if len(sequence.tokens) == sequence.prompt:  # no resumption
                sequence.reused = match.length
                self.reused += match.length
        if _reads(sequence):
            insort(self.reading, sequence, key=BY_ORDER)

    def _copy(self, plan: Plan, sequence: Sequence, match) -> None:
        """A match that ends inside a page is copied into one of the sequence's own: its owner may still write behind
        it."""
        for name, source in match.copies:
            own, held = self.tree.take(name), sequence.pages[name]
            plan.pages.append((name, sequence.slot, len(held), own))  # type: ignore[arg-type]
            self.tree.moves.append(("copy", name, source, own))  # type: ignore[arg-type]
            held.append(own)
            self.tree.release(name, (source,))

    # Reading prompts.

    def _read(self, plan: Plan) -> None:
        """Add prompt chunks to the plan, in order, as far as its size and its kind allow."""
        size = self._size(plan)
        for sequence in tuple(self.reading):
            budget = size - len(plan.tokens)
            if budget <= 0:
                break
            if sequence.task != "draw" and plan.ids:
                break
            count = min(sequence.unread, self.chunk, budget)
            if sequence.version != plan.version or sequence.slot is None:
                continue
            if not self._reserve(plan, sequence, count, preempt=not plan.ids):
                continue
            self._row(plan, sequence, count)
            if sequence.task != "draw":
                plan.task = sequence.task
                break

    def _size(self, plan: Plan) -> int:
        """How many tokens the step should have, beside its decode rows those of prompts: as many as there are, or fewer
        that fill a rung. Only rungs that are ready are filled, and none in place of one that has yet to be compiled."""
        rows, mine = len(plan.tokens), [s for s in self.reading if s.version == plan.version and s.slot is not None]
        if not mine or mine[0].task != "draw":
            return self.budget
        padded = rows if self.chunks is None else 0  # of the decode rows, those that a rung counts
        wanted = padded + min(sum(min(s.unread, self.chunk) for s in mine), self.budget - rows)
        own = next((size for size in self.rungs if size >= wanted), None)
        if own not in self._fitting:
            return self.budget
        fitted = fit(wanted, self._fitting, self.again)
        return rows + fitted - padded if fitted > padded else self.budget

    def _row(self, plan: Plan, sequence: Sequence, count: int) -> None:
        start, end = sequence.read, sequence.read + count
        known = sequence.tokens[start:end]
        draws = end == sequence.total and end < sequence.most
        plan.tokens.extend(known)
        plan.tokens.extend(-1 for _ in range(count - len(known)))
        plan.ids.append(sequence.id)
        plan.slots.append(sequence.slot)  # type: ignore[arg-type]
        plan.starts.append(start)
        plan.lens.append(count)
        plan.draws.append(draws)
        plan.prompts.append(sequence.prompt)
        sequence.read = end
        if not _reads(sequence):
            self.reading.remove(sequence)
        sequence.total += draws
        self.read += count

    def _index_prompts(self) -> None:
        """The prompt pages that the last plan filled are known from now on: a step that looks at them runs later."""
        last = self._last
        for id in last.ids[last.singles:] if last else ():
            sequence = self.sequences.get(id)
            if sequence and sequence.slot is not None:
                self._index(sequence, tail=sequence.read >= sequence.prompt - 1)

    def _index(self, sequence: Sequence, tail: bool) -> None:
        """Tell the prefix tree what the sequence's pages hold: the full ones, and with `tail` the last one as well."""
        if sequence.namespace is None:
            sequence.known = min(sequence.read, len(sequence.tokens))
            return
        tree, size = self.tree, self.tree.page_size
        upto = min(sequence.read, len(sequence.tokens))
        while sequence.indexed + size <= upto:
            start = sequence.indexed
            pages = {name: held[start // size] for name, held in sequence.pages.items()}
            tokens = tuple(sequence.tokens[start:start + size])
            sequence.node = tree.extend(sequence.node, sequence.space, tokens, pages)
            sequence.indexed = start + size
        if tail and upto > sequence.indexed:
            pages = {name: held[sequence.indexed // size] for name, held in sequence.pages.items()}
            tree.extend(sequence.node, sequence.space, tuple(sequence.tokens[sequence.indexed:upto]), pages)
        sequence.known = upto if tail else sequence.indexed

    # Decoding.

    def _together(self, steps: int) -> int:
        """How many decode steps may go in one call: `steps`, or 1 if somebody waits, reads, ends sooner, wants more
        than to draw, or would have to take a page from another."""
        if steps == 1 or self.waiting or self.reading or not self.running or len(self.versions) > 1:
            return 1
        if not all(s.plain and s.read + 1 == s.total and s.total + steps <= s.most for s in self.running):
            return 1
        most = len(self.running) * ((steps - 1) // self.tree.page_size + 1)
        return steps if all(self.tree.obtainable(group.name) >= most for group in self.groups) else 1

    def _decode(self, plan: Plan, steps: int) -> None:
        """A row for everyone who has one token to read and wants another."""
        size, rows = self.tree.page_size, self._decoding
        turning = [rows[r] for r in self._last.turns] if rows and self._last else []
        if steps == 1 and rows and all(s.total < s.most for s in turning):
            opening = turning
        else:
            rows = [s for s in self.running
                    if s.total - s.read == 1 and s.total < s.most and (s.read >= s.prompt or s.task == "draw")
                    and s.version == plan.version]
            opening, self._decoding = [s for s in rows if -s.read % size < steps], None
        staying = len(self.running)
        for s in opening:
            if s.slot is not None:  # else an older one took its pages just now
                self._reserve(plan, s, steps, preempt=True)
        if len(self.running) < staying:
            rows = [s for s in rows if s.slot is not None]
        if rows is self._decoding:
            self._decode_on(plan, rows)
        else:
            self._decode_anew(plan, rows, steps)
        for s in rows:
            s.read += steps
            s.total += steps

    def _decode_anew(self, plan: Plan, rows: list[Sequence], steps: int) -> None:
        size = self.tree.page_size
        plan.singles, plan.steps, plan.lens, plan.draws = len(rows), steps, [1] * len(rows), [True] * len(rows)
        plan.ids = [s.id for s in rows]
        plan.slots = [s.slot for s in rows]  # type: ignore[misc]
        plan.starts = [s.read for s in rows]
        plan.prompts = [s.prompt for s in rows]
        plan.tokens = [s.tokens[s.read] if s.read < len(s.tokens) else -1 for s in rows]
        due = [min(s.read + -(s.read + 1) % size, s.most - 2) for s in rows]
        plan.turns = list(compress(range(len(rows)), map(eq, plan.starts, due)))
        if steps == 1 and rows and not self.reading and len(self.versions) == 1:
            self._decoding, self._due = rows, due
            self._next_turns(plan)

    def _decode_on(self, plan: Plan, rows: list[Sequence]) -> None:
        """The same rows as before, each one token further."""
        last = self._last
        assert last is not None
        plan.singles, plan.ids, plan.slots, plan.prompts = last.singles, last.ids, last.slots, last.prompts
        plan.lens, plan.draws, plan.tokens = last.lens, last.draws, [-1] * len(rows)
        plan.starts = [start + 1 for start in last.starts]
        plan.turns = list(compress(range(len(rows)), map(eq, plan.starts, self._due)))
        self._next_turns(plan)

    def _next_turns(self, plan: Plan) -> None:
        for r in plan.turns:
            self._due[r] = min(plan.starts[r] + self.tree.page_size, self._decoding[r].most - 2)  # type: ignore[index]

    def _reserve(self, plan: Plan, sequence: Sequence, count: int, preempt: bool) -> bool:
        """Give back the pages that no window shows any more, then make sure of pages for `count` more tokens, if need
        be and `preempt` by preempting the youngest; False if there are none, or if that was the sequence itself."""
        end = sequence.read + count
        for group in self.groups:
            held, first = sequence.pages[group.name], group.first(sequence.read)
            for i in range(min(first, len(held)) - 1, -1, -1):
                if held[i] is None:
                    break
                self.tree.release(group.name, (held[i],))
                held[i] = None
        for group in self.groups:
            name, held = group.name, sequence.pages[group.name]
            while len(held) * group.page_size < end:
                page = self.tree.take(name)
                if page is None:
                    if not preempt:
                        return False
                    youngest = self.running[-1]
                    self._preempt(youngest)
                    if youngest is sequence:
                        return False
                    continue
                plan.pages.append((name, sequence.slot, len(held), page))  # type: ignore[arg-type]
                held.append(page)
        return True

    # What became of it.

    def commit(self, plan: Plan, tokens_NR: Iterable[list[int]]) -> Iterable[Drawn]:
        """Add the drawn tokens (of each step of the plan, one per row) to their sequences; the ended ones release
        their pages. What is returned can be gone through once."""
        drawn: list[Drawn] = []
        sequences, size = self.sequences, self.tree.page_size
        for tokens_R in tokens_NR:
            if plan.steps == 1 and plan.singles == len(plan.ids):
                known = self._last is not None and plan.ids is self._last.ids
                rows = self._decoding if known and self._decoding else list(map(sequences.get, plan.ids))
                if None not in rows and min(tokens_R) >= 0 and self.stops.keys().isdisjoint(tokens_R):
                    return self._commit_quietly(plan, rows, tokens_R)  # type: ignore[arg-type]
            for id, draws, token in zip(plan.ids, plan.draws, tokens_R, strict=True):
                s = sequences.get(id)
                if s is None:
                    continue
                if not draws:
                    r = plan.ids.index(id)
                    if plan.starts[r] + plan.lens[r] == s.most:  # read to the end, and nothing is to be drawn
                        self._end(s, "length")
                        drawn.append((s, None, "length"))
                    continue
                tokens, reason = s.tokens, None
                if token < 0:
                    reason = "failed"
                    if not s.sampling.edits and s.namespace is not None:
                        self.tree.forget(s.space)  # its pages may be what spoiled its logits
                else:
                    tokens.append(token)
                    count = len(tokens)
                    if token in s.stops:
                        reason = "stop"
                    elif count >= s.most:
                        reason = "length"
                    elif count % size == 1:
                        self._index(s, tail=False)
                if reason:
                    self._end(s, reason)
                drawn.append((s, token, reason))
        return drawn

    def _commit_quietly(self, plan: Plan, rows: list[Sequence], tokens_R: list[int]) -> Iterable[Drawn]:
        """A decode step in which nobody stops: looked at are only those whose turn it is to end or to fill a page."""
        for s, token in zip(rows, tokens_R, strict=True):
            s.tokens.append(token)
        reasons: list[FinishReason | None] = [None] * len(rows)
        for r in plan.turns:
            if len(rows[r].tokens) >= rows[r].most:
                reasons[r] = "length"
                self._end(rows[r], "length")
            else:
                self._index(rows[r], tail=False)
        return zip(rows, tokens_R, reasons, strict=True)

    def rewind(self, failed: Plan | None = None) -> list[Sequence]:
        """The device's state is lost: every running sequence is read again from its committed tokens.

        Sequences of the failed plan that had failed before end as "failed" and are returned.
        """
        ended = []
        for id in failed.ids if failed else ():
            sequence = self.sequences.get(id)
            if sequence is None:
                continue
            sequence.failures += 1
            if sequence.failures > 1:
                self._end(sequence, "failed")
                ended.append(sequence)
        for sequence in tuple(self.running):
            self._leave(sequence)
            insort(self.waiting, sequence, key=BY_ORDER)
        for sequence in self.waiting:
            sequence.total, sequence.known = len(sequence.tokens), 0
        self.tree.clear()
        self._last = self._refused = self._fetching = None
        return ended

    def _preempt(self, sequence: Sequence) -> None:
        self._index(sequence, tail=True)
        self._leave(sequence)
        insort(self.waiting, sequence, key=BY_ORDER)
        self.preempted += 1

    def _leave(self, sequence: Sequence) -> None:
        self._decoding = None
        self.running.remove(sequence)
        self.versions[sequence.version] -= 1
        if not self.versions[sequence.version]:
            del self.versions[sequence.version]
            del self._turned[sequence.version]
        self.drawing -= sequence.sampling.temperature > 0
        self.fancy -= not sequence.plain
        if sequence in self.reading:
            self.reading.remove(sequence)
        for name, pages in sequence.pages.items():
            self.tree.release(name, pages)
        sequence.pages, sequence.node, sequence.indexed, sequence.read = {}, None, 0, 0
        self.slots.append(sequence.slot)  # type: ignore[arg-type]
        sequence.slot = None

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.ended = reason
        del self.sequences[sequence.id]
        self.stops -= Counter(sequence.stops)
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        if reason != "failed":
            self._index(sequence, tail=True)
        self._leave(sequence)


def _reads(sequence: Sequence) -> bool:
    """Whether it has a prompt (or what it lost) to read: more than the one token of a decoding row, or a last one
    that is read for its own sake."""
    last = sequence.read < sequence.prompt and (sequence.task != "draw" or sequence.most == sequence.prompt)
    return sequence.unread > (0 if last else 1)
