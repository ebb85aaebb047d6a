"""Who is awake, decided: budgets are kept whatever comes and goes and fails, and everybody who asks is served."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.scheduler.residents import Resident, Residents

DEVICES = "a", "b"


class Models(RuleBasedStateMachine):
    """Models with random sizes come, are asked, work, are sent to sleep, pinned and closed; moves fail at random."""

    @initialize(device=st.integers(50, 150), host=st.integers(0, 150))
    def begin(self, device, host):
        self.books, self.clock = Residents(device, host), 0
        self.inside, self.before = {}, {}  # requests that each model works on, and that wait before its gate
        self.asked = self.served = self.refused = 0
        self.moving = None

    def pick(self, data, condition=lambda one: True):
        able = [one for one in self.books if one in self.inside and condition(one)]
        return data.draw(st.sampled_from(able), "model") if able else None

    def look(self):
        for one in self.inside:
            one.busy = self.inside[one] > 0

    @rule(data=st.data(), size=st.integers(1, 160), devices=st.sets(st.sampled_from(DEVICES), min_size=1),
          keeps=st.booleans(), stored=st.booleans(), stage=st.integers(0, 20))
    def come(self, data, size, devices, keeps, stored, stage):
        if stage > self.books.host or self.books.copies + max(stage, self.books.stage) > self.books.host:
            return
        fits = all(self.books.used(device) + size <= self.books.device for device in devices)
        fixed = fits and data.draw(st.integers(0, 9), "fixed") == 0
        self.clock += 1
        one = Resident(f"{self.clock}", size, data.draw(st.integers(0, size), "weights"), frozenset(devices), stage,
                       keeps, stored or not fits, fixed, tier="device" if fits else "disk", used=self.clock)
        self.books.enter(one)
        self.inside[one] = self.before[one] = 0

    @rule(data=st.data())
    def ask(self, data):
        if one := self.pick(data):
            self.clock, self.asked = self.clock + 1, self.asked + 1
            one.used = self.clock
            if one.awake and not one.leaving:
                self.inside[one] += 1
            else:
                self.before[one] += 1
                self.books.want(one)

    @rule(data=st.data())
    def answer(self, data):
        if one := self.pick(data, lambda one: self.inside[one]):
            self.served, self.inside[one] = self.served + self.inside[one], 0

    @rule(data=st.data())
    def send(self, data):
        if one := self.pick(data, lambda one: one.awake and not one.fixed):
            one.sent = True

    @rule(data=st.data())
    def pin(self, data):
        if one := self.pick(data, lambda one: one.awake and not one.leaving and not self.is_moved(one)):
            one.pins = 1 - one.pins

    @rule(data=st.data())
    def close(self, data):
        if (one := self.pick(data, lambda one: not one.pins)) and not self.is_moved(one):
            self.books.leave(one)
            self.refused += self.inside.pop(one) + self.before.pop(one)

    def is_moved(self, one):
        return self.moving is not None and self.moving.who is one

    @precondition(lambda self: self.moving is None)
    @rule()
    def move(self):
        self.look()
        self.moving = self.books.next()
        if self.moving:
            what, one, _ = self.moving
            assert not (what in ("leave", "sleep") and (one.fixed or (one.pins and not one.sent)))
            assert what != "sleep" or (one.leaving and not self.inside[one] and not one.pins)
            assert what != "leave" or one.sent or not any(  # who was asked before goes before, if it has nothing to do
                other.used < one.used and not other.busy and other.awake and not (other.fixed or other.pins or
                other.leaving or other.stuck) and one.devices == other.devices for other in self.inside)
            self.books.begin(self.moving)

    @precondition(lambda self: self.moving is not None)
    @rule(fails=st.sampled_from((False, False, False, True)))
    def moved(self, fails):
        what, one, _ = move = self.moving
        self.moving, head = None, next(iter(self.books.wanted), None)
        fails = fails and what in ("sleep", "store", "wake")
        self.books.ended(move, done=not fails)
        if (what == "wake" and not fails) or what == "stay":
            self.inside[one], self.before[one] = self.inside[one] + self.before[one], 0
        elif fails or what == "refuse":  # harms who it was for
            head = one if what in ("wake", "refuse") else head
            if head:
                self.books.unwant(head)
                self.refused, self.before[head] = self.refused + self.before[head], 0

    @invariant()
    def budgets_are_kept(self):
        if hasattr(self, "books"):
            assert all(self.books.used(device) <= self.books.device for device in DEVICES)
            assert self.books.copies + self.books.stage <= self.books.host

    @invariant()
    def requests_are_where_they_can_be_served(self):
        for one in getattr(self, "inside", {}):
            assert not self.inside[one] or one.awake, "who works was put to sleep"
            assert not self.before[one] or one in self.books.wanted, "somebody waits, and nobody knows"

    def teardown(self):
        """In the end everybody has been served, once, or told."""
        for one in getattr(self, "inside", {}):
            one.pins = 0
        for _ in range(1000 if hasattr(self, "books") else 0):
            if self.moving:
                self.moved(False)
                self.budgets_are_kept()
            for one in self.inside:
                self.served, self.inside[one] = self.served + self.inside[one], 0
            self.move()
            if self.moving is None:
                assert not any(self.before.values()) and not self.books.wanted
                assert self.asked == self.served + self.refused
                assert not any(one.leaving for one in self.books)
                return
        assert not hasattr(self, "books"), "they move for ever"


Models.TestCase.settings = settings(stateful_step_count=40)
TestModels = Models.TestCase


def settle(books: Residents) -> list[str]:
    told = []
    while move := books.next():
        books.begin(move)
        books.ended(move)
        told.append(f"{move.what} {move.who.name} {move.to}")
    return told


def models(*names: str, **options) -> list[Resident]:
    return [Resident(name, 40, 30, frozenset("a"), used=n, **options) for n, name in enumerate(names)]


def test_the_least_recently_used_goes_and_the_host_keeps_the_latest():
    books = Residents(device=80, host=60)
    a, b, c = models("a", "b", "c")
    c.tier, c.stored = "disk", True
    for one in (a, b, c):
        books.enter(one)
    books.want(c)
    assert settle(books) == ["leave a device", "sleep a host", "wake c device"]
    a.used, c.used = 3, 4
    books.want(a)
    assert settle(books) == ["leave b device", "sleep b host", "wake a device"]
    b.used = 5
    books.want(b)
    assert settle(books) == ["leave a device", "sleep a host", "wake b device"]


def test_a_copy_on_the_host_is_made_once_and_goes_before_those_who_sleep():
    books = Residents(device=80, host=60)
    a, b, c, d = models("a", "b", "c", "d", keeps=True)
    for one in (a, b):
        books.enter(one)
    for one in (c, d):
        one.tier, one.stored = "disk", True
        books.enter(one)
    books.want(c)
    assert settle(books) == ["leave a device", "sleep a host", "wake c device"]
    a.used = 4
    books.want(a)  # whose copy stays while it is awake
    assert settle(books) == ["leave b device", "sleep b host", "wake a device"] and a.copied and b.copied
    books.want(d)
    d.used = 5
    assert settle(books) == ["leave c device", "drop a device", "sleep c host", "wake d device"]
    assert not a.copied and b.copied, "b sleeps and would have to come from the disk"


def test_what_is_used_least_recently_of_all_goes_to_the_disk_itself():
    books = Residents(device=40, host=30)
    a, b = models("a", "b")
    b.tier, b.copied = "host", True
    books.enter(a)
    books.enter(b)
    books.want(b)
    assert settle(books) == ["leave a device", "sleep a disk", "wake b device"]


def test_a_claim_of_all_there_is_takes_what_those_who_work_leave():
    books = Residents(device=100, host=100)
    a, b = models("a", "b")
    a.busy = True
    claim = Resident("new", 0, fixed=True, all=True, tier="disk")
    for one in (a, b, claim):
        books.enter(one)
    books.want(claim)
    assert settle(books) == ["leave b device", "sleep b host", "wake new device"] and claim.size == 60
    books.want(b)
    assert settle(books) == ["leave a device"], "who works is waited for"
    books.leave(claim)
    assert settle(books) == ["stay a device", "wake b device"]


def test_a_newcomer_whose_weights_pass_through_the_host_finds_it_free():
    books = Residents(device=100, host=60)
    a, b = models("a", "b", tier="host", copied=True)
    books.enter(a)
    books.enter(b)
    books.enter(Resident("large", 40, devices=frozenset("a"), stage=20))
    assert settle(books) == ["store a disk"] and a.stored


@pytest.mark.parametrize("fixed", [0, 30])
def test_what_can_never_fit_is_refused(fixed):
    books = Residents(device=100, host=100)
    books.enter(Resident("streamed", fixed, devices=frozenset("a"), fixed=True))
    large = Resident("large", 101 - fixed, devices=frozenset("a"), tier="disk", stored=True)
    books.enter(large)
    books.want(large)
    assert settle(books) == ["refuse large device"] and books.least(large) == 101
