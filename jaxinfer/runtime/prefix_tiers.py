"""Prefix pages below the device: what the scheduler says of them is done, timed, and told."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer import events
from jaxinfer.alignment import aligned
from jaxinfer.compiler import Executables, Key
from jaxinfer.compiler.placement import held
from jaxinfer.errors import Closed, InvalidOption
from jaxinfer.runtime.memory import mib
from jaxinfer.runtime.record import Record, Spill
from jaxinfer.scheduler import PageGroup, Scheduler
from jaxinfer.scheduler.lower import Move

MOVING = 8  # pages that may be on their way to the host, or from it: each has a copy on the device meanwhile
TIMED = 8  # one in so many times that pages come back, the step before is waited for, and they are timed


class Places(NamedTuple):
    """How many pages of each state group the host and the disk keep. The disk's file is as large as it will ever be."""

    host: dict[str, int]
    disk: dict[str, int]
    spill: Spill | None

    @property
    def pages(self) -> dict[str, dict[str, int]]:
        """As a `Scheduler` takes them."""
        return {"host": self.host, "disk": self.disk}


def places(executables: Executables, groups: Sequence[PageGroup], host: int, disk: int) -> Places | None:
    """What fits into so many bytes of each, as many full contexts of every group; None without any.

    Raises InvalidOption where that is not a page, OutOfMemory where the disk has no room.
    """
    if not host:
        return None
    shapes = {group.name: executables.page(group.name) for group in groups}
    devices = len(executables.place.devices)
    on_host = _shared(groups, {name: held(page) * devices for name, page in shapes.items()}, host, "prefix_host_memory")
    if not disk:
        return Places(on_host, {}, None)
    records = {name: Record.of(page) for name, page in shapes.items()}
    on_disk = _shared(groups, {name: record.blocks for name, record in records.items()}, disk, "prefix_disk_memory")
    return Places(on_host, on_disk, Spill(records, "prefix pages", "a smaller prefix_disk_memory", on_disk))


