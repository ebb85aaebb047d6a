"""The scheduler on a make-believe device whose pages can be looked into: whatever happens to the others, whoever shares
its pages, and however often a sequence loses them, each one draws what it would have drawn alone."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby, pairwise
from operator import itemgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from jaxinfer.request import Sampling, Sequence
from jaxinfer.scheduler import AGEING, Began, PageGroup, Plan, Scheduler
from jaxinfer.scheduler.fit import fit
from tests.test_prefix import TIERS, Shelves, Tiered, nodes

VOCAB = 5  # so few that sequences often agree for a while
JUNK = 999


def shown(group: PageGroup, position: int) -> range:
    """The positions before `position` that a token there sees."""
    return range(0 if group.window is None else max(0, position - group.window + 1), position)


def cached(salt: Hashable, token: int, position: int, visible: tuple[tuple[int, ...], ...]) -> int:
    """What the model keeps of a token: as in a real one, it depends on all that each state group showed to it."""
    return hash((salt, token, position, visible))


def drawn_from(value: int) -> int:
    return value % VOCAB


def alone(groups: tuple[PageGroup, ...], salt: Hashable, prompt: list[int], most: int) -> tuple[list[int], list[int]]:
    """The prompt and what the model makes of it up to `most` tokens, undisturbed; and what it keeps of each."""
    tokens, kept = list(prompt), []
    while len(kept) < most:
        at = len(kept)
        kept.append(cached(salt, tokens[at], at, tuple(tuple(kept[q] for q in shown(group, at)) for group in groups)))
        if at == len(tokens) - 1:
            tokens.append(drawn_from(kept[-1]))
    return tokens[:most], kept


@dataclass
class Asked:
    """What a sequence should come to."""

    salt: Hashable
    tokens: list[int]
    kept: list[int]
    length: int
    stops: frozenset[int]


class Device:
    """Obeys plans as the real one does: tables per slot, kept up with what each plan says is new; pages that keep
    what was last written to them, on the device and below it; the last token drawn in each slot."""

    def __init__(self, groups: tuple[PageGroup, ...], max_rows: int):
        self.groups, self.max_rows = groups, max_rows
        self.tables = {group.name: [{} for _ in range(max_rows)] for group in groups}
        self.meaning: dict[int, tuple[Hashable, tuple[int, ...]]] = {}  # of what is kept of a token: all up to it
        self.lose_everything()

    def lose_everything(self):
        self.pages = {group.name: [[None] * group.page_size for _ in range(group.pages)] for group in self.groups}
        self.shelves = Shelves(self.pages)
        self.last = [None] * self.max_rows

    def run(self, plan: Plan, asked: dict[int, Asked]) -> list[list[int]]:
        """The drawn tokens of each step. Raises AssertionError if a row cannot see all of its window as it would be if
        it were alone, or looks at a page that another row of the step writes."""
        self._copy(plan)
        self.shelves.obey(plan.moves)
        for name, slot, index, page in plan.pages:
            self.tables[name][slot][index] = page
        starts = [end - count for end, count in zip(accumulate(plan.lens), plan.lens, strict=True)]
        tokens = [plan.tokens[start:start + count] for start, count in zip(starts, plan.lens, strict=True)]
        return [self._step(plan, step, tokens if step == 0 else [[-1]] * len(tokens), asked)
                for step in range(plan.steps)]

    def _copy(self, plan: Plan):
        """Copies that come one after another are made at once."""
        for kind, alike in groupby(plan.moves, itemgetter(0)):
            pairs = [(name, source, target) for _, name, source, target in alike] if kind == "copy" else []
            written = [(name, target) for name, _, target in pairs]
            assert len(set(written)) == len(written), "a page is written twice"
            for i, (name, source, _) in enumerate(pairs):
                assert (name, source) not in written[:i], "the copies depend on each other"

    def _step(self, plan: Plan, step: int, tokens: list[list[int]], asked: dict[int, Asked]) -> list[int]:
        writer: dict[tuple[str, int], int] = {}
        for r, slot in enumerate(plan.slots):
            for at in range(plan.starts[r] + step, plan.starts[r] + step + len(tokens[r])):
                for group in self.groups:
                    assert writer.setdefault((group.name, self._page(group, slot, at)), r) == r, "two rows write a page"
        return [self._row(plan, r, plan.starts[r] + step, tokens[r], writer, asked) for r in range(len(plan.ids))]

    def _row(self, plan: Plan, r: int, start: int, tokens: list[int], writer: dict, asked: dict[int, Asked]) -> int:
        slot, of, value = plan.slots[r], asked[plan.ids[r]], 0
        for at, token in enumerate(tokens, start):
            token = self.last[slot] if token < 0 else token
            sees = lambda group, at=at: tuple(self._see(group, slot, q, r, writer) for q in shown(group, at))
            value = cached(of.salt, token, at, tuple(map(sees, self.groups)))
            assert value == of.kept[at], f"sequence {plan.ids[r]} sees at {at} what it would not see alone"
            self.meaning[value] = (of.salt, tuple(of.tokens[:at + 1]))
            for group in self.groups:
                self.pages[group.name][self._page(group, slot, at)][at % group.page_size] = value
        if not plan.draws[r]:
            return JUNK
        self.last[slot] = drawn_from(value)
        return self.last[slot]

    def _page(self, group: PageGroup, slot: int, at: int) -> int:
        return self.tables[group.name][slot][at // group.page_size]

    def _see(self, group: PageGroup, slot: int, at: int, r: int, writer: dict) -> int:
        page = self._page(group, slot, at)
        assert writer.get((group.name, page), r) == r, "a row looks at a page that another one writes"
        return self.pages[group.name][page][at % group.page_size]


@dataclass(frozen=True)
class House:
    """What a scheduler is made of."""

    groups: tuple[PageGroup, ...]
    max_rows: int
    chunk: int
    budget: int | None
    chunks: int | None
    rungs: tuple[int, ...] = ()
    again: int = 0
    tiers: tuple[int, int] | None = None

    def scheduler(self) -> Scheduler:
        host, disk = ({group.name: count for group in self.groups} for count in self.tiers or (0, 0))
        scheduler = Scheduler(self.groups, max_rows=self.max_rows, chunk=self.chunk, budget=self.budget,
                              chunks=self.chunks, rungs=self.rungs, again=self.again, host=host if self.tiers else None,
                              disk=disk)
        if scheduler.tree.lower:
            scheduler.tree.lower.open = True
        return scheduler


@st.composite
def houses(draw) -> House:
    """One or two state groups, with and without a window, and pools so small that most histories run out."""
    windows = draw(st.sampled_from(((None,), (None,), (4,), (None, 5), (3, None), (1, 6))))
    size, rows = draw(st.integers(1, 4), label="page size"), draw(st.integers(1, 5), label="max_rows")
    groups = (PageGroup(f"group{i}", size, draw(st.integers(3, 14), label="pages"), w) for i, w in enumerate(windows))
    budget = draw(st.one_of(st.none(), st.integers(rows, rows + 8)), label="budget")
    rungs = draw(st.sampled_from(((), (2, 4, 8, 16), (1, 3, 20))), label="rungs")
    return House(tuple(groups), rows, draw(st.integers(1, 8), label="chunk"), budget,
                 draw(st.sampled_from((0, 0, 1, 2, None)), label="chunks"), rungs, draw(st.integers(0, 3)),
                 draw(TIERS, label="tiers"))


class AnyHistory(Tiered):
    """Requests come, are cancelled and lose their device, in any order, on an engine that dispatches up to `ahead`
    steps before it reads back the first of them."""

    @initialize(house=houses(), ahead=st.integers(1, 3))
    def open(self, house, ahead):
        self.house, self.groups = house, house.groups
        self.scheduler = house.scheduler()
        self.device = Device(house.groups, house.max_rows)
        self.ahead, self.flying = ahead, deque[tuple[Plan, list[list[int]]]]()
        self.all: list[Sequence] = []
        self.asked: dict[int, Asked] = {}
        self.told: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.begun: set[int] = set()
        self.version = 1
        self.waited: dict[int, int] = {}  # turns of its version that each sequence has not been in
        self.before: dict[int, set[int]] = {}  # versions that may still go before each one that waits for its turn
        self.dispatched = True
        self.now = 0.0
        self.tree, self.lower = self.scheduler.tree, self.scheduler.tree.lower

    # What happens.

    @rule(prompt=st.integers(1, 14), suffix=st.lists(st.integers(0, VOCAB), max_size=3), options=st.data())
    def submit(self, prompt, suffix, options):
        """Somebody new, or a conversation that goes on."""
        self._submit(list(range(10, 10 + prompt)) + suffix, options)

    @precondition(lambda self: self.asked)
    @rule(keep=st.integers(1, 30), suffix=st.lists(st.integers(0, VOCAB), max_size=3), options=st.data())
    def go_on(self, keep, suffix, options):
        before = options.draw(st.sampled_from(sorted(self.asked)), label="after")
        self._submit(self.asked[before].tokens[:keep] + suffix, options)

    @precondition(lambda self: self.scheduler.sequences)
    @rule(times=st.integers(1, 20), steps=st.sampled_from((1, 1, 2, 4)), late=st.booleans())
    def step(self, times, steps, late):
        for _ in range(times):
            self._step(steps, late)

    @precondition(lambda self: self.flying)
    @rule()
    def catch_up(self):
        self._commit()

    @precondition(lambda self: self.scheduler.sequences)
    @rule(data=st.data(), reason=st.sampled_from(("cancelled", "expired", "stop", "failed")))
    def cancel(self, data, reason):
        id = data.draw(st.sampled_from(sorted(self.scheduler.sequences)))
        self._end(self.scheduler.cancel(id, reason), reason)
        assert self.scheduler.cancel(id) is None, "cancelled twice"

    @precondition(lambda self: self.device.shelves.asked)
    @rule(count=st.integers(1, 9))
    def work(self, count):
        for _ in range(min(count, len(self.device.shelves.asked))):
            self._work()

    @rule(forget=st.booleans())
    def swap(self, forget=False):
        """Other weights: whoever begins now reads and draws otherwise."""
        self.version += 1
        self.scheduler.swap(self.version)
        if forget:
            used = self.scheduler.keep_versions()
            assert {version for version, _ in self.scheduler.tree.namespaces} <= used
        for sequence in self.scheduler.sequences.values():
            if not sequence.begun:
                self._expect(sequence)
            assert sequence.version == self.version or sequence.begun

    @precondition(lambda self: self.flying)
    @rule(dispatching=st.booleans())
    def fail(self, dispatching):
        """The step being dispatched fails, or the one being read back does."""
        self._fail(self._plan() if dispatching else self.flying[0][0])
        self.dispatched = True

    @precondition(lambda self: any(any(plan.draws) for plan, _ in self.flying))
    @rule(data=st.data())
    def spoil(self, data):
        """Nothing can be drawn from a row's logits: they are not numbers."""
        plan, tokens_NR = data.draw(st.sampled_from([flight for flight in self.flying if any(flight[0].draws)]))
        row = data.draw(st.sampled_from([r for r, draws in enumerate(plan.draws) if draws]))
        tokens_NR[data.draw(st.integers(0, plan.steps - 1))][row] = -1

    # How.

    def _submit(self, prompt: list[int], options):
        draw = lambda strategy, label: options.draw(strategy, label=label)
        namespace = draw(st.sampled_from(("a", "a", "b", None)), "namespace")
        task = draw(st.sampled_from(("draw", "draw", "draw", "score", "embed")), "task")
        max_tokens = 0 if task == "embed" else draw(st.integers(0, 24), "max_tokens")
        most = next((n for n in range(max_tokens, -1, -1) if self.scheduler.fits(len(prompt) + n)), None)
        if most is None:
            return
        stops = frozenset(draw(st.sets(st.integers(0, VOCAB - 1), max_size=1), "stops"))
        logprobs = draw(st.sampled_from((None, None, 0)), "logprobs")
        self.now += draw(st.sampled_from((0.0, 1.0, AGEING)), "later")
        order = self.now + AGEING * draw(st.sampled_from((0, 0, 0, -1, 1)), "priority")
        first = None
        for _ in range(1 if task == "embed" else draw(st.sampled_from((1, 1, 1, 2, 3)), "samples")):
            id = len(self.all)
            self.all.append(Sequence(id, list(prompt), len(prompt), Sampling(max_tokens=most, logprobs=logprobs), stops,
                                     (order, id), namespace, "draw" if first else task, first))
            self.scheduler.submit(self.all[-1])
            self._expect(self.all[-1])
            first = first or self.all[-1]

    def _expect(self, s: Sequence):
        """What a sequence that has not begun should come to, on the weights of its version."""
        salt = (s.version, ("alone", s.id) if s.namespace is None else s.namespace)
        tokens, kept = alone(self.groups, salt, s.tokens[: s.prompt], s.most)
        end = next((i + 1 for i in range(s.prompt, len(tokens)) if tokens[i] in s.stops), len(tokens))
        self.asked[s.id] = Asked(salt, tokens, kept, end, s.stops)

    def _step(self, steps: int = 1, late: bool = False):
        """With `late`, tokens are read back between the plan and its dispatch."""
        plan = self._plan(steps)
        while not plan and self.scheduler.sequences and self.scheduler.idle:
            self.device.shelves.obey(self.scheduler.moves())
            self._work()
            plan = self._plan(steps)
        if not plan:
            self.device.shelves.obey(self.scheduler.moves())
        if late or not plan:
            self._commit()
        if plan:
            self.flying.append((plan, self.device.run(plan, self.asked)))
        self.dispatched = True
        if len(self.flying) > self.ahead:
            self._commit()

    def _work(self):
        self.device.shelves.work(self.lower, self.scheduler.arrived)

    def _plan(self, steps: int = 1) -> Plan | None:
        self.dispatched = False
        self.before = {version: ahead for version, ahead in self.before.items() if version in self.scheduler.versions}
        plan = self.scheduler.plan(steps, self.house.rungs[1:])
        if plan:
            self._check_columns(plan)
            self._check_kind(plan, steps)
            self._check_rows(plan)
        self._check_turns(plan)
        for began in plan.began if plan else ():
            sequence = self.all[began.sequence]
            older = [s.id for s in self.all if s.order < sequence.order and s.ended is None]
            assert self.begun.issuperset(older), "not in order"
            self.begun.add(sequence.id)
        return plan

    def _check_columns(self, plan: Plan):
        columns = plan.ids, plan.slots, plan.starts, plan.lens, plan.draws, plan.counts
        assert len(set(map(len, columns))) == 1 and 0 < len(plan.ids) <= self.house.max_rows
        assert len(set(plan.ids)) == len(set(plan.slots)) == len(plan.ids)
        assert {self.all[id].version for id in plan.ids} == {plan.version}, "one step on two versions"
        assert sum(plan.lens) == len(plan.tokens) and min(plan.lens) > 0
        assert len(plan.tokens) <= self.scheduler.budget, "more tokens than a step may read"

    def _check_kind(self, plan: Plan, steps: int):
        chunks, most = len(plan.ids) - plan.singles, self.house.chunks
        assert plan.lens[:plan.singles] == [1] * plan.singles and all(plan.draws[:plan.singles])
        assert all(count <= self.house.chunk for count in plan.lens)
        assert most != 0 or not (plan.singles and chunks), "a prompt is read beside decode rows"
        assert most is None or chunks <= max(1, most)
        assert plan.task == "draw" or (chunks == 1 and not plan.singles)
        assert {self.all[id].task for id in plan.ids[plan.singles:]} <= {plan.task}
        for id, start in zip(plan.ids[:plan.singles], plan.starts, strict=False):
            assert start >= self.all[id].prompt or self.all[id].task == "draw", "a prompt is not read for its own sake"
        assert plan.steps in (1, steps)
        if plan.steps > 1:
            assert not chunks and not self.scheduler.waiting and all(self.all[id].plain for id in plan.ids)

    def _check_rows(self, plan: Plan):
        for r, id in enumerate(plan.ids):
            sequence, end = self.scheduler.sequences[id], plan.starts[r] + plan.lens[r]
            assert sequence.slot == plan.slots[r] < self.house.max_rows
            assert plan.counts[r] == end - sequence.prompt
            assert end <= sequence.most - plan.steps * plan.draws[r], "a step for a token that nobody asked for"
            if plan.draws[r]:
                assert end + plan.steps == sequence.total
            else:
                assert end < sequence.total or end == sequence.most, "nothing is drawn where something should be"

    def _check_turns(self, plan: Plan | None):
        """Who could decode, or is the first to read a prompt, does so in every turn of its version, or in every other
        if steps are of one kind. Before a version that waits go only those that were there when it began to wait, and
        each of them once. Somebody more important may come to be the first to read."""
        ready = {version: self._ready(plan, version) for version in self.scheduler.versions}
        assert plan or not any(ready.values()), "nothing was planned, although a sequence could run"
        if not plan:
            return
        self._check_turns_of_versions(plan, {version for version, sequences in ready.items() if sequences})
        others = {id: turns for id, turns in self.waited.items() if self.all[id].version != plan.version}
        ours = {s.id: self.waited.get(s.id, 0) + 1 if s.id not in plan.ids else 0 for s in ready[plan.version]}
        self.waited = others | ours
        tasks = {s.task for s in self._reading(plan, plan.version)} | {plan.task}
        patience = 0 if self.house.chunks != 0 and tasks == {"draw"} else 1
        assert all(turns <= patience for turns in ours.values()), "waited for more than its turn"

    def _check_turns_of_versions(self, plan: Plan, waiting: set[int]):
        self.before = {version: self.before.get(version, set(self.scheduler.versions)) - {version}
                       for version in waiting - {plan.version}}
        for version, ahead in self.before.items():
            assert plan.version in ahead, f"version {plan.version} goes before version {version} out of turn"
            ahead.remove(plan.version)

    def _ready(self, plan: Plan | None, version: int) -> list[Sequence]:
        """Who is in the plan, or could be in it: all that decode, and the first to read a prompt."""
        reading, ids = self._reading(plan, version), plan.ids if plan else ()
        decoding = [s for s in self.scheduler.running if s.version == version and s not in reading
                    and (s.id in ids or (s.unread == 1 and s.total < s.most))]
        return [*decoding, *reading[:1]]

    def _reading(self, plan: Plan | None, version: int) -> list[Sequence]:
        ids = plan.ids[plan.singles:] if plan else ()
        return [s for s in self.scheduler.running
                if s.version == version and (s in self.scheduler.reading or s.id in ids)]

    def _commit(self):
        if self.flying:
            for sequence, token, ended in self.scheduler.commit(*self.flying.popleft()):
                if token is not None and token >= 0:
                    self.told.setdefault(sequence.id, []).append(token)
                assert (token is not None and token < 0) == (ended == "failed")
                if ended:
                    self._end(sequence, ended)
                if ended in ("stop", "length"):
                    assert len(sequence.tokens) == self.asked[sequence.id].length
                    assert (ended == "stop") == (token in sequence.stops)

    def _fail(self, plan: Plan | None):
        self.flying.clear()
        self.waited.clear()
        self.device.lose_everything()
        twice = {id for id in plan.ids if self.all[id].failures} if plan else set()
        ended = self.scheduler.rewind(plan)
        assert {s.id for s in ended} == twice - set(self.ended)
        for sequence in ended:
            self._end(sequence, "failed")
        assert not self.scheduler.running and not nodes(self.scheduler.tree)

    def _end(self, sequence: Sequence, reason: str):
        assert sequence.id not in self.ended, "ended twice"
        assert sequence.ended == reason and sequence.id not in self.scheduler.sequences
        self.ended[sequence.id] = reason

    # What must hold.

    @invariant()
    def every_page_is_free_or_held_by_those_that_list_it(self):
        tree = self.scheduler.tree
        for group in self.groups:
            known = [path[-1].pages[group.name] for _, _, path in nodes(tree)]
            listed = [page for s in self.all for page in s.pages.get(group.name, ()) if page is not None]
            listed += [page for page in known if page is not None]
            assert tree.pools[group.name].holders == [listed.count(page) for page in range(group.pages)]

    @invariant()
    def every_known_page_holds_what_the_tree_says(self):
        for namespace, tokens, path in nodes(self.scheduler.tree):
            start = len(tokens) - len(path[-1].key)
            copies = [self.device.pages[name][page] for name, page in path[-1].pages.items() if page is not None]
            copies += [self.device.shelves.kept(*key, place) for key, place in path[-1].kept.items()]
            for copy in copies:
                for at in range(start, len(tokens)):
                    assert self.device.meaning[copy[at - start]] == (namespace, tokens[:at + 1])

    @precondition(lambda self: self.lower)
    @invariant()
    def every_place_below_is_free_or_somebodys(self):
        self.device.shelves.check_places(self.lower, [path[-1] for _, _, path in nodes(self.scheduler.tree)])

    @invariant()
    def every_sequence_is_in_one_place(self):
        waiting, running = self.scheduler.waiting, self.scheduler.running
        there = sorted(s.id for s in (*waiting, *running))
        assert there == sorted(self.scheduler.sequences) == [s.id for s in self.all if s.id not in self.ended]
        assert all(s.slot is None and not s.pages and s.read == 0 for s in waiting)
        for queue in (waiting, running, self.scheduler.reading):
            assert queue == sorted(queue, key=lambda s: s.order)
        assert set(map(id, self.scheduler.reading)) <= set(map(id, running))
        slots = [*self.scheduler.slots, *(s.slot for s in running)]
        assert sorted(slots) == list(range(self.house.max_rows))

    @invariant()
    def every_token_is_the_one_it_would_be_alone(self):
        for s in self.all:
            asked = self.asked[s.id]
            assert s.tokens == asked.tokens[:len(s.tokens)] and len(s.tokens) <= asked.length
            assert s.tokens[s.prompt:] == self.told.get(s.id, []), "a token was not told, or told twice"

    def teardown(self):
        """Left alone, every sequence comes to its end, in about as many steps as it has tokens. After a plan that was
        found wrong and never got to the device, nothing holds, and nothing more is to be said."""
        if not getattr(self, "dispatched", False):
            return
        for _ in range(10 + 10 * sum(len(asked.tokens) for asked in self.asked.values())):
            if not (self.scheduler.sequences or self.flying):
                break
            idle = not self.flying
            self._step()
            assert self.flying or not idle or not self.scheduler.sequences, "sequences wait, and nothing runs"
        assert not self.scheduler.sequences, "sequences starve"
        self.every_page_is_free_or_held_by_those_that_list_it()
        self.every_known_page_holds_what_the_tree_says()
        tree = self.scheduler.tree
        assert all(tree.obtainable(group.name) == group.pages for group in self.groups)


