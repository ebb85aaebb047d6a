"""Which models are awake: an LRU under budgets of bytes, each device's and the host's. Decisions only.

A model that is awake has its weights, pages and temporaries on its devices (L1). Asleep, its weights lie on the host
(L2) or on the disk (L3). Where one that is wanted has no room, the least recently used others make it: first those with
nothing to do; those at work let nobody else in, and go when they have served who was in.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Tier = Literal["device", "host", "disk"]


@dataclass(eq=False)
class Resident:
    """A model, as budgets see it. It takes `size` bytes of each of its `devices` (None: of whichever there are) while
    it is awake, and `weights` bytes of the host while a copy of them is there (`copied`), which one that is awake may
    have as well if it `keeps` it. They pass through `stage` bytes of the host on their way to and from the disk; what
    is `stored` there need not be written again.

    One that is `fixed` never sleeps, one that has `pins` does not now; `sent` was told to. `busy`: it has requests that
    are not done; `leaving`: it lets no more in; `stuck`: it could not be moved, and is not tried again until somebody
    else is wanted; `used`: when it was last asked. A claim of room for something that is yet to come is fixed; it comes
    `beside` another model, or takes `all` that those who are busy leave.
    """

    name: str
    size: int
    weights: int = 0
    devices: frozenset[Hashable] | None = None
    stage: int = 0
    keeps: bool = False
    stored: bool = False
    fixed: bool = False
    beside: Resident | None = None
    all: bool = False
    tier: Tier = "device"
    copied: bool = False
    pins: int = 0
    sent: bool = False
    busy: bool = False
    leaving: bool = False
    stuck: bool = False
    used: float = 0.0

    @property
    def awake(self) -> bool:
        return self.tier == "device"

    @property
    def holds(self) -> int:
        """Bytes of the host that its weights take."""
        return self.weights * self.copied


class Move(NamedTuple):
    """What is to be done next with a resident: "leave" (let nobody in any more), "stay" (go on after all), "sleep"
    (move its weights to a tier), "drop" (its copy on the host), "store" (that copy, on the disk), "wake", or "refuse"
    (it can never have room)."""

    what: Literal["leave", "stay", "sleep", "drop", "store", "wake", "refuse"]
    who: Resident
    to: Tier = "device"


class Residents:
    """The books of who is where. `next` says what is to be done, one move at a time: `begin` it, then say how it
    `ended`. Who is `wanted` is served in order, so that nobody waits for ever.

    >>> books = Residents(device=100, host=50)
    >>> one, two = Resident("one", 60, weights=40), Resident("two", 60, weights=40, tier="disk")
    >>> books.enter(one); books.enter(two); books.want(two)
    >>> for _ in range(3):
    ...     move = books.next()
    ...     books.begin(move); books.ended(move)
    ...     print(move.what, move.who.name, move.to)
    leave one device
    sleep one host
    wake two device
    """

    def __init__(self, device: float = math.inf, host: float = math.inf):
        self.device, self.host = device, host
        self.residents: list[Resident] = []
        self.wanted: list[Resident] = []  # in the order in which they were
        self._before: tuple[Tier, bool] = "device", False  # the tier of who is moved, and whether it was copied

    def __iter__(self) -> Iterator[Resident]:
        return iter(tuple(self.residents))

    # Who is there.

    def enter(self, one: Resident) -> None:
        self.residents.append(one)

    def leave(self, one: Resident) -> None:
        """It is gone, if it was there."""
        self.residents = [r for r in self.residents if r is not one]
        self.unwant(one)

    def want(self, one: Resident) -> None:
        """It is to be awake, and to stay so for now."""
        if one in self.residents and one not in self.wanted and not (one.awake and not one.leaving):
            self.wanted.append(one)
            for other in self.residents:
                other.stuck = False

    def unwant(self, one: Resident) -> None:
        """Nobody waits for it any more."""
        self.wanted = [r for r in self.wanted if r is not one]

    # What there is.

    def used(self, device: Hashable) -> int:
        """Bytes of a device that are taken."""
        return sum(r.size for r in self.residents if r.awake and _on(r, device))

    @property
    def stage(self) -> int:
        """Bytes of the host that are left free for weights to pass through."""
        return max((r.stage for r in self.residents), default=0)

    @property
    def copies(self) -> int:
        """Bytes of the host that weights take."""
        return sum(r.holds for r in self.residents)

    def least(self, one: Resident) -> int:
        """Bytes of a device without which it can never be awake: its own, those of who is never asleep, and of whom it
        is to be beside."""
        others = [r for r in self.residents if r.fixed and not _is_claim(r) and r is not one]
        others += [one.beside] if one.beside else []
        return one.size + max(sum(r.size for r in others if _on(r, device)) for device in self._devices(one))

    def _devices(self, *more: Resident) -> set[Hashable]:
        """All that anybody is on; None is one on which those are that may be anywhere, and nobody else."""
        return {None, *(device for r in (*self.residents, *more) for device in r.devices or ())}

    # What is next.

    def next(self) -> Move | None:
        head = self.wanted[0] if self.wanted else None
        if head and self.least(head) > self.device:
            return Move("refuse", head)
        if self.copies + self.stage > self.host and (spare := self._spare()):  # one with a large stage has come
            return self._off(spare[0])
        going = self._going(head)
        for one in self.residents:
            if one.leaving and one not in going:
                return Move("stay", one)
        for one in going:
            if not one.leaving:
                return Move("leave", one)
        for one in going:
            if not one.busy and not one.pins:
                return self._sleep(one)
        ready = head and not head.awake and not (head.all and going) and max(self._over(head).values()) <= 0
        return Move("wake", head) if head and ready else None

    def _over(self, head: Resident | None, without: Iterable[Resident] = ()) -> dict[Hashable, float]:
        """By how much each device's budget would be exceeded if `head` were awake and others not."""
        coming = [head] if head and not head.awake else []
        return {device: self.used(device) - self.device + sum(r.size for r in coming if _on(r, device))
                - sum(r.size for r in without if _on(r, device)) for device in self._devices(*coming)}

    def _going(self, head: Resident | None) -> list[Resident]:
        """Who must go to sleep: those sent, and as many of the least recently used as `head` needs; none for its sake
        while it would be in vain, since others are pinned."""
        sent = [r for r in self.residents if r.awake and r.sent]
        going, over = list(sent), self._over(head, sent)
        kept = lambda r: r is head or r.fixed or r.pins or r.sent or r.stuck
        able = [r for r in self.residents if r.awake and not kept(r)]
        for one in sorted(able, key=lambda r: (not r.leaving, r.busy, r.used)):
            if any(excess > 0 and _on(one, device) for device, excess in over.items()) or (
                    head and head.all and not one.busy):
                going.append(one)
                over = self._over(head, going)
        return going if max(over.values()) <= 0 else sent

    def _sleep(self, one: Resident) -> Move:
        """Its weights go to the host, if it has room for them or can be given some by those used less recently."""
        room, spare = self.host - self.stage - self.copies, self._spare(one.used)
        if one.copied or one.weights <= room:
            return Move("sleep", one, "host")
        if one.weights > room + sum(r.weights for r in spare):
            return Move("sleep", one, "disk")
        return self._off(spare[0])

    def _spare(self, used: float = math.inf) -> list[Resident]:
        """Whose copies on the host may go, in this order: of those awake, then of those used before then."""
        able = (r for r in self.residents if r.copied and not r.stuck and (r.awake or r.used <= used))
        return sorted(able, key=lambda r: (not r.awake, r.used))

    def _off(self, one: Resident) -> Move:
        """Its copy goes from the host."""
        return Move("drop" if one.awake or one.stored else "store", one, "device" if one.awake else "disk")

    # What has been done.

    def begin(self, move: Move) -> None:
        """From now on what the move takes is taken."""
        what, one, to = move
        self._before = one.tier, one.copied
        if what == "wake":
            one.size = max(0, int(-max(self._over(one).values()))) if one.all else one.size
            one.tier = "device"
        elif what == "sleep":
            one.copied = one.copied or to == "host"

    def ended(self, move: Move, done: bool = True) -> None:
        """The move was made; or was not, and what it took is given back. Who could not be woken is wanted no more."""
        what, one, to = move
        if not done:
            one.tier, one.copied = self._before
        elif what == "leave":
            one.leaving = True
        elif what == "stay":
            one.leaving = one.sent = False
        elif what == "wake":
            one.copied = one.copied and one.keeps
        elif what != "refuse":
            one.tier, one.copied = to, to == "host"
            one.stored = one.stored or to == "disk"
        if what == "sleep" and done:
            one.leaving = one.sent = False
        elif what in ("sleep", "drop", "store") and not done:
            one.stuck = True
            for leaver in self.residents:
                leaver.sent, leaver.stuck = False, leaver.stuck or leaver.leaving
        if what in ("stay", "wake", "refuse"):
            self.unwant(one)


def _on(one: Resident, device: Hashable) -> bool:
    return one.devices is None or device in one.devices


def _is_claim(one: Resident) -> bool:
    return one.devices is None or one.beside is not None
