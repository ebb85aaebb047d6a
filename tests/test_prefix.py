"""Whoever is given a page by the tree finds in it what it was promised; a page that nobody needs can always be had.
With tiers below the device: wherever a page has been meanwhile."""

from __future__ import annotations

from collections import deque
from copy import deepcopy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.scheduler import PageGroup
from jaxinfer.scheduler.lower import Lower, Move
from jaxinfer.scheduler.prefix import LOOK, Match, Node, PrefixTree

TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=20)


@dataclass
class Reader:
    """A sequence: what it has to read, how much of it is in its pages, and where it is in the tree."""

    namespace: str
    tokens: tuple[int, ...]
    read: int
    node: Node | None
    pages: dict[str, list[int | None]] = field(default_factory=dict)


def nodes(tree: PrefixTree) -> list[tuple[str, tuple[int, ...], tuple[Node, ...]]]:
    """Every node: its namespace, the tokens up to its end, and the nodes from the root's child down to it."""
    found = [(name, (), (root,)) for name, root in tree._top.below.items()]
    for namespace, tokens, path in found:
        found += [(namespace, tokens + child.key, (*path, child)) for child in path[-1].below.values()]
    return [(namespace, tokens, path[1:]) for namespace, tokens, path in found if len(path) > 1]


def longest(tree: PrefixTree, namespace: str, tokens: tuple[int, ...], most: int) -> int:
    """How long a match should be, by looking at every node and every length."""
    size = tree.page_size

    def restorable(path: tuple[Node, ...], end: int) -> bool:
        needed = [(g.name, node) for g in tree.groups for node in path[g.first(end):]]
        return all(node.pages[name] is not None for name, node in needed)

    whole, inside = [0], []
    for name, known, path in nodes(tree):
        for end in range(size * (len(path) - 1) + 1, min(len(known), most) + 1) if name == namespace else ():
            if known[:end] == tokens[:end] and restorable(path, end):
                (inside if end % size else whole).append(end)
    full = max(whole)
    return max([full, *(end for end in inside if end - full >= size // 4 or end >= len(tokens) - 1)])


class Shelves:
    """What the host and the disk hold, for a scheduler that only says what is to be moved. The disk is as slow as a
    test wants it: `work` does what it was asked, in order."""

    def __init__(self, pages: dict[str, list[list]]):
        self.pages = pages  # of the device, by group
        self.host: dict[tuple[str, int], list] = {}
        self.disk: dict[tuple[str, int], list] = {}
        self.asked: deque[tuple[Move, list | None]] = deque()

    def obey(self, moves: list[Move]):
        for kind, name, source, target in moves:
            if kind == "copy":
                self.pages[name][target] = list(self.pages[name][source])
            elif kind == "out":
                self.host[name, target] = list(self.pages[name][source])
            elif kind == "in":
                self.pages[name][target] = list(self.host[name, source])
            else:
                content = self.host[name, source] if kind == "write" else None
                self.asked.append(((kind, name, source, target), content))

    def work(self, lower: Lower, arrived) -> None:
        (kind, name, source, target), content = self.asked.popleft()
        if kind == "write":
            self.disk[name, target] = content
            lower.written(name, source, target)
        else:
            self.host[name, target] = self.disk[name, source]
            arrived(name, source, target)

    def lose(self):
        for shelf in (self.host, self.disk, self.asked):
            shelf.clear()

    def kept(self, tier: str, name: str, place: int) -> list:
        """What is there, or is on its way there."""
        writing = [content for (kind, group, _, target), content in self.asked
                   if (tier, kind, group, target) == ("disk", "write", name, place)]
        return writing[-1] if writing else {"host": self.host, "disk": self.disk}[tier][name, place]

    def check_places(self, lower: Lower, nodes: list[Node]):
        """Every place below the device is free, somebody's, or pinned; and no more are pinned than something is done
        with."""
        busy = [(("host", name, source if kind == "write" else target), ("disk", name, target if kind == "write" else
                                                                           source))
                for (kind, name, source, target), _ in self.asked]
        for (tier, name), slots in lower.slots.items():
            mine = {node.kept[tier, name]: node for node in nodes if (tier, name) in node.kept}
            assert {slot: node for slot, node in enumerate(slots.owner) if node} == mine
            pins = [sum((tier, name, slot) in pair for pair in busy) for slot in range(len(slots.owner))]
            held = [slot for group, slot in lower._held if (tier, group) == ("host", name)]
            assert slots.pins == [count + held.count(slot) for slot, count in enumerate(pins)]
            assert sorted([*slots._free, *({*mine} | {s for s, n in enumerate(slots.pins) if n})]) == [
                *range(len(slots.owner))]
            assert set(slots._idle) == {slot for slot in mine if not slots.pins[slot]}
        assert all(slot < len(lower.slots["host", name].owner) for name, slot in self.host), "more than is allowed"


TIERS = st.sampled_from((None, None, (2, 0), (5, 0), (20, 0), (1, 3), (4, 4), (3, 20)))  # pages of the host, the disk
SECONDS = st.sampled_from((None, 0.0, 0.5, 2.0, 9.0, 100.0))


class Tiered(RuleBasedStateMachine):
    """What may happen to the tiers `lower` of a `tree`, whoever uses it."""

    @precondition(lambda self: self.lower)
    @rule(what=st.sampled_from(("token", "back", "read")), seconds=SECONDS)
    def measure(self, what, seconds):
        setattr(self.lower.costs, what, seconds)

    @precondition(lambda self: self.lower)
    @rule(tier=st.sampled_from(("host", "disk")), really=st.integers(0, 9))
    def close_tier(self, tier, really):
        if not really:
            self.lower.close(tier)
            assert not any(kept == tier for _, _, path in nodes(self.tree) for kept, _ in path[-1].kept)


class AnyUse(Tiered):
    """Sequences come, read, leave tails, fork, end, and find less than they hoped for, in any order. Every slot of
    every page remembers the whole beginning that was read into it, as a KV cache does."""

    @initialize(size=st.integers(1, 5), pages=st.integers(2, 12), windows=st.sampled_from(
        ((None,), (None,), (4,), (None, 5), (3, None), (None, 1, None), (2, 7))), tiers=TIERS)
    def open(self, size, pages, windows, tiers):
        self.groups = tuple(PageGroup(f"group{i}", size, pages + i, window) for i, window in enumerate(windows))
        host, disk = ({group.name: count for group in self.groups} for count in tiers or (0, 0))
        self.tree = PrefixTree(self.groups, host, disk) if tiers else PrefixTree(self.groups)
        self.lower = self.tree.lower
        if self.lower:
            self.lower.open = True
        self.size = size
        self.slots = {group.name: [[None] * size for _ in range(group.pages)] for group in self.groups}
        self.shelves = Shelves(self.slots)
        self.readers: list[Reader] = []

    # What happens.

    @rule(namespace=st.sampled_from("ab"), tokens=TOKENS, less=st.integers(0, 2))
    def come(self, namespace, tokens, less):
        self._come(namespace, tuple(tokens), len(tokens) - less)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), more=TOKENS, keep=st.integers(0, 20))
    def come_again(self, data, more, keep):
        """Somebody begins like somebody else and goes on differently: a fork, another turn."""
        like = data.draw(st.sampled_from(self.readers))
        tokens = like.tokens[:keep] + tuple(more)
        self._come(like.namespace, tokens, len(tokens) - 1)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), count=st.integers(1, 12), extend=st.integers(0, 3), tail=st.booleans())
    def read(self, data, count, extend, tail):
        """Pages are taken, written, and told to the tree; now and then nobody tells it."""
        reader = data.draw(st.sampled_from(self.readers))
        end = min(reader.read + count, len(reader.tokens))
        self._slide(reader)
        if not self._reserve(reader, end):
            return self._end(reader)
        for at in range(reader.read, end):
            self._write(reader, at)
        before, reader.read = reader.read, end
        if extend:
            for page in range(before // self.size, end // self.size):
                self._extend(reader, page, self.size)
            if tail and end % self.size:
                self._extend(reader, end // self.size, end % self.size)
        elif before // self.size < end // self.size:
            reader.node = Node(None, None)  # what comes after a gap cannot be told, as below a forgotten node
        self._slide(reader)

    @precondition(lambda self: self.lower)
    @rule(visitors=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 2), st.integers(6, 12)), min_size=4,
                            max_size=8))
    def visit(self, visitors):
        """One after another comes, reads all that it has to, and goes: few pages are in use, and most have to leave."""
        for namespace, like, length in visitors:
            before, tokens = len(self.readers), (like,) * length
            self.tree.fetch(namespace, tokens, length - 1)
            self._obey()
            while self.shelves.asked:
                self.shelves.work(self.lower, self.lower.arrived)
            self._come(namespace, tokens, length - 1)
            if len(self.readers) > before:
                reader = self.readers[-1]
                if self._reserve(reader, length):
                    for at in range(reader.read, length):
                        self._write(reader, at)
                    start, reader.read = reader.read, length
                    for page in range(start // self.size, length // self.size):
                        self._extend(reader, page, self.size)
                self._end(reader)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def end(self, data):
        self._end(data.draw(st.sampled_from(self.readers)))

    @rule(data=st.data(), count=st.integers(1, 12))
    def press(self, data, count):
        """Somebody takes pages, and gives them back at once."""
        group = data.draw(st.sampled_from(self.groups)).name
        taken = [self.tree.take(group) for _ in range(min(count, self.tree.obtainable(group)))]
        self._obey()
        assert None not in taken and len(set(taken)) == len(taken)
        assert all(self.tree.pools[group].holders[page] == 1 for page in taken)
        self.tree.release(group, taken)

    @rule()
    def clear(self):
        self.tree.clear()
        self.shelves.lose()
        assert nodes(self.tree) == [] and set(self.tree.pages.values()) == {0}

    @rule(namespace=st.sampled_from("ab"))
    def forget(self, namespace):
        self.tree.forget(namespace)
        assert namespace not in self.tree.namespaces

    @precondition(lambda self: self.lower)
    @rule(namespace=st.sampled_from("ab"), tokens=TOKENS)
    def fetch(self, namespace, tokens):
        before = len(self.lower.reading)
        coming = self.tree.fetch(namespace, tuple(tokens), len(tokens))
        self._obey()
        assert coming == (0 if before else len(self.lower.reading))

    @precondition(lambda self: self.shelves.asked)
    @rule(count=st.integers(1, 9))
    def work(self, count):
        for _ in range(min(count, len(self.shelves.asked))):
            self.shelves.work(self.lower, self.lower.arrived)

    # How.

    def _obey(self):
        self.shelves.obey(self.tree.moves)
        self.tree.moves.clear()

    def _come(self, namespace: str, tokens: tuple[int, ...], most: int):
        wide = any(len(path[-1].below) > LOOK for _, _, path in nodes(self.tree))
        expected = longest(self.tree, namespace, tokens, most)
        match = self.tree.match(namespace, tokens, most)
        if match.missing:
            assert match.length > expected and match.length % self.size == 0
            if any(self.tree.obtainable(group.name) < sum(name == group.name for name, *_ in match.missing)
                   for group in self.groups):
                return self.tree.give_up(match)
            self.tree.bring(match)
            self._obey()
        else:
            assert match.length == expected or (wide and match.length < expected)
        assert bool(match.copies) == bool(match.length % self.size)
        reader = Reader(namespace, tokens, match.length, match.node, match.pages)
        self.readers.append(reader)
        if self._copy(reader, match):
            self._check_reader(reader)
        else:
            self._end(reader)

    def _copy(self, reader: Reader, match: Match) -> bool:
        assert {name for name, _ in match.copies} in (set(), {group.name for group in self.groups})
        assert all(len(pages) == match.length // self.size for pages in match.pages.values())
        done = self._reserve(reader, match.length)
        for name, page in match.copies:
            if done:
                self.slots[name][reader.pages[name][-1]] = list(self.slots[name][page])
            self.tree.release(name, [page])
        return done

    def _reserve(self, reader: Reader, end: int) -> bool:
        for name, pages in reader.pages.items():
            while len(pages) * self.size < end:
                page = self.tree.take(name)
                if page is None:
                    return False
                self._obey()
                pages.append(page)
                self.slots[name][page] = [None] * self.size
        return True

    def _write(self, reader: Reader, at: int):
        for name, pages in reader.pages.items():
            page = pages[at // self.size]
            if page is not None:  # a long read may run out of its own window
                assert self.tree.pools[name].holders[page] <= 2, "a page that others read is written to"
                self.slots[name][page][at % self.size] = (reader.namespace, reader.tokens[:at + 1])

    def _extend(self, reader: Reader, page: int, count: int):
        tokens = reader.tokens[page * self.size:][:count]
        known = reader.node is None or reader.node.parent is not None
        pages = {name: held[page] for name, held in reader.pages.items()}
        node = self.tree.extend(reader.node, reader.namespace, tokens, pages)
        assert node.key == tokens if known else node is reader.node
        assert not known or all(node.pages[name] is not None for name, held in pages.items() if held is not None)
        if count == self.size:
            reader.node = node

    def _slide(self, reader: Reader):
        for group in self.groups:
            pages, first = reader.pages[group.name], group.first(reader.read)
            self.tree.release(group.name, pages[:first])
            pages[:first] = [None] * len(pages[:first])

    def _end(self, reader: Reader):
        self.readers.remove(reader)
        for name, pages in reader.pages.items():
            self.tree.release(name, pages)

    # What must hold.

    def _check_reader(self, reader: Reader):
        """A reader can see all that its windows show, as it would have read it itself."""
        for group in self.groups:
            shown = range(0 if group.window is None else max(0, reader.read - group.window + 1), reader.read)
            for at in shown:
                page = reader.pages[group.name][at // self.size]
                assert self.slots[group.name][page][at % self.size] == (reader.namespace, reader.tokens[:at + 1])

    @invariant()
    def every_reader_still_sees_what_it_has_read(self):
        for reader in self.readers:
            self._check_reader(reader)

    @invariant()
    def every_page_is_free_or_held_by_those_that_list_it(self):
        for group in self.groups:
            mine = [path[-1].pages[group.name] for _, _, path in nodes(self.tree)]
            mine = [page for page in mine if page is not None]
            theirs = [page for reader in self.readers for page in reader.pages[group.name] if page is not None]
            pool = self.tree.pools[group.name]
            assert len(mine) == len(set(mine)) == self.tree.pages[group.name]
            assert pool.holders == [(mine + theirs).count(page) for page in range(group.pages)]
            assert pool.free == pool.holders.count(0)
            assert {page for page in mine if page not in theirs} == set(self.tree._idle[group.name])

    @invariant()
    def every_node_holds_what_it_says(self):
        for namespace, tokens, path in nodes(self.tree):
            node, start = path[-1], self.size * (len(path) - 1)
            assert len(tokens) > start and (len(node.key) == self.size or not node.below)
            assert node.below or node.kept or set(node.pages.values()) != {None}, "an empty node is left"
            for group in self.groups:
                page = node.pages[group.name]
                copies = [self.shelves.kept(tier, name, place) for (tier, name), place in node.kept.items()
                          if name == group.name]
                if page is not None:
                    copies.append(self.slots[group.name][page])
                assert copies or group.window is not None
                for copy in copies:
                    assert copy[:len(node.key)] == [(namespace, tokens[:at + 1]) for at in range(start, len(tokens))]
        assert all(root.below for root in self.tree._top.below.values()), "an empty namespace is left"

    @precondition(lambda self: self.lower)
    @invariant()
    def every_place_below_is_free_or_somebodys(self):
        self.shelves.check_places(self.lower, [path[-1] for _, _, path in nodes(self.tree)])

    @invariant()
    def idle_pages_go_from_the_leaves_up(self):
        for group in self.groups:
            order = {page: i for i, page in enumerate(self.tree._idle[group.name])}
            for _, _, path in nodes(self.tree) if group.window is None else ():
                idle = [order[node.pages[group.name]] for node in path if node.pages[group.name] in order]
                assert idle == sorted(idle, reverse=True)

    @invariant()
    def exactly_the_obtainable_pages_can_be_taken(self):
        for group in self.groups:
            tree = deepcopy(self.tree)
            taken = [tree.take(group.name) for _ in range(tree.obtainable(group.name))]
            held = {page for reader in self.readers for page in reader.pages[group.name]}
            assert None not in taken and not set(taken) & held and tree.take(group.name) is None

    def teardown(self):
        if hasattr(self, "tree"):
            for reader in tuple(self.readers):
                self._end(reader)
            assert all(self.tree.obtainable(group.name) == group.pages for group in self.groups)
            self.tree.clear()
            assert all(self.tree.pools[group.name].free == group.pages for group in self.groups)


class TestAnyUse(AnyUse.TestCase):
    settings = settings(max_examples=5 * settings().max_examples, stateful_step_count=30)


@pytest.mark.long
class TestMoreUses(AnyUse.TestCase):
    settings = settings(stateful_step_count=50)


# Short histories.


def grow(tree: PrefixTree, tokens: str, namespace: str = "", node: Node | None = None) -> tuple[Node | None, dict]:
    """Read `tokens` (a letter each) below `node` into fresh pages, all of them still held."""
    pages = {group.name: [] for group in tree.groups}
    for start in range(0, len(tokens), tree.page_size):
        part = tuple(map(ord, tokens[start:start + tree.page_size]))
        for name, held in pages.items():
            held.append(tree.take(name))
        below = tree.extend(node, namespace, part, {name: held[-1] for name, held in pages.items()})
        node = below if len(part) == tree.page_size else node
    return node, pages


def drop(tree: PrefixTree, pages: dict) -> None:
    for name, held in pages.items():
        tree.release(name, held)


def known(tree: PrefixTree, tokens: str, namespace: str = "") -> int:
    """How much of `tokens` is known; looking does not count as use."""
    tree = deepcopy(tree)
    return tree.match(namespace, tuple(map(ord, tokens)), len(tokens)).length


def use(tree: PrefixTree, tokens: str) -> None:
    match = tree.match("", tuple(map(ord, tokens)), len(tokens))
    drop(tree, match.pages)
    for name, page in match.copies:
        tree.release(name, [page])


def squeeze(tree: PrefixTree, count: int = 1, group: str = "kv") -> None:
    """Make the tree give up `count` pages."""
    taken = [tree.take(group) for _ in range(tree.pools[group].free + count)]
    tree.release(group, taken)


def test_what_was_used_least_recently_goes_first():
    tree = PrefixTree([PageGroup("kv", 4, 3)])
    for tokens in ("aaaa", "bbbb", "cccc"):
        drop(tree, grow(tree, tokens)[1])
    use(tree, "aaaa")
    squeeze(tree)
    assert [known(tree, tokens) for tokens in ("aaaa", "bbbb", "cccc")] == [4, 0, 4] and tree.evicted == 1
    node = tree.extend(None, "", tuple(map(ord, "cccc")), {"kv": (page := tree.take("kv"))})
    assert node.pages["kv"] != page, "the tree took a second page for the same tokens"
    tree.release("kv", [page])
    squeeze(tree, 1)
    assert [known(tree, tokens) for tokens in ("aaaa", "cccc")] == [0, 4], "reading the same again is no use"


def test_a_prompt_is_forgotten_from_its_end():
    tree = PrefixTree([PageGroup("kv", 2, 6)])
    drop(tree, grow(tree, "systemQA")[1])
    drop(tree, grow(tree, "xxxx")[1])
    for left in (6, 4, 2, 0):
        squeeze(tree)
        assert known(tree, "systemQA") == left and known(tree, "xxxx") == 4
    squeeze(tree, 2)
    assert tree.pools["kv"].free == 6 and not tree._top.below


def test_a_page_in_use_stays_however_many_are_wanted():
    tree = PrefixTree([PageGroup("kv", 2, 4)])
    _, pages = grow(tree, "abcd")
    drop(tree, grow(tree, "wxyz")[1])
    assert tree.obtainable("kv") == 2 and [tree.take("kv") is None for _ in range(3)] == [False, False, True]
    assert known(tree, "abcd") == 4 and known(tree, "wxyz") == 0
    drop(tree, pages)


def test_a_match_inside_a_page_is_copied_if_that_is_worth_it():
    tree = PrefixTree([PageGroup("kv", 8, 9)])
    _, pages = grow(tree, "abcdefgh" "ijklmnop")
    match = lambda tokens, most: tree.match("", tuple(map(ord, tokens)), most)
    assert match("abcdefgh" "ij??????", 16).length == 10
    assert match("abcdefgh" "i???????", 16).length == 8, "a copy for one token"
    assert match("abcdefgh" "i?", 9).length == 9, "all of a prompt is known, but one token"
    got = match("abcdefgh" "ijkl", 11)
    assert (got.length, got.pages, got.copies) == (11, {"kv": pages["kv"][:1]}, (("kv", pages["kv"][1]),))
    assert tree.pools["kv"].holders[pages["kv"][1]] == 5  # its reader, the tree, three matches


def test_a_tail_is_known_and_then_the_longer_one_and_then_the_page():
    tree = PrefixTree([PageGroup("kv", 4, 9)])
    page = tree.take("kv")
    assert page is not None
    for tokens in ("ab", "abc", "abcd"):
        tree.extend(None, "", tuple(map(ord, tokens)), {"kv": page})
        assert known(tree, "abcd") == len(tokens) and tree.pages["kv"] == 1 and len(nodes(tree)) == 1
        assert tree.pools["kv"].holders[page] == 2


def test_a_tail_goes_also_if_somebody_else_filled_the_page_first():
    tree = PrefixTree([PageGroup("kv", 4, 9)])
    _, mine = grow(tree, "abc")
    _, theirs = grow(tree, "abcd")
    tree.extend(None, "", tuple(map(ord, "abcd")), {"kv": mine["kv"][0]})
    assert tree.pages["kv"] == 1 and tree.pools["kv"].holders[mine["kv"][0]] == 1
    assert tree.match("", tuple(map(ord, "abcd")), 4).pages == theirs


def test_namespaces_share_nothing():
    tree = PrefixTree([PageGroup("kv", 2, 9)])
    grow(tree, "abcd", "one model")
    assert known(tree, "abcd", "one model") == 4 and known(tree, "abcd", "another") == known(tree, "abcd") == 0


def test_a_window_is_restored_from_the_pages_it_shows():
    tree = PrefixTree([PageGroup("kv", 2, 9), PageGroup("near", 2, 4, window=3)])
    _, pages = grow(tree, "abcdefgh")
    drop(tree, pages)
    match = tree.match("", tuple(map(ord, "abcdefghi")), 8)
    assert match.length == 8 and match.pages == {"kv": pages["kv"], "near": [None, None, None, pages["near"][3]]}
    drop(tree, match.pages)
    squeeze(tree, 1, "near")
    assert known(tree, "abcdefghi") == 8 and tree.pages == {"kv": 4, "near": 3}, "the first is needed least"
    held = tree.match("", tuple(map(ord, "abcdef")), 6)
    squeeze(tree, 2, "near")
    assert known(tree, "abcdefghi") == 6, "the last but one is what a match can still be restored from"
    drop(tree, held.pages)
    squeeze(tree, 1, "near")
    assert known(tree, "abcdefghi") == 0 and tree.pages == {"kv": 4, "near": 0}
    _, again = grow(tree, "abcdefgh")
    assert known(tree, "abcdefghi") == 8 and tree.pages == {"kv": 4, "near": 4}, "what was dropped is not completed"
    drop(tree, again)


def test_where_a_window_is_gone_a_neighbour_may_still_show_most_of_it():
    tree = PrefixTree([PageGroup("kv", 4, 9), PageGroup("near", 4, 5, window=4)])
    drop(tree, grow(tree, "abcdefgh")[1])
    drop(tree, grow(tree, "abcdefgz")[1])
    squeeze(tree, 2, "near")
    assert tree.pages == {"kv": 3, "near": 1}
    assert known(tree, "abcdefgh") == 7 and known(tree, "abcd") == 0


def test_a_copy_needs_the_window_before_it_too():
    tree = PrefixTree([PageGroup("kv", 4, 9), PageGroup("near", 4, 2, window=6)])
    drop(tree, grow(tree, "abcdefgh")[1])
    assert known(tree, "abcdefg?") == 7
    squeeze(tree, 1, "near")
    assert known(tree, "abcdefg?") == 0 and tree.pages == {"kv": 2, "near": 1}


def test_whoever_read_the_same_at_the_same_time_keeps_its_pages_and_the_tree_forgets_them():
    tree = PrefixTree([PageGroup("kv", 2, 8)])
    _, first = grow(tree, "abcd")
    node, second = grow(tree, "abcdef")
    assert tree.pages["kv"] == 3 and known(tree, "abcdef") == 6
    drop(tree, first)
    assert tree.obtainable("kv") == 5  # three are free, two are idle, above one that is in use
    squeeze(tree, 2)
    assert known(tree, "abcdef") == 0 and tree.pages["kv"] == 0
    assert tree.extend(node, "", (1, 2), {"kv": 7}) is node and tree.pages["kv"] == 0
    drop(tree, second)
    assert tree.pools["kv"].free == 8


def test_pages_that_were_read_twice_still_go_from_the_end():
    tree = PrefixTree([PageGroup("kv", 2, 8)])
    _, first = grow(tree, "abcd")
    _, second = grow(tree, "abcdef")
    drop(tree, first)
    drop(tree, second)
    squeeze(tree)
    assert known(tree, "abcdef") == 4, "the beginning, given back before the end, went first"


def test_reading_on_below_a_page_that_somebody_else_has_is_use_of_it():
    tree = PrefixTree([PageGroup("kv", 2, 8)])
    _, first = grow(tree, "abcd")
    node, second = grow(tree, "abcd")
    drop(tree, first)
    drop(tree, grow(tree, "wxyz")[1])
    _, more = grow(tree, "ef", node=node)
    squeeze(tree, 2)
    assert known(tree, "abcdef") == 6 and known(tree, "wxyz") == 0
    drop(tree, second)
    drop(tree, more)


@given(forks=st.integers(2, 60))
def test_among_many_continuations_the_recent_ones_are_found(forks):
    tree = PrefixTree([PageGroup("kv", 4, 200)])
    node, _ = grow(tree, "abcd")
    for i in range(forks):
        _, pages = grow(tree, chr(1000 + i) + "xyz", node=node)
        drop(tree, pages)
    for i in range(forks):
        tokens = tuple(map(ord, "abcd" + chr(1000 + i) + "x?"))
        assert tree.match("", tokens, 7).length == (6 if i >= forks - LOOK else 4)
    assert known(tree, "abcd" + chr(1000) + "xyz") == 8, "a whole page is found however long ago"


@pytest.mark.parametrize("used", ("abcdWxyz", "abcdWx?", "again"))
def test_a_continuation_that_is_used_becomes_a_recent_one(used):
    tree = PrefixTree([PageGroup("kv", 4, 200)])
    node, _ = grow(tree, "abcd")
    grow(tree, "Wxyz", node=node)
    for i in range(2 * LOOK - 2):
        if i == LOOK - 1:
            _ = grow(tree, "Wxyz", node=node) if used == "again" else use(tree, used)
        grow(tree, chr(1000 + i) + "xyz", node=node)
    assert known(tree, "abcdWx?") == 6
