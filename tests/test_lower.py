"""Pages below the device, in short histories; tests/test_prefix.py and tests/test_scheduler.py have random ones."""

from __future__ import annotations

import pytest

from jaxinfer.scheduler import PageGroup, PrefixTree
from jaxinfer.scheduler.lower import DOUBT, Costs
from tests.test_prefix import Shelves, drop, grow, known, squeeze


class Kept:
    """A tree with tiers, and what they hold."""

    def __init__(self, pages: int, host: int, disk: int = 0, windows: tuple[int | None, ...] = (None,)):
        groups = [PageGroup(f"kv{i}", 2, pages, window) for i, window in enumerate(windows)]
        self.tree = PrefixTree(groups, {g.name: host for g in groups}, {g.name: disk for g in groups})
        assert self.tree.lower is not None
        self.lower, self.lower.open = self.tree.lower, True
        self.shelves = Shelves({g.name: [[None] * 2 for _ in range(pages)] for g in groups})

    def obey(self) -> list[str]:
        kinds = [kind for kind, *_ in self.tree.moves]
        self.shelves.obey(self.tree.moves)
        self.tree.moves.clear()
        return kinds

    def work(self) -> None:
        while self.shelves.asked:
            self.shelves.work(self.lower, self.lower.arrived)

    def read(self, tokens: str) -> None:
        drop(self.tree, grow(self.tree, tokens)[1])

    def match(self, tokens: str) -> int:
        """The tokens that need not be read, with what is brought back for them."""
        match = self.tree.match("", tuple(map(ord, tokens)), len(tokens))
        self.tree.bring(match)
        drop(self.tree, match.pages)
        for name, page in match.copies:
            self.tree.release(name, [page])
        return match.length

    def fetch(self, tokens: str) -> int:
        return self.tree.fetch("", tuple(map(ord, tokens)), len(tokens))


def test_what_is_evicted_goes_to_the_host_and_comes_back():
    kept = Kept(pages=3, host=9)
    kept.read("abcdef")
    kept.read("uvwxyz")
    assert kept.obey() == ["out"] * 3 and known(kept.tree, "uvwxyz") == 6
    assert kept.match("abcdef!") == 6
    assert kept.obey() == ["out"] * 3 + ["in"] * 3, "those that go make room before the others come"
    assert (kept.lower.left, kept.lower.returned) == (6, 3)
    assert kept.match("uvwxyz!") == 6 and kept.obey() == ["in"] * 3, "what was on the host already went there again"


def test_only_what_is_missing_is_brought_and_a_beginning_may_end_on_the_host():
    kept = Kept(pages=4, host=9)
    kept.read("abcdefgh")
    squeeze(kept.tree, 2, "kv0")
    assert kept.obey() == ["out"] * 2 and kept.match("abcdefgh!") == 8 and kept.obey() == ["in"] * 2


@pytest.mark.parametrize(("back", "expected"), [(None, 6), (0.0, 6), (1.9, 6), (2.1, 0)])
def test_a_page_comes_back_if_that_takes_less_than_reading_its_tokens(back, expected):
    kept = Kept(pages=3, host=9)
    kept.lower.costs.token, kept.lower.costs.back = 1.0, back
    kept.read("abcdef")
    squeeze(kept.tree, 3, "kv0")
    match = kept.tree.match("", tuple(map(ord, "abcdef!")), 6)
    assert match.length == expected and match.again == (0 if expected else 3)
    kept.tree.give_up(match)
    kept.shelves.obey(kept.tree.moves)
    kept.shelves.check_places(kept.lower, [n for n in kept.lower.slots["host", "kv0"].owner if n])


def test_an_estimate_that_says_no_is_tried_again_some_day():
    kept = Kept(pages=3, host=9)
    kept.lower.costs.token, kept.lower.costs.back = 1.0, 4.0
    kept.read("abcdef")
    squeeze(kept.tree, 3, "kv0")
    declined = 0
    while not kept.match("abcdef!"):
        kept.lower.decline(3)
        declined += 1
    assert 4.0 * DOUBT ** declined <= 2.0 < 4.0 * DOUBT ** (declined - 1) and kept.lower.declined == 3 * declined


