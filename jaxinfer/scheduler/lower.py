"""The tiers below the device: where pages go that the prefix tree has to evict, and whether they are worth their way
back.

An evicted page goes to the host and, from there, to the disk at once, so that its place on the host can be had without
a wait. Whoever begins like it gets it back, if that takes less time than reading its tokens again (`Costs`). From the
disk a page comes back to the host first, while its request waits and the others run.

Nothing is moved here: `moves` say what is to be, in order (`Move`), and `arrived` and `written` are told what was.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from jaxinfer.scheduler.pages import PageGroup

if TYPE_CHECKING:
    from jaxinfer.scheduler.prefix import Node

# What is done, the state group, from where, and to where. "copy": page, page. "out": page, place on the host. "in":
# place on the host, page. "write": place on the host, place on the disk. "read": place on the disk, place on the host.
Move = tuple[str, str, int, int]
WEIGHT = 0.3  # of what was measured last
DOUBT = 0.97  # an estimate that says no is believed a little less each time, so that it is measured again some day


class Slots:
    """A tier's places for one state group's pages: each is free, or somebody's (`owner`), and pinned while something is
    read from it or written to it. The least recently used one that is not pinned is given to the next who wants one;
    `lost` is told whose it was. A pinned place that nobody owns any more is free when it is no longer pinned."""

    def __init__(self, key: tuple[str, str], size: int, lost: Callable[[str, Node], None]):
        self.key, self.size, self._lost = key, size, lost
        self.owner: list[Node | None] = [None] * size
        self.pins = [0] * size
        self._free = list(range(size - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def used(self) -> int:
        return sum(node is not None for node in self.owner)

    def take(self) -> int | None:
        """A place that is nobody's yet; None if all are pinned. Whoever loses it may be forgotten by that, and so may
        others."""
        if self._free:
            return self._free.pop() if self.size else None
        if not self._idle:
            return None
        slot, _ = self._idle.popitem(last=False)
        node, self.owner[slot] = self.owner[slot], None
        assert node is not None
        del node.kept[self.key]
        self._lost(self.key[1], node)
        return slot

    def put(self, slot: int, node: Node) -> None:
        self.owner[slot] = node
        node.kept[self.key] = slot
        if not self.pins[slot]:
            self._idle[slot] = None

    def touch(self, slot: int) -> None:
        if slot in self._idle:
            self._idle.move_to_end(slot)

    def pin(self, slot: int) -> None:
        self.pins[slot] += 1
        self._idle.pop(slot, None)

    def unpin(self, slot: int) -> None:
        assert self.pins[slot] > 0, f"place {slot} was unpinned twice"
        self.pins[slot] -= 1
        if not self.pins[slot]:
            if self.owner[slot] is None:
                self._free.append(slot)
            else:
                self._idle[slot] = None

    def drop(self, slot: int) -> None:
        """Nobody owns it any more."""
        self.owner[slot] = None
        self._idle.pop(slot, None)
        if not self.pins[slot]:
            self._free.append(slot)


@dataclass
class Costs:
    """Seconds, as they were measured: to read a `token` of a prompt; to bring a page `back` from the host, or to `read`
    it from the disk to the host; what a step waits for a page that goes `out`, and to `write` it to the disk. None
    before the first time; what was never measured is tried."""

    token: float | None = None
    back: float | None = None
    read: float | None = None
    out: float | None = None
    write: float | None = None

    def note(self, what: str, seconds: float) -> None:
        """One more measurement, of one page or token."""
        before = getattr(self, what)
        setattr(self, what, seconds if before is None else before + WEIGHT * (seconds - before))

    def doubt(self, what: str) -> None:
        if (before := getattr(self, what)) is not None:
            setattr(self, what, DOUBT * before)


class Worth(NamedTuple):
    """How many pages of a beginning should be known, those that are brought back with them (0: none should be); and how
    many could."""

    pages: int
    reach: int


class Lower:
    """The places of the host and of the disk, by state group, and the decisions about them. `moves` is the list that
    they are added to; `lost(group, node)` is told of a node one of whose copies has gone."""

    def __init__(self, groups: Iterable[PageGroup], host: Mapping[str, int], disk: Mapping[str, int],
                 moves: list[Move], lost: Callable[[str, Node], None]):
        self.groups, self.moves, self._lost = tuple(groups), moves, lost
        self.sizes = {"host": dict(host), "disk": dict(disk)}
        self.costs = Costs()
        self.open = False  # whether pages may leave: once the programs that move them are there
        self.left = self.returned = self.fetched = self.declined = 0  # pages, so far
        self.reset()

    def reset(self) -> None:
        """Forget all pages, and whatever is on its way. Nothing that was asked for before is to be told any more."""
        self.slots = {(tier, group.name): Slots((tier, group.name), sizes.get(group.name, 0), self._lost)
                      for tier, sizes in self.sizes.items() for group in self.groups}
        self.reading: dict[tuple[str, int], Node] = {}  # by state group and place on the host
        self._held: list[tuple[str, int]] = []  # places on the host that are pinned until all have come
        self.moves.clear()

    # From the device.

    def keep(self, group: str, node: Node, page: int) -> bool:
        """Whether a page that is evicted is kept below, where it may be already. `node` may be forgotten by it."""
        host, disk = self.slots["host", group], self.slots["disk", group]
        if ("host", group) in node.kept:
            host.touch(node.kept["host", group])
            return True
        if not self.open or (slot := host.take()) is None:
            return ("disk", group) in node.kept
        if node.parent is None:
            host.drop(slot)
            return True
        host.put(slot, node)
        self.moves.append(("out", group, page, slot))
        self.left += 1
        if ("disk", group) not in node.kept and (there := disk.take()) is not None:
            if node.parent is None:
                disk.drop(there)
                return True
            disk.put(there, node)
            disk.pin(there)
            host.pin(slot)
            self.moves.append(("write", group, slot, there))
        return True

    def written(self, group: str, slot: int, there: int) -> None:
        """A page is on the disk."""
        self.slots["host", group].unpin(slot)
        self.slots["disk", group].unpin(there)

    # And back.

    def worth(self, path: list[Node], length: int, tiers: tuple[str, ...]) -> Worth:
        """Which beginning of `path`, a root and nodes below it, is to be had the soonest, if `length` tokens are known
        on the device and the others are brought back from these tiers or read again."""
        size = self.groups[0].page_size
        runs: dict[str, list[int]] = {}
        paid: dict[str, list[float]] = {}
        for group in self.groups:
            seconds = [self._seconds(group.name, node, tiers) for node in path[1:]]
            run = [0]
            for one in seconds:
                run.append(0 if one is None else run[-1] + 1)
            runs[group.name], paid[group.name] = run, [0.0, *accumulate(one or 0.0 for one in seconds)]
        best, most, reach = 0, 0.0, length // size
        token = 1.0 if self.costs.token is None else self.costs.token
        for n in range(length // size + 1, len(path)):
            first = {group.name: group.first(size * n) for group in self.groups}
            if any(n - at > runs[name][n] for name, at in first.items()):
                continue
            reach = n
            saved = (size * n - length) * token - sum(paid[name][n] - paid[name][at] for name, at in first.items())
            if saved > most:
                best, most = n, saved
        return Worth(best, reach)

    def _seconds(self, group: str, node: Node, tiers: tuple[str, ...]) -> float | None:
        """What it takes until a page is on the device; None if it is not to be had."""
        if node.pages.get(group) is not None:
            return 0.0
        tier = next((tier for tier in tiers if (tier, group) in node.kept), None)
        if tier is None:
            return None
        return (self.costs.back or 0.0) + (self.costs.read or 0.0) * (tier == "disk")

    def fetch(self, path: list[Node], length: int) -> int:
        """Have pages read from the disk, if a beginning with them is to be had the soonest: how many are coming."""
        if not any(self.sizes["disk"].values()) or self.reading:
            return 0
        chosen = self.worth(path, length, ("host", "disk"))
        wanted = [(group.name, node) for group in self.groups
                  for node in path[1 + group.first(group.page_size * chosen.pages): chosen.pages + 1]
                  if node.pages.get(group.name) is None and ("host", group.name) not in node.kept]
        if not wanted:
            if chosen.reach > max(chosen.pages, self.worth(path, length, ("host",)).reach):
                self.costs.doubt("read")
            return 0
        self._held = [(group.name, node.kept["host", group.name]) for group in self.groups
                      for node in path[1: chosen.pages + 1]
                      if node.pages.get(group.name) is None and ("host", group.name) in node.kept]
        for name, slot in self._held:
            self.slots["host", name].pin(slot)
        for name, node in wanted:
            slot = self.slots["host", name].take()
            if slot is None:
                break
            there = node.kept["disk", name]
            self.slots["host", name].pin(slot)
            self.slots["disk", name].pin(there)
            self.reading[name, slot] = node
            self.moves.append(("read", name, there, slot))
        if not self.reading:
            self._release()
        return len(self.reading)

    def arrived(self, group: str, there: int, slot: int) -> None:
        """A page is on the host again; by now, nobody may want it."""
        node = self.reading.pop((group, slot))
        if node.kept.get(("disk", group)) == there and ("host", group) not in node.kept:
            self.slots["host", group].put(slot, node)
        self.slots["host", group].unpin(slot)
        self.slots["disk", group].touch(there)
        self.slots["disk", group].unpin(there)
        self.fetched += 1
        if not self.reading:
            self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        for name, slot in reversed(held):  # of a path, the last is to go first
            self.slots["host", name].unpin(slot)

    def pin(self, group: str, node: Node) -> int:
        """The place of a page that is about to be brought back."""
        slot = node.kept["host", group]
        self.slots["host", group].pin(slot)
        return slot

    def unpin(self, group: str, slot: int) -> None:
        self.slots["host", group].unpin(slot)

    def bring(self, group: str, slot: int, page: int) -> None:
        self.moves.append(("in", group, slot, page))
        self.slots["host", group].unpin(slot)
        self.returned += 1

    def decline(self, pages: int) -> None:
        """So many pages are read again although they are on the host: it takes less time."""
        self.declined += pages
        self.costs.doubt("back")

    def touch(self, path: list[Node]) -> None:
        """What is kept of a path has just been used, its end the longest ago."""
        for node in reversed(path):
            for key, slot in node.kept.items():
                self.slots[key].touch(slot)

    # Forgetting.

    def forget(self, node: Node) -> None:
        for key, slot in node.kept.items():
            self.slots[key].drop(slot)
        node.kept.clear()

    def close(self, tier: str) -> None:
        """From now on nothing is kept in a tier, nor below it."""
        self.open = self.open and tier != "host"
        for name in ("host", "disk") if tier == "host" else ("disk",):
            self.sizes[name] = {}
            for group in self.groups:
                slots = self.slots[name, group.name]
                slots.size = 0
                for slot, node in enumerate(slots.owner):
                    if node is not None and node.kept.get(slots.key) == slot:
                        del node.kept[slots.key]
                        slots.drop(slot)
                        self._lost(group.name, node)
