"""The scheduler on a make-believe device whose pages can be looked into: whatever happens to the others, and however
often a sequence loses its pages, each one draws what it would have drawn alone."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.request import Sampling, Sequence
from jaxinfer.scheduler import PageGroup, Plan, Row, Scheduler
from tests.strategies import houses

VOCAB = 1_000_000  # so many that two sequences hardly ever agree by accident


def model(*visible: list[tuple[int, int]]) -> int:
    """The next token: a hash of all (position, token) that each state group shows to the last token."""
    return int.from_bytes(hashlib.blake2b(repr(visible).encode(), digest_size=8).digest()) % VOCAB


def shown(group: PageGroup, position: int) -> range:
    """The positions that a token at `position` sees."""
    return range(0 if group.window is None else max(0, position - group.window + 1), position + 1)


def alone(groups: tuple[PageGroup, ...], prompt: list[int], max_tokens: int) -> list[int]:
    """The prompt and what the model makes of it, undisturbed."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(model(*([(q, tokens[q]) for q in shown(group, len(tokens) - 1)] for group in groups)))
    return tokens


class Device:
    """Obeys plans as the real one does: tables per slot, kept up with what each plan says is new; pages that keep
    what was last written to them; the last token drawn in each slot."""

    def __init__(self, groups: tuple[PageGroup, ...], max_rows: int):
        self.groups, self.max_rows = groups, max_rows
        self.tables = {group.name: [{} for _ in range(max_rows)] for group in groups}
        self.lose_everything()

    def lose_everything(self):
        self.pages = {group.name: [[None] * group.page_size for _ in range(group.pages)] for group in self.groups}
        self.last = [None] * self.max_rows

    def page(self, group: PageGroup, slot: int, position: int) -> int:
        return self.tables[group.name][slot][position // group.page_size]

    def run(self, plan: Plan, expected: dict[int, list[int]]) -> list[int]:
        """Write every row's tokens, then read. Raises AssertionError if a row cannot see all of its window, and
        nothing else, there; or if it looks at a page that another row of this plan writes."""
        for row in plan.rows:
            for name, new in row.pages.items():
                self.tables[name][row.slot].update(new)
        writer = self._write(plan)
        return [self._read(row, writer, expected[row.sequence]) for row in plan.rows]

    def _write(self, plan: Plan) -> dict[tuple[str, int], int]:
        writer = {}
        for row in plan.rows:
            for position, token in enumerate(row.tokens, row.start):
                token = self.last[row.slot] if token < 0 else token
                for group in self.groups:
                    page = self.page(group, row.slot, position)
                    assert writer.setdefault((group.name, page), row.sequence) == row.sequence
                    self.pages[group.name][page][position % group.page_size] = (position, token)
        return writer

    def _read(self, row: Row, writer: dict, expected: list[int]) -> int:
        for position in range(row.start, row.start + len(row.tokens)):
            visible = []
            for group in self.groups:
                pages = [self.page(group, row.slot, q) for q in shown(group, position)]
                assert {writer.get((group.name, page), row.sequence) for page in pages} == {row.sequence}
                slots = zip(pages, shown(group, position), strict=True)
                visible.append([self.pages[group.name][page][q % group.page_size] for page, q in slots])
                assert visible[-1] == [(q, expected[q]) for q in shown(group, position)]
        token = model(*visible)
        if row.draws:
            self.last[row.slot] = token
        return token


class AnyHistory(RuleBasedStateMachine):
    """Requests come, are cancelled and lose their device, in any order, on an engine that dispatches up to `ahead`
    steps before it reads back the first of them."""

    @initialize(house=houses(), ahead=st.integers(1, 3))
    def open(self, house, ahead):
        self.groups = house.groups
        self.scheduler = Scheduler(house.groups, max_rows=house.max_rows, chunk=house.chunk)
        self.device = Device(house.groups, house.max_rows)
        self.ahead, self.flying = ahead, deque[tuple[Plan, list[int]]]()
        self.all: list[Sequence] = []
        self.expected: dict[int, list[int]] = {}
        self.length: dict[int, int] = {}
        self.ended: dict[int, str] = {}
        self.begun: set[int] = set()
        self.waited: dict[int, int] = {}

    # What happens.

    @rule(prompt=st.integers(1, 16), max_tokens=st.integers(1, 24), stop_at=st.integers(0, 60))
    def submit(self, prompt, max_tokens, stop_at):
        most = next((n for n in range(max_tokens, 0, -1) if self.scheduler.fits(prompt + n)), None)
        if most is None:
            return
        id = len(self.all)
        tokens = alone(self.groups, [VOCAB + 100 * id + i for i in range(prompt)], most)
        stops = frozenset(tokens[prompt:][stop_at:stop_at + 1])
        self.expected[id], self.length[id] = tokens, prompt + min(stop_at + 1, most)
        self.all.append(Sequence(id, tokens[:prompt], prompt, Sampling(max_tokens=most), stops))
        self.scheduler.submit(self.all[-1])

    @precondition(lambda self: self.scheduler.sequences)
    @rule(times=st.integers(1, 20))
    def step(self, times):
        for _ in range(times):
            self._step()

    @precondition(lambda self: self.flying)
    @rule()
    def catch_up(self):
        self._commit()

    @precondition(lambda self: self.scheduler.sequences)
    @rule(data=st.data())
    def cancel(self, data):
        id = data.draw(st.sampled_from(sorted(self.scheduler.sequences)))
        self._end(self.scheduler.cancel(id), "cancelled")
        assert self.scheduler.cancel(id) is None, "cancelled twice"

    @precondition(lambda self: self.flying)
    @rule(dispatching=st.booleans())
    def fail(self, dispatching):
        """The step being dispatched fails, or the one being read back does."""
        self._fail(self._plan() if dispatching else self.flying[0][0])

    # What must hold.

    def _step(self):
        plan = self._plan()
        if plan:
            self.flying.append((plan, self.device.run(plan, self.expected)))
        if len(self.flying) > self.ahead or not plan:
            self._commit()

    def _plan(self) -> Plan | None:
        running = [s for s in self.scheduler.running if s.wants]
        decoding, reading = {s.id for s in running if s.unread == 1}, [s.id for s in running if s.unread > 1]
        plan = self.scheduler.plan()
        rows = plan.rows if plan else ()
        self._check_rows(rows)
        self._check_turns({row.sequence for row in rows}, decoding, reading)
        for row in rows:
            if row.sequence not in self.begun:
                assert all(s.id in self.begun for s in self.all[:row.sequence] if s.ended is None), "not in order"
            self.begun.add(row.sequence)
        return plan

    def _check_rows(self, rows: tuple[Row, ...]):
        assert len(rows) <= self.scheduler.max_rows
        assert len({row.slot for row in rows}) == len({row.sequence for row in rows}) == len(rows)
        assert all(0 < len(row.tokens) <= (self.scheduler.chunk if len(rows) == 1 else 1) for row in rows)
        for row in rows:
            sequence = self.scheduler.sequences[row.sequence]
            assert sequence.slot == row.slot < self.scheduler.max_rows
            assert row.count < sequence.sampling.max_tokens, "a step for a token that nobody asked for"
            if row.draws:
                assert row.count == row.start + len(row.tokens) - sequence.prompt

    def _check_turns(self, planned: set[int], decoding: set[int], reading: list[int]):
        """Whoever keeps its pages and could decode, or is the first with a prompt to read, does so, or waits for one
        step of the other kind."""
        first = next((id for id in reading if self.all[id].slot is not None), None)
        assert not planned & set(reading) - {first}, "an older prompt is not read to its end"
        self.waited = {id: self.waited.get(id, 0) for id in (*decoding, *reading)}  # who lost its place starts anew
        for id in self.waited:
            ready = self.all[id].slot is not None and (id in decoding or id == first)
            self.waited[id] = self.waited[id] + 1 if ready and id not in planned else 0
            assert self.waited[id] <= 1, f"{id} waited for more than one step of the other kind"
            assert planned or not ready, "nothing was planned, although a sequence could run"

    def _commit(self):
        if self.flying:
            for drawn in self.scheduler.commit(*self.flying.popleft()):
                assert drawn.token == drawn.sequence.tokens[-1] and drawn.ended == drawn.sequence.ended
                if drawn.ended:
                    self._end(drawn.sequence, drawn.ended)

    def _fail(self, plan: Plan | None):
        self.flying.clear()
        self.device.lose_everything()
        twice = {row.sequence for row in plan.rows if self.all[row.sequence].failures} if plan else set()
        ended = self.scheduler.rewind(plan)
        assert {s.id for s in ended} == twice & {s.id for s in self.all if s.ended == "failed"}
        assert all(id in self.ended or self.all[id].ended == "failed" for id in twice)
        for sequence in ended:
            self._end(sequence, "failed")

    def _end(self, sequence: Sequence, reason: str):
        assert sequence.id not in self.ended, "ended twice"
        assert sequence.ended == reason and sequence.id not in self.scheduler.sequences
        self.ended[sequence.id] = reason

    @invariant()
    def every_page_is_free_or_held_by_those_that_list_it(self):
        for group in self.groups:
            pool = self.scheduler.pools[group.name]
            listed = [page for s in self.all for page in s.pages.get(group.name, ()) if page is not None]
            assert len(listed) == len(set(listed)) == group.pages - pool.free
            assert pool.holders == [listed.count(page) for page in range(group.pages)]

    @invariant()
    def every_sequence_is_in_one_place(self):
        waiting, running = self.scheduler.waiting, self.scheduler.running
        there = sorted(s.id for s in (*waiting, *running))
        assert there == sorted(self.scheduler.sequences) == [s.id for s in self.all if s.id not in self.ended]
        assert all(s.slot is None and not s.pages and s.read == 0 for s in waiting)
        slots = [*self.scheduler.slots, *(s.slot for s in running)]
        assert sorted(slots) == list(range(self.scheduler.max_rows))

    @invariant()
    def every_token_is_the_one_it_would_be_alone(self):
        for s in self.all:
            assert s.tokens == self.expected[s.id][:len(s.tokens)] and len(s.tokens) <= self.length[s.id]

    def teardown(self):
        """Left alone, every sequence comes to its end, in about as many steps as it has tokens."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(10 + 10 * sum(map(len, self.expected.values()))):
            if not (self.scheduler.sequences or self.flying):
                break
            idle = not self.flying
            self._step()
            assert self.flying or not idle, "sequences wait, and nothing runs"
        assert not self.scheduler.sequences, "sequences starve"
        self.every_page_is_free_or_held_by_those_that_list_it()
        for s in self.all:
            if self.ended[s.id] in ("stop", "length"):
                assert len(s.tokens) == self.length[s.id]
                assert self.ended[s.id] == ("stop" if s.tokens[-1] in s.stops else "length")


class TestAnyHistory(AnyHistory.TestCase):
    settings = settings(max_examples=10 * settings().max_examples, stateful_step_count=40)


@pytest.mark.long
class TestMoreHistories(AnyHistory.TestCase):
    settings = settings(stateful_step_count=100)


def begin(scheduler: Scheduler, id: int, prompt: int, **options) -> Sequence:
    sequence = Sequence(id, list(range(prompt)), prompt, Sampling(**options))
    scheduler.submit(sequence)
    return sequence


def finish(scheduler: Scheduler) -> list[Plan]:
    """Run to the end, one step at a time; what is drawn does not matter."""
    plans = []
    while plan := scheduler.plan():
        scheduler.commit(plan, [0] * len(plan.rows))
        plans.append(plan)
    return plans


@given(page_size=st.integers(1, 4), window=st.one_of(st.none(), st.integers(1, 9)), chunk=st.integers(1, 9),
       prompt=st.integers(1, 30), max_tokens=st.integers(1, 30))
@settings(max_examples=200)
def test_a_sequence_that_fits_comes_to_its_end_alone(page_size, window, chunk, prompt, max_tokens):
    for pages in range(1, 70):
        scheduler = Scheduler([PageGroup("kv", page_size, pages, window)], max_rows=1, chunk=chunk)
        if scheduler.fits(prompt + max_tokens):
            break
    sequence = begin(scheduler, 0, prompt, max_tokens=max_tokens)
    finish(scheduler)
    assert sequence.ended == "length" and not scheduler.preempted


def test_a_window_needs_pages_for_what_it_shows_however_long_the_sequence_gets():
    scheduler = Scheduler([PageGroup("kv", 4, 5, window=8)], max_rows=1, chunk=8)
    assert scheduler.fits(10_000) and not Scheduler([PageGroup("kv", 4, 5)], max_rows=1, chunk=8).fits(21)
    sequence = begin(scheduler, 0, 100, max_tokens=100)
    finish(scheduler)
    assert len(sequence.tokens) == 200 and scheduler.pools["kv"].free == 5


def test_the_youngest_gives_its_pages_back_and_is_read_again():
    scheduler = Scheduler([PageGroup("kv", 1, 12)], max_rows=2, chunk=4)
    old, young = begin(scheduler, 0, 2, max_tokens=8), begin(scheduler, 1, 2, max_tokens=8)
    plans = finish(scheduler)
    assert scheduler.preempted == 1 and (old.ended, young.ended) == ("length", "length")
    starts = [row.start for plan in plans for row in plan.rows if row.sequence == 0]
    assert starts == sorted(starts), "the older one was read again"
    rows = [row for plan in plans for row in plan.rows if row.sequence == 1]
    assert [row.count for row in rows if row.draws] == list(range(8)), "a draw was lost or repeated"


def test_a_sequence_whose_step_fails_twice_fails_and_its_neighbour_does_not():
    scheduler = Scheduler([PageGroup("kv", 4, 20)], max_rows=2, chunk=4)
    bad, good = begin(scheduler, 0, 3, max_tokens=2), begin(scheduler, 1, 3, max_tokens=2)
    assert scheduler.rewind(scheduler.plan()) == []
    assert scheduler.rewind(scheduler.plan()) == [bad] and bad.ended == "failed"
    finish(scheduler)
    assert good.ended == "length" and good.failures == 0 and scheduler.pools["kv"].free == 20


def test_after_a_lost_device_everybody_is_read_again_in_order():
    scheduler = Scheduler([PageGroup("kv", 4, 30)], max_rows=3, chunk=8)
    for id in range(5):
        begin(scheduler, id, 3, max_tokens=4)
    for _ in range(5):
        plan = scheduler.plan()
        scheduler.commit(plan, [0] * len(plan.rows))
    assert [s.id for s in scheduler.running] == [0, 1, 2]
    scheduler.rewind()
    assert [s.id for s in scheduler.waiting] == list(range(5)) and scheduler.pools["kv"].free == 30
    again = [row.sequence for plan in finish(scheduler) for row in plan.rows if row.start == 0]
    assert again == list(range(5))


def test_a_plan_is_plain_data():
    """Other hosts can be told of it: it survives JSON."""
    scheduler = Scheduler([PageGroup("kv", 4, 20), PageGroup("near", 4, 20, 6)], max_rows=2, chunk=4)
    begin(scheduler, 0, 9, max_tokens=2, temperature=0.5, seed=3, stop=("end",))
    def restored(row):
        pages = {name: tuple(map(tuple, new)) for name, new in row["pages"].items()}
        sampling = {k: tuple(v) if isinstance(v, list) else v for k, v in row["sampling"].items()}
        return Row(**row | {"tokens": tuple(row["tokens"]), "pages": pages, "sampling": Sampling(**sampling)})
    for plan in finish(scheduler):
        heard = json.loads(json.dumps(asdict(plan)))
        assert Plan(heard["number"], tuple(map(restored, heard["rows"]))) == plan