class TestAnyHistory(AnyHistory.TestCase):
    settings = settings(max_examples=5 * settings().max_examples, stateful_step_count=40)


@pytest.mark.long
class TestMoreHistories(AnyHistory.TestCase):
    settings = settings(stateful_step_count=60)


# Histories that were found.


class Said:
    """What a history asks hypothesis for, said beforehand."""

    def __init__(self, **said):
        self.said = dict(namespace="a", task="draw", stops=(), logprobs=None, later=0.0, priority=0, samples=1) | said

    def draw(self, strategy, label):
        return self.said[label]


class History(AnyHistory):
    """Told step by step; after each of them everything must hold."""

    def __init__(self, max_rows: int):
        super().__init__()
        windows = PageGroup("near", 2, 6, window=1), PageGroup("far", 2, 9, window=6)
        self.open(House(windows, max_rows, chunk=1, budget=None, chunks=None), ahead=2)

    def comes(self, prompt: int, *suffix: int, **said):
        self._submit([*range(10, 10 + prompt), *suffix], Said(**said))
        self.holds()

    def steps(self, times: int):
        for _ in range(times):
            self._step()
            self.holds()

    def catches_up(self):
        while self.flying:
            self._commit()
        self.holds()

    def ends(self, id: int):
        self._end(self.scheduler.cancel(id), "cancelled")
        self.holds()

    def draws_nothing(self, flight: int):
        """The first row of a step that is in flight."""
        self.flying[flight][1][0][0] = -1

    def holds(self):
        self.every_page_is_free_or_held_by_those_that_list_it()
        self.every_known_page_holds_what_the_tree_says()
        self.every_sequence_is_in_one_place()
        self.every_token_is_the_one_it_would_be_alone()