def test_costs_follow_what_is_measured():
    costs = Costs()
    costs.note("back", 2.0)
    assert costs.back == 2.0 and costs.read is None
    for _ in range(30):
        costs.note("back", 1.0)
    assert costs.back == pytest.approx(1.0, abs=1e-3)


def test_of_a_beginning_on_host_and_disk_as_much_is_had_as_is_worth_it():
    kept = Kept(pages=4, host=2, disk=9)
    kept.lower.costs.token, kept.lower.costs.back, kept.lower.costs.read = 1.0, 0.5, 9.0
    kept.read("abcdefgh")
    for _ in range(4):  # the last pages first; the disk is done with each before the next one wants its place
        squeeze(kept.tree, 1, "kv0")
        kept.obey()
        kept.work()
    assert kept.fetch("abcdefgh!") == 0, "the disk is too slow"
    assert kept.match("abcdefgh!") == 4 and kept.obey() == ["in"] * 2
    kept.lower.costs.read = 1.0
    assert kept.fetch("abcdefgh!") == 2
    kept.obey()
    kept.work()
    assert kept.match("abcdefgh!") == 8 and kept.obey() == ["in"] * 2


def test_what_is_on_the_disk_comes_to_the_host_first_one_request_after_another():
    kept = Kept(pages=4, host=4, disk=9)
    kept.read("abcdefgh")
    squeeze(kept.tree, 4, "kv0")
    kept.obey()
    kept.work()
    kept.read("stuvwxyz")
    squeeze(kept.tree, 4, "kv0")
    assert kept.obey() == ["out", "write"] * 4
    kept.work()
    assert kept.lower.slots["disk", "kv0"].used == 8
    assert kept.match("abcdefgh!") == 0 and kept.fetch("abcdefgh!") == 4 and kept.obey() == ["read"] * 4
    assert kept.fetch("stuvwxyz!") == 0, "one after another"
    kept.work()
    assert kept.match("abcdefgh!") == 8 and kept.obey() == ["in"] * 4 and kept.lower.fetched == 4


def test_a_window_is_restored_from_the_host():
    kept = Kept(pages=5, host=20, windows=(None, 3))
    kept.read("abcdefgh")
    for group in ("kv0", "kv1"):
        squeeze(kept.tree, 4, group)
    kept.obey()
    assert known(kept.tree, "abcdefghi") == 8
    assert kept.match("abcdefghi") == 8 and kept.obey() == ["in"] * 5, "four pages, and the one that the window shows"


def test_what_nobody_can_ask_for_any_more_gives_its_places_back():
    kept = Kept(pages=3, host=3, disk=3)
    kept.read("abcdef")
    squeeze(kept.tree, 3, "kv0")
    kept.obey()
    kept.tree.forget("")
    host, disk = (kept.lower.slots[tier, "kv0"] for tier in ("host", "disk"))
    assert (host.used, disk.used, len(host._free)) == (0, 0, 0), "they are still being written"
    kept.work()
    assert len(host._free) == len(disk._free) == 3


def test_a_full_host_gives_up_the_least_recently_used_and_what_is_below_it_in_the_tree():
    kept = Kept(pages=2, host=3)
    kept.read("abcd")
    kept.read("uvwx")
    kept.read("1234")
    kept.obey()
    assert kept.lower.slots["host", "kv0"].used == 3
    assert kept.match("abcd!") == 2, "of a beginning, the end goes first"
    kept.obey()
    assert kept.match("uvwx!") == 2


def test_a_tier_that_fails_is_closed_and_pages_are_read_again():
    kept = Kept(pages=3, host=9, disk=9)
    kept.read("abcdef")
    squeeze(kept.tree, 3, "kv0")
    kept.lower.close("disk")
    kept.obey()
    assert kept.lower.slots["disk", "kv0"].used == 0 and kept.match("abcdef!") == 6
    kept.lower.close("host")
    assert not kept.lower.open and known(kept.tree, "abcdef!") == 6
    squeeze(kept.tree, 3, "kv0")
    assert known(kept.tree, "abcdef!") == 0 and not kept.tree.namespaces