def _shared(groups: Sequence[PageGroup], sizes: Mapping[str, int], budget: int, name: str) -> dict[str, int]:
    whole = sum(sizes[group.name] * group.pages for group in groups)
    counts = {group.name: group.pages * budget // whole for group in groups}
    if not all(counts.values()):
        least = -(-whole // min(group.pages for group in groups))
        raise InvalidOption(f"{name} is {mib(budget)}, which does not hold a page of each state group: give at least "
                            f"'{least / 2**20 + 1:.0f}MiB', or 0 for none")
    return counts


@dataclass(frozen=True)
class PrefixTier:
    """One tier: the pages that it has room for and has (`used`), their bytes, and how many came from it so far
    (`hits`); seconds that a page takes to come one tier up (`back`), and to go there (`away`), None if that has not
    been measured."""

    pages: int
    used: int
    nbytes: int
    hits: int
    back: float | None
    away: float | None

    def __add__(self, other: PrefixTier) -> PrefixTier:
        either = lambda a, b: b if a is None else a if b is None else (a + b) / 2
        return PrefixTier(self.pages + other.pages, self.used + other.used, self.nbytes + other.nbytes,
                          self.hits + other.hits, either(self.back, other.back), either(self.away, other.away))


@dataclass(frozen=True)
class PrefixTiers:
    """Where prefix pages lie below the device, and what was measured: `recomputed` pages were on the host, and were
    read again since reading takes `seconds_per_token`, which is less. Hits of the host include the disk's, whose pages
    come through it. `open` says whether pages may leave the device (at first, the programs that move them are still
    being compiled)."""

    host: PrefixTier
    disk: PrefixTier
    recomputed: int
    seconds_per_token: float | None
    open: bool

    def __add__(self, other: PrefixTiers) -> PrefixTiers:
        """Those of two shards."""
        return PrefixTiers(self.host + other.host, self.disk + other.disk, self.recomputed + other.recomputed,
                           other.seconds_per_token if self.seconds_per_token is None else self.seconds_per_token,
                           self.open and other.open)

    def __str__(self) -> str:
        ms = lambda seconds: "-" if seconds is None else f"{1e3 * seconds:.2f} ms"
        rows = [f"{name}: {tier.used:,} of {tier.pages:,} pages ({mib(tier.nbytes)}), {tier.hits:,} hits; a page takes "
                f"{ms(tier.back)} back, {ms(tier.away)} away" for name, tier in (("host", self.host),
                                                                                 ("disk", self.disk))]
        return "\n".join([*rows, f"{self.recomputed:,} pages recomputed, {ms(self.seconds_per_token)} a token"])


class PageMover:
    """Makes the moves that the scheduler wants, in the engine's thread; what has to do with the disk in one of its own,
    in order. `post` has something done in the engine's thread.

    A page on the host is a tree of arrays that JAX fetches from the device in its own time: nobody waits for it, and
    whoever reads it waits no longer than has to be.
    """

    def __init__(self, executables: Executables, scheduler: Scheduler, spill: Spill | None,
                 post: Callable[[Callable[[], None]], None]):
        assert scheduler.tree.lower is not None
        self.executables, self.scheduler, self.lower, self.costs = (
            executables, scheduler, scheduler.tree.lower, scheduler.tree.lower.costs)
        self.host: dict[tuple[str, int], Any] = {}
        self._spill, self._post = spill, post
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="jaxinfer-pages") if spill else None
        self._leaving: deque[tuple[str, int]] = deque()
        self._times = self._lives = 0
        self._abandoned = False
        pinned = executables.place.device.platform != "cpu"  # which has but one memory
        kind = lambda x: x.sharding.with_memory_kind("pinned_host") if pinned else x.sharding
        self._there = {g.name: jax.tree.map(lambda x: x.sharding, executables.page(g.name)) for g in scheduler.groups}
        self._here = {g.name: jax.tree.map(kind, executables.page(g.name)) for g in scheduler.groups}
        self.nbytes = {g.name: held(executables.page(g.name)) * len(executables.place.devices)
                       for g in scheduler.groups}

    def open(self) -> None:
        """Let pages leave once the programs are there: no step waits for these."""
        if not self.lower.open and self.lower.sizes["host"]:
            self.lower.open = all(map(self.executables.is_ready, self.executables.moving))

    def move(self, kind: str, moves: Sequence[Move], state: Any) -> Any:
        """Make moves of one kind: the state after them."""
        if kind == "in":
            return self._bring(moves, state)
        for _, group, source, target in moves:
            if kind == "out":
                self._send(group, source, target, state)
            elif kind == "write" and (group, source) in self.host:
                self._later(self._write, group, source, target, self.host[group, source])
            elif kind == "read":
                self.host.pop((group, target), None)
                self._later(self._read, group, source, target)
        return state

    def sweep(self) -> None:
        """Give back the memory of pages that have been forgotten."""
        for group, slot in tuple(self.host):
            slots = self.lower.slots["host", group]
            if slots.owner[slot] is None and not slots.pins[slot]:
                del self.host[group, slot]

    def forget(self) -> None:
        """All pages are forgotten, and so is what is on its way."""
        self.host.clear()
        self._leaving.clear()
        self._lives += 1

    def abandon(self) -> None:
        """Another goes on with the books and the file: what is being written ends, and nothing else is."""
        self.forget()
        self._abandoned = True
        if self._disk is not None:
            self._disk.shutdown(cancel_futures=True)

    def close(self) -> None:
        if self._disk is not None:
            self._disk.shutdown(cancel_futures=True)
        if self._spill is not None:
            self._spill.close()
        self.host.clear()

    # Between device and host.

    def _send(self, group: str, page: int, slot: int, state: Any) -> None:
        start = time.perf_counter()
        self.host.pop((group, slot), None)
        try:
            export = self.executables.get(Key(f"export {group}"))
            there = jax.device_put(export(state[group], np.int32(page)), self._here[group])
            self._leaving.append((group, slot))
            if len(self._leaving) == MOVING:
                jax.block_until_ready(self.host.get(self._leaving.popleft()))
        except Exception as error:  # no memory on the host, say
            jax.block_until_ready(state)  # raises where it was a step that failed: the tiers are sound
            self._give_up("host", error)
            return
        self.host[group, slot] = there
        self.costs.note("out", time.perf_counter() - start)

    def _bring(self, moves: Sequence[Move], state: Any) -> Any:
        timed, self._times = self._times % TIMED == 0, self._times + 1
        if timed:
            jax.block_until_ready((state, [self.host[group, slot] for _, group, slot, _ in moves]))
        start = time.perf_counter()
        for i, (_, group, slot, page) in enumerate(moves, 1):
            exported = jax.device_put(self.host[group, slot], self._there[group])
            layers = self.executables.get(Key(f"import {group}"))(state[group], np.int32(page), exported)
            state = {**state, group: layers}
            if i % MOVING == 0 or (timed and i == len(moves)):
                jax.block_until_ready(state)
        if timed:
            self.costs.note("back", (time.perf_counter() - start) / len(moves))
        return state

    # Between host and disk, in a thread of its own.

    def _later(self, act: Callable[..., Callable[[], None]], *args: Any) -> None:
        """Do it in that thread, and what it returns in the engine's."""
        assert self._disk is not None
        life = self._lives

        def work() -> None:
            after = act(*args)
            with suppress(Closed):
                self._post(lambda: after() if life == self._lives else None)

        self._disk.submit(work)

    def _write(self, group: str, slot: int, there: int, exported: Any) -> Callable[[], None]:
        assert self._spill is not None
        failure, seconds = None, 0.0
        try:
            arrays = [np.asarray(x) for x in jax.tree.leaves(exported)]
            start = time.perf_counter()
            for n, array in enumerate(arrays):
                self._spill.write(group, n, array, there)
            seconds = time.perf_counter() - start
        except Exception as error:  # the disk is full, or fails
            failure = error

        def written() -> None:
            self._settle("write", failure, seconds)
            self.lower.written(group, slot, there)

        return written

    def _read(self, group: str, there: int, slot: int) -> Callable[[], None]:
        assert self._spill is not None
        failure, seconds, exported = None, 0.0, None
        try:
            record = self._spill.records[group]
            buffer, start = aligned((record.size,), np.uint8), time.perf_counter()
            self._spill.read(group, buffer, there)
            exported = jax.block_until_ready(jax.device_put(record.views(buffer), self._here[group]))
            seconds = time.perf_counter() - start
        except Exception as error:
            failure = error

        def arrived() -> None:
            self._settle("read", failure, seconds)
            if failure is None:
                self.host[group, slot] = exported
            self.scheduler.arrived(group, there, slot)

        return arrived

    def _settle(self, what: str, failure: Exception | None, seconds: float) -> None:
        if failure is None:
            self.costs.note(what, seconds)
        else:
            self._give_up("disk", failure)

    def _give_up(self, tier: str, error: Exception) -> None:
        if self.lower.sizes[tier] and not self._abandoned:
            self.lower.close(tier)
            events.emit(events.TierClosed(tier, str(error)))

    # Looking.

    def told(self) -> PrefixTiers:
        lower, costs = self.lower, self.costs
        records = self._spill.records if self._spill else {}

        def tier(name: str, hits: int, back: float | None, away: float | None) -> PrefixTier:
            slots = {group: lower.slots[name, group] for group in self.nbytes}
            size = lambda group: self.nbytes[group] if name == "host" else records[group].blocks
            return PrefixTier(sum(s.size for s in slots.values()), sum(s.used for s in slots.values()),
                              sum(s.used * size(group) for group, s in slots.items() if s.used), hits, back, away)

        return PrefixTiers(tier("host", lower.returned, costs.back, costs.out),
                           tier("disk", lower.fetched, costs.read, costs.write),
                           lower.declined, costs.token, lower.open)


def added(each: Iterable[PageMover | None]) -> PrefixTiers | None:
    """What all shards tell, as one."""
    total = None
    for mover in each:
        if mover is not None:
            total = mover.told() if total is None else total + mover.told()
    return total