def test_a_more_important_prompt_goes_between_two_chunks_of_a_scored_one():
    history = History(max_rows=4)
    history.comes(1, max_tokens=15)
    history.comes(4, 0, task="score", max_tokens=13)
    history.steps(7)
    history.comes(11, 0, namespace="b", max_tokens=0, priority=-1)
    history.draws_nothing(flight=-1)
    history.steps(1)
    assert history.flying[-1][0].ids == [0, 2] and [s.id for s in history.scheduler.reading] == [2, 1]
    history.steps(10)
    history.teardown()
    assert history.ended == {0: "failed", 1: "length", 2: "length"}


@pytest.mark.parametrize(("max_rows", "max_tokens", "namespace"), ((4, 15, "a"), (2, 12, "b")))
def test_what_is_known_stays_true_where_a_fork_has_no_room_and_its_elder_cannot_draw(max_rows, max_tokens, namespace):
    history = History(max_rows)
    history.comes(1, max_tokens=max_tokens, samples=3)
    history.steps(12)
    assert [s.id for s in history.scheduler.waiting] == [2], "the second fork has no pages, or no row"
    history.ends(1)
    history.draws_nothing(flight=0)
    history.comes(4, 0, task="score", max_tokens=13)
    history.catches_up()
    history.steps(7)
    history.comes(4, 0, namespace=namespace, max_tokens=0, priority=-1)
    history.draws_nothing(flight=-1)
    history.steps(3)
    history.teardown()
    assert history.ended == {0: "failed", 1: "cancelled", 2: "failed", 3: "length", 4: "length"}


# Short histories.


def begin(scheduler: Scheduler, id: int, tokens: int | list[int], namespace: str | None = None, order: float = 0.0,
          after: Sequence | None = None, task: str = "draw", **options) -> Sequence:
    tokens = list(range(tokens)) if isinstance(tokens, int) else tokens
    sequence = Sequence(id, tokens, len(tokens), Sampling(**options), order=(order, id), namespace=namespace,
                        after=after, task=task)  # type: ignore[arg-type]
    scheduler.submit(sequence)
    return sequence


def one(scheduler: Scheduler, steps: int = 1) -> Plan | None:
    """A step, of which all rows that draw draw JUNK, and for which all rungs are ready."""
    plan = scheduler.plan(steps, scheduler.rungs)
    if plan:
        scheduler.commit(plan, [[JUNK] * len(plan.ids)] * plan.steps)
    return plan


def finish(scheduler: Scheduler) -> list[Plan]:
    """Run to the end, one step at a time; what is drawn does not matter."""
    return list(iter(lambda: one(scheduler), None))


def read(plans: list[Plan], id: int) -> list[tuple[int, int]]:
    """Where the rows of a sequence start, and how much they read."""
    return [(plan.starts[r], plan.lens[r]) for plan in plans for r, other in enumerate(plan.ids) if other == id]


KV = [PageGroup("kv", 4, 40)]


@given(page_size=st.integers(1, 4), window=st.one_of(st.none(), st.integers(1, 9)), chunk=st.integers(1, 9),
       prompt=st.integers(1, 30), max_tokens=st.integers(0, 30), namespace=st.sampled_from((None, "")))
@settings(max_examples=200)
def test_a_sequence_that_fits_comes_to_its_end_alone(page_size, window, chunk, prompt, max_tokens, namespace):
    """Also the second time, when it finds the pool full of what it left there."""
    for pages in range(1, 70):
        scheduler = Scheduler([PageGroup("kv", page_size, pages, window)], max_rows=1, chunk=chunk)
        if scheduler.fits(prompt + max_tokens):
            break
    for id in range(2):
        sequence = begin(scheduler, id, prompt, namespace, max_tokens=max_tokens)
        finish(scheduler)
        assert sequence.ended == "length" and not scheduler.preempted


def test_a_window_needs_pages_for_what_it_shows_however_long_the_sequence_gets():
    scheduler = Scheduler([PageGroup("kv", 4, 5, window=8)], max_rows=1, chunk=8)
    assert scheduler.fits(10_000) and not Scheduler([PageGroup("kv", 4, 5)], max_rows=1, chunk=8).fits(21)
    sequence = begin(scheduler, 0, 100, max_tokens=100)
    finish(scheduler)
    assert len(sequence.tokens) == 200 and scheduler.tree.pools["kv"].free == 5


def test_the_youngest_gives_its_pages_back_and_is_read_again():
    scheduler = Scheduler([PageGroup("kv", 1, 12)], max_rows=2, chunk=4)
    old, young = begin(scheduler, 0, 2, max_tokens=8), begin(scheduler, 1, 2, max_tokens=8)
    plans = finish(scheduler)
    assert scheduler.preempted == 1 and (old.ended, young.ended) == ("length", "length")
    starts = [start for start, _ in read(plans, 0)]
    assert starts == sorted(starts), "the older one was read again"
    draws = [plan.counts[r] for plan in plans for r, id in enumerate(plan.ids) if id == 1 and plan.draws[r]]
    assert draws == list(range(8)), "a draw was lost or repeated"


def test_what_was_preempted_is_read_again_only_as_far_as_its_pages_were_needed():
    scheduler = Scheduler([PageGroup("kv", 1, 12)], max_rows=2, chunk=4)
    begin(scheduler, 0, 2, max_tokens=6)
    begin(scheduler, 1, [7, 7], "a", max_tokens=8)
    plans = finish(scheduler)
    again = next(plan for plan in plans[2:] for began in plan.began if began.sequence == 1)
    assert scheduler.preempted == 1 and again.starts == [5], "of its answer too: one page of six was needed"


def test_the_lowest_priority_is_preempted_and_the_highest_enters_first():
    scheduler = Scheduler([PageGroup("kv", 1, 12)], max_rows=2, chunk=4)
    low = begin(scheduler, 0, 2, order=AGEING, max_tokens=8)
    high = begin(scheduler, 1, 2, order=0, max_tokens=8)
    plans = finish(scheduler)
    assert [began.sequence for plan in plans for began in plan.began] == [1, 0, 0]
    assert plans[0].ids == [1] and (low.ended, high.ended) == ("length", "length")


def test_who_has_waited_long_goes_before_who_is_more_important():
    scheduler = Scheduler(KV, max_rows=1, chunk=4)
    for id, (priority, came) in enumerate([(0, 0.0), (-1, AGEING - 1), (-1, AGEING + 1), (-2, AGEING + 1)]):
        begin(scheduler, id, 2, order=priority * AGEING + came, max_tokens=1)
    assert [began.sequence for plan in finish(scheduler) for began in plan.began] == [3, 1, 0, 2]


def test_a_sequence_whose_step_fails_twice_fails_and_its_neighbour_does_not():
    scheduler = Scheduler([PageGroup("kv", 4, 20)], max_rows=2, chunk=4)
    bad, good = begin(scheduler, 0, 3, max_tokens=2), begin(scheduler, 1, 3, max_tokens=2)
    assert scheduler.rewind(scheduler.plan()) == []
    assert scheduler.rewind(scheduler.plan()) == [bad] and bad.ended == "failed"
    finish(scheduler)
    assert good.ended == "length" and good.failures == 0 and scheduler.tree.pools["kv"].free == 20


def test_after_a_lost_device_everybody_is_read_again_in_order_and_nothing_is_known():
    scheduler = Scheduler([PageGroup("kv", 4, 30)], max_rows=3, chunk=8)
    for id in range(5):
        begin(scheduler, id, 9, "a", max_tokens=20)
    for _ in range(5):
        one(scheduler)
    assert [s.id for s in scheduler.running] == [0, 1, 2]
    scheduler.rewind()
    assert [s.id for s in scheduler.waiting] == list(range(5)) and scheduler.tree.pools["kv"].free == 30
    plans = finish(scheduler)
    assert [began.sequence for plan in plans for began in plan.began] == list(range(5))
    assert read(plans, 0)[0] == (0, 8)


def test_the_second_to_ask_reads_only_the_last_token():
    scheduler = Scheduler(KV, max_rows=2, chunk=8)
    begin(scheduler, 0, 11, "a", max_tokens=3)
    assert read(finish(scheduler), 0) == [(0, 8), (8, 3), (11, 1), (12, 1)]
    begin(scheduler, 1, 11, "a", max_tokens=3)
    plans = finish(scheduler)
    assert read(plans, 1) == [(10, 1), (11, 1), (12, 1)] and scheduler.reused == 10
    assert [kind for kind, *_ in plans[0].moves] == ["copy"]
    begin(scheduler, 2, 11, "b", max_tokens=1)
    begin(scheduler, 3, 11, None, max_tokens=1)
    plans = finish(scheduler)
    assert read(plans, 2) == read(plans, 3) == [(0, 8), (8, 3)], "namespaces share"


def test_a_conversation_goes_on_where_it_ended():
    scheduler = Scheduler(KV, max_rows=2, chunk=64)
    turn = begin(scheduler, 0, 11, "a", max_tokens=8)
    finish(scheduler)
    begin(scheduler, 1, [*turn.tokens, 1, 2, 3], "a", max_tokens=1)
    assert read(finish(scheduler), 1) == [(18, 4)], "all but the last drawn token, which nobody has read, is known"


def test_somebody_finds_what_another_is_still_working_on():
    scheduler = Scheduler(KV, max_rows=2, chunk=64)
    begin(scheduler, 0, 11, "a", max_tokens=20)
    for _ in range(10):
        one(scheduler)
    begin(scheduler, 1, [*range(11), *[JUNK] * 5, 1, 1], "a", max_tokens=1)
    plan = one(scheduler)
    assert plan and plan.ids == [1] and plan.starts == [16], "full pages of an answer are known as it grows"


@pytest.mark.parametrize("namespace", ("a", None))
@pytest.mark.parametrize("prompt", (1, 4, 5, 11, 12, 13))
@pytest.mark.parametrize("known", (False, True))
def test_forks_begin_as_soon_as_their_prompt_is_read(prompt, known, namespace):
    scheduler = Scheduler(KV, max_rows=4, chunk=4)
    if known:
        begin(scheduler, 9, prompt, namespace, max_tokens=1)
        finish(scheduler)
    first = begin(scheduler, 0, prompt, namespace, max_tokens=20)
    forks = [begin(scheduler, id, prompt, namespace, after=first, max_tokens=20) for id in (1, 2)]
    plans = finish(scheduler)
    is_read = next(i for i, plan in enumerate(plans) for start, count in read([plan], 0) if start + count >= prompt)
    begun = next(i for i, plan in enumerate(plans) for began in plan.began if began.sequence == 1)
    assert begun <= is_read + 1, "a fork waits for more than the prompt"
    if namespace:
        assert {read(plans, fork.id)[0] for fork in forks} == {(prompt - 1, 1)}, "a fork reads what is known"
    assert len({tuple(s.tokens) for s in (first, *forks)}) == 1


def test_a_fork_whose_elder_ended_does_not_wait():
    scheduler = Scheduler(KV, max_rows=2, chunk=4)
    first = begin(scheduler, 0, 11, "a", max_tokens=20)
    fork = begin(scheduler, 1, 11, "a", after=first, max_tokens=2)
    one(scheduler)
    scheduler.cancel(0)
    finish(scheduler)
    assert fork.ended == "length"


def test_pages_that_are_shared_are_counted_once():
    """Five sequences of ten pages each fit into a pool of 22, since they share eight."""
    scheduler = Scheduler([PageGroup("kv", 4, 22)], max_rows=5, chunk=64)
    first = begin(scheduler, 0, 33, "a", max_tokens=7)
    for id in range(1, 5):
        begin(scheduler, id, 33, "a", after=first, max_tokens=7)
    finish(scheduler)
    assert scheduler.preempted == 0 and scheduler.reused == 4 * 32


def test_prompts_and_decode_rows_share_a_step_within_its_budget():
    scheduler = Scheduler(KV, max_rows=4, chunk=6, budget=8, chunks=None)
    first = begin(scheduler, 0, 6, max_tokens=9)
    plan = one(scheduler)
    assert plan and (plan.singles, plan.lens) == (0, [6])
    for id in (1, 2, 3):
        begin(scheduler, id, 6, max_tokens=9)
    kinds = [(plan.singles, plan.lens) for plan in (one(scheduler) for _ in range(4)) if plan]
    assert kinds == [(1, [1, 6, 1]), (2, [1, 1, 5, 1]), (3, [1, 1, 1, 5]), (4, [1, 1, 1, 1])]
    finish(scheduler)
    assert first.ended == "length"


@pytest.mark.parametrize(("chunks", "sizes"), [(None, [64, 32, 12]), (1, [64, 32, 12]), (0, [64, 32, 12])])
def test_a_prompt_is_read_in_steps_that_are_full_where_that_computes_less(chunks, sizes):
    scheduler = Scheduler([PageGroup("kv", 4, 100)], max_rows=2, chunk=128, chunks=chunks, budget=130,
                          rungs=(16, 32, 64, 128), again=4)
    begin(scheduler, 0, 108, max_tokens=1)
    assert [len(plan.tokens) for plan in finish(scheduler)] == sizes
    begin(scheduler, 1, 120, max_tokens=1)
    assert [len(plan.tokens) for plan in finish(scheduler)] == [120], "the rest would cost more than the padding"


def test_a_step_that_reads_prompts_fills_a_rung_with_its_decode_rows_in_it():
    scheduler = Scheduler([PageGroup("kv", 4, 100)], max_rows=8, chunk=64, chunks=None, rungs=(8, 16, 64), again=1)
    for id in range(3):
        begin(scheduler, id, 1, max_tokens=30)
    assert (plan := one(scheduler)) and len(plan.tokens) == 3
    begin(scheduler, 3, 20, max_tokens=1)
    assert [(plan.singles, plan.lens) for _ in range(2) if (plan := one(scheduler))] == [
        (3, [1, 1, 1, 13]), (3, [1, 1, 1, 7])]


def test_no_step_is_made_to_fit_a_rung_that_has_yet_to_be_compiled():
    for ready, sizes in (((16, 32, 64, 128), [64, 12]), ((16, 32, 64), [76]), ((128,), [76]), ((), [76])):
        scheduler = Scheduler([PageGroup("kv", 4, 100)], max_rows=2, chunk=128, rungs=(16, 32, 64, 128), again=4)
        begin(scheduler, 0, 76, max_tokens=1)
        plans = []
        while plan := scheduler.plan(ready=ready):
            plans.append(len(plan.tokens))
            scheduler.commit(plan, [[JUNK]])
        assert plans == sizes, ready


@given(tokens=st.integers(1, 2048), again=st.integers(0, 500), data=st.data())
def test_fitting_never_computes_more_than_padding_does(tokens, again, data):
    rungs = [*sorted(data.draw(st.sets(st.integers(1, 2047), max_size=8))), 2048]
    padded, cost, left = next(size for size in rungs if size >= tokens), 0, tokens
    while left:
        count = fit(left, rungs, again)
        assert count == left or count in rungs, "neither all of it nor a full step"
        cost += again + next(size for size in rungs if size >= count)
        left -= count
    assert cost <= padded + again


def test_who_has_just_entered_may_have_to_leave_in_the_same_step():
    scheduler = Scheduler([PageGroup("kv", 1, 8)], max_rows=4, chunk=4, chunks=1)
    for id in range(3):
        begin(scheduler, id, 1, max_tokens=4)
    assert [plan.ids for plan in (one(scheduler), one(scheduler)) if plan] == [[0, 1, 2]] * 2
    last = begin(scheduler, 3, 1, max_tokens=4)
    plan = one(scheduler)
    assert plan and plan.ids == [0, 1] and [began.sequence for began in plan.began] == [3] and last.slot is None
    finish(scheduler)
    assert last.ended == "length" and len(last.tokens) == 5


def test_no_row_of_a_step_loses_its_pages_to_a_prompt_in_the_same_step():
    scheduler = Scheduler([PageGroup("kv", 1, 8)], max_rows=3, chunk=1, budget=20, chunks=None)
    all = [begin(scheduler, id, prompt, max_tokens=3) for id, prompt in enumerate((5, 5, 1))]
    assert [plan.ids for plan in (one(scheduler), one(scheduler), one(scheduler)) if plan] == [[2, 0, 1]] * 2 + [[2, 0]]
    finish(scheduler)
    assert {s.ended for s in all} == {"length"}


@pytest.mark.parametrize("chunks", (0, 1, None))
def test_a_prompt_takes_pages_from_younger_sequences_that_decode(chunks):
    scheduler = Scheduler([PageGroup("kv", 4, 4)], max_rows=2, chunk=4, chunks=chunks)
    old = begin(scheduler, 0, 13, max_tokens=1)
    while old.read < 8:
        one(scheduler)
    young = begin(scheduler, 1, 1, max_tokens=12)
    plans = [one(scheduler) for _ in range(4)]
    assert old.ended == "length" and young.ended is None, plans
    finish(scheduler)
    assert young.ended == "length"


@pytest.mark.parametrize(("chunks", "kinds"), [
    (0, [(0, [4]), (1, [1]), (0, [4])]), (1, [(1, [1, 4]), (1, [1, 4]), (2, [1, 1, 4])]),
    (2, [(1, [1, 4, 4]), (1, [1, 4, 4]), (3, [1, 1, 1])]),
])
def test_so_many_prompt_chunks_go_with_the_decode_rows(chunks, kinds):
    scheduler = Scheduler(KV, max_rows=3, chunk=4, budget=9 if chunks == 2 else None, chunks=chunks)
    begin(scheduler, 0, 1, max_tokens=20)
    one(scheduler)
    for id in (1, 2):
        begin(scheduler, id, 8, max_tokens=9)
    assert [(plan.singles, plan.lens) for plan in (one(scheduler) for _ in range(3)) if plan] == kinds


def test_several_steps_go_in_one_plan_while_nobody_wants_anything_else():
    scheduler = Scheduler(KV, max_rows=2, chunk=8)
    a, b = begin(scheduler, 0, 3, max_tokens=10), begin(scheduler, 1, 3, max_tokens=8)
    plans = [one(scheduler, steps=4) for _ in range(4)]
    assert [plan.steps for plan in plans if plan] == [1, 1, 1, 4], "a prompt, a step for the other, a prompt, four"
    assert (len(a.tokens), len(b.tokens)) == (3 + 6, 3 + 5)
    begin(scheduler, 2, 3, max_tokens=1)
    assert (plan := one(scheduler, steps=4)) and plan.steps == 1, "somebody waits"
    while b.ended is None:
        assert (plan := one(scheduler, steps=4)) and plan.steps == 1, "somebody ends sooner"
    finish(scheduler)
    assert a.ended == "length" and len(a.tokens) == 13


def test_several_steps_do_not_take_pages_from_others_or_serve_who_wants_more_than_tokens():
    scheduler = Scheduler([PageGroup("kv", 4, 3)], max_rows=2, chunk=8)
    begin(scheduler, 0, 3, max_tokens=9)
    steps = [plan.steps for plan in iter(lambda: one(scheduler, steps=4), None)]
    assert steps == [1, 4, 4], steps
    begin(scheduler, 1, 3, max_tokens=9, logprobs=0)
    assert {plan.steps for plan in iter(lambda: one(scheduler, steps=4), None)} == {1}


@pytest.mark.parametrize("swapping", (False, True))
@pytest.mark.parametrize("chunks", (0, 1, None))
def test_whoever_runs_on_old_weights_has_its_turn_however_many_come_and_go_on_new_ones(chunks, swapping):
    scheduler = Scheduler(KV, max_rows=2, chunk=4, chunks=chunks)
    begin(scheduler, 0, 3, max_tokens=9)
    one(scheduler)
    scheduler.swap(2)
    turns = []
    for id in range(1, 10):
        begin(scheduler, id, 3, max_tokens=1)
        turns += [plan.version == 1 for plan in (one(scheduler),) if plan]
        if swapping:
            scheduler.swap(2 + id)
    assert {*pairwise(turns)} == {(True, False), (False, True)}, "every other step is its"


def test_whoever_goes_on_with_new_weights_keeps_its_turns():
    scheduler = Scheduler(KV, max_rows=2, chunk=1)
    begin(scheduler, 0, 1, max_tokens=20)
    begin(scheduler, 1, 9, max_tokens=1)
    ids = []
    for version in range(2, 12):
        ids += [plan.ids for plan in (one(scheduler),) if plan]
        scheduler.swap(version, onward=True)
    assert ids == [[0], [1]] * 5, "swaps keep a prompt from being read"


def test_a_prompt_that_is_read_for_its_own_sake_is_read_alone_and_to_its_end():
    scheduler = Scheduler(KV, max_rows=3, chunk=4, chunks=None)
    begin(scheduler, 0, 9, "a", max_tokens=9)
    begin(scheduler, 1, 9, "a", task="score", max_tokens=2)
    begin(scheduler, 2, 9, "a", task="embed", max_tokens=0)
    plans = finish(scheduler)
    assert [(plan.task, plan.lens) for plan in plans if plan.task != "draw"] == [
        ("score", [4]), ("score", [4]), ("score", [1]), ("embed", [4]), ("embed", [4]), ("embed", [1])]
    assert [s for s in scheduler.sequences] == [] and read(plans, 1) == [(0, 4), (4, 4), (8, 1), (9, 1)]


def test_a_commit_says_how_everybody_ended():
    scheduler = Scheduler(KV, max_rows=3, chunk=4)
    whole = begin(scheduler, 0, 3, task="score", max_tokens=0)
    assert (plan := scheduler.plan()) and not any(plan.draws)
    assert scheduler.commit(plan, [[JUNK]]) == [(whole, None, "length")]
    broken = begin(scheduler, 1, 3, "a", max_tokens=3)
    assert (plan := scheduler.plan())
    assert scheduler.commit(plan, [[-1]]) == [(broken, -1, "failed")] and broken.tokens == [0, 1, 2]
    assert not nodes(scheduler.tree), "what a broken sequence has read is shared"
    stopped = begin(scheduler, 2, 3, max_tokens=3)
    stopped.stops = frozenset([5])
    assert (plan := scheduler.plan()) and scheduler.commit(plan, [[5]]) == [(stopped, 5, "stop")]
    assert scheduler.commit(plan, [[5]]) == [], "a sequence ended twice"


def test_a_plan_without_some_of_its_rows_is_a_plan():
    scheduler = Scheduler(KV, max_rows=4, chunk=4, chunks=None)
    for id in range(3):
        begin(scheduler, id, [id] * (id + 1), max_tokens=9)
    plan = scheduler.plan()
    assert plan and plan.ids == [0, 1, 2] and plan.lens == [1, 2, 3]
    less = plan.only([0, 2])
    assert (less.ids, less.lens, less.tokens, less.singles) == ([0, 2], [1, 3], [0, 2, 2, 2], 1)
    assert [began.sequence for began in less.began] == [0, 2] and less.pages == plan.pages
    assert plan.only([0, 1, 2]) == plan


def test_a_plan_is_plain_data():
    """Other hosts can be told of it: it survives JSON."""
    scheduler = Scheduler([PageGroup("kv", 4, 20), PageGroup("near", 4, 20, 6)], max_rows=2, chunk=4, chunks=1)
    first = begin(scheduler, 0, 11, "a", max_tokens=2, temperature=0.5, seed=3, stop=("end",))
    begin(scheduler, 1, 11, "a", after=first, max_tokens=2, logit_bias={3: 1.5})

    def sampling(told):
        told["logit_bias"] = {int(token): bias for token, bias in told["logit_bias"].items()}
        return Sampling(**told)

    def restored(told):
        began = [Began(*who, tuple(tokens), prompt, sampling(how)) for *who, tokens, prompt, how in told["began"]]
        return Plan(**told | {"began": began, "pages": [*map(tuple, told["pages"])],
                              "moves": [*map(tuple, told["moves"])]})

    plans = finish(scheduler)
    assert any(plan.moves for plan in plans) and any(plan.began for plan in plans)
    for plan in plans:
        assert restored(json.loads(json.dumps(asdict(plan)))) == plan
