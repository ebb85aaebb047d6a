"""Puts models to sleep where others need their room, and wakes them when they are asked."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import jax

from jaxinfer.compiler.placement import held
from jaxinfer.errors import Closed, InvalidOption, OutOfMemory, RequestFailed
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.living import Living, Room
from jaxinfer.runtime.memory import mib
from jaxinfer.runtime.places import Place, Places
from jaxinfer.runtime.stash import Stash
from jaxinfer.scheduler.residents import Move, Resident, Residents

PAUSE = 0.002  # seconds between two looks at those who are about to go
SHARE = 0.5  # of the host's free memory, for the weights of who sleeps, where no budget is given


@dataclass
class Bed:
    """A model, and where its weights lie while it sleeps. It was woken `wakes` times, the last time in `seconds`;
    `waiting` threads want it awake, and `error` is what went wrong the `failures`-th time. A claim's has no model."""

    model: Any = None
    stash: Any = None
    wakes: int = 0
    seconds: float = 0.0
    waiting: int = 0
    failures: int = 0
    error: Exception | None = None

    @property
    def rooms(self) -> list[Room]:
        return [] if self.model is None else self.model.rooms

    def give_up(self) -> None:
        """The model is closed: its weights are forgotten, and whoever waits for it is told by itself."""
        if self.model is not None:
            self.stash.forget()
        for room in self.rooms:
            room.gate.open()

    def refuse(self, error: Exception) -> None:
        """Whoever waits for the model is told what went wrong."""
        failure = error
        if not isinstance(error, RequestFailed):
            failure = RequestFailed(f"the model slept, and could not be woken: {error}")
            failure.__cause__ = error
        for room in self.rooms:
            room.gate.refuse(failure)


class Dormitory:
    """Keeps models within `device_memory` bytes of each device (None: whatever they take) and the weights of those that
    sleep within `host_memory` bytes of the host (None: half of what is free; on a CPU, whose memory is the device's,
    nothing). `Residents` decides who goes and who comes; a thread makes one move after another while there are any.
    """

    def __init__(self, device_memory: int | str | None = None, host_memory: int | str | None = None):
        sized = lambda size, name: None if size is None else planning.parse_bytes(size, name)
        self._host = sized(host_memory, "host_memory")
        self._books = Residents(sized(device_memory, "device_memory") or inf, self._host or 0)
        self._beds: dict[Resident, Bed] = {}
        self._change = threading.Condition(threading.RLock())
        self._claiming = threading.Lock()  # of two who have room and want more, each might wait for the other
        self._thread: threading.Thread | None = None
        self._moving: Resident | None = None

    @property
    def budget(self) -> float:
        """Bytes of each device."""
        return self._books.device

    # Coming and going.

    @contextmanager
    def room(self, needs: int | None) -> Iterator[Callable[[str, Living], None]]:
        """In the `with` block a model is made, in room for `needs` bytes; or if these are not known, in all the room
        that those who work leave. What it yields takes the model in by its name. Raises OutOfMemory where it can never
        be."""
        claim = Resident("a new model", needs or 0, fixed=True, all=needs is None, tier="disk")
        with self._claimed(claim, self._claiming):
            yield partial(self._enter, claim)

    def _enter(self, claim: Resident, name: str, model: Living) -> None:
        place, shapes = model.rooms[0].place, model.rooms[0].shapes
        aliased, stash = place.device.platform == "cpu", Stash(shapes, place.device.platform == "cpu", model.again)
        devices = frozenset({"cpu"} if aliased else {device for room in model.rooms for device in room.place.devices})
        one = Resident(name, 0, held(shapes) * len(place.devices), devices, stash.stage, keeps=not aliased,
                       stored=stash.stored, fixed=bool(model.restless))
        with self._change:
            if self._host is None and not aliased:
                self._books.host = self._host = int(SHARE * planning.host_memory())
            self._books.leave(claim)
            self._books.enter(one)
            self._beds[one] = Bed(model, stash)
            self._look()
            if error := self._too_large(one):
                self.leave(model)
                raise error
            model.home = self
            for room in model.rooms:
                room.gate.wanted = partial(self._want, one)
            self._go_on()

    def leave(self, model: Living) -> None:
        """It is closed: its room is free, and whoever waits before its gates is told."""
        with self._change:
            one, model.home = self._find(model), None
            if one is None:
                return
            bed, moving = self._beds.pop(one), self._moving is one
            self._books.leave(one)
            self._go_on()
        if not moving:  # else when that has ended
            bed.give_up()

    def _too_large(self, one: Resident) -> OutOfMemory | None:
        """Why it can never be awake, or asleep."""
        least, budget, host = self._books.least(one), self._books.device, self._books.host
        if least > budget:
            others = f", beside {mib(least - one.size)} of what cannot sleep then" if least > one.size else ""
            instead = ("load the new weights as a version of their own, with policy='frugal'" if one.beside else
                       "load the model with a smaller memory=, with quantize=, or streamed, with a device_memory=")
            return OutOfMemory(
                f"{one.name} needs {mib(one.size)} of its device{others}, but the registry's device_memory is "
                f"{mib(int(budget))}. Give it more, or {instead}")
        if not one.fixed and one.stage > host and (budget < inf or one.sent):
            return OutOfMemory(f"the weights of {one.name} pass through {mib(one.stage)} of the host on their way to "
                               f"and from the disk, but the registry's host_memory is {mib(int(host))}; give it more")
        return None

    # Who is wanted.

    def wake(self, model: Living) -> None:
        """Returns when it is awake. Raises what goes wrong."""
        with self._change:
            self._await(self._of(model))

    def sleep(self, model: Living) -> None:
        """Returns when who was in has been served, and it sleeps. Raises InvalidOption if it cannot, or what goes
        wrong."""
        with self._change:
            one = self._of(model)
            if one.fixed:
                raise InvalidOption(f"{one.name} cannot sleep: {model.restless}")
            one.sent, one.stuck, bed = one.awake, False, self._beds[one]
            if error := self._too_large(one):
                one.sent = False
                raise error
            self._go_on()
            self._change.wait_for(lambda: not one.sent or one not in self._beds)
            if one.stuck and bed.error:
                raise bed.error

    @contextmanager
    def keep(self, model: Living, beside: int = 0) -> Iterator[None]:
        """In the `with` block it is awake; and if other weights of so many bytes are to take the place of its own,
        there is room for them beside. Raises OutOfMemory where there can never be."""
        with self._change:
            one = self._find(model)
        if one is None:
            yield
        elif not beside:
            with self._pinned(one):
                yield
        else:
            claim = Resident(f"{one.name} with other weights", beside * _alike(model), devices=one.devices, fixed=True,
                             beside=one, tier="disk")
            with self._claiming, self._pinned(one), self._claimed(claim):
                try:
                    yield
                finally:
                    with self._change:  # what lies on the host and the disk may be of the old ones
                        if bed := self._beds.get(one):
                            bed.stash.forget()
                            one.copied, one.stored, one.stage = False, False, bed.stash.stage

    @contextmanager
    def _pinned(self, one: Resident) -> Iterator[None]:
        with self._change:
            self._await(one)
            one.pins += 1
        try:
            yield
        finally:
            with self._change:
                one.pins -= 1
                self._go_on()

    @contextmanager
    def _claimed(self, claim: Resident, waiting: Any = None) -> Iterator[None]:
        """In the `with` block its room is free, or taken by whoever was made in it. It waits for that `waiting` in a
        line of their own."""
        if self.budget == inf:
            yield
            return
        try:
            with waiting or nullcontext(), self._change:
                self._look()
                if error := self._too_large(claim):
                    raise error
                self._books.enter(claim)
                self._beds[claim] = Bed()
                self._await(claim)
            yield
        finally:
            with self._change:
                self._books.leave(claim)
                self._beds.pop(claim, None)
                self._go_on()

    def _want(self, one: Resident) -> None:
        """Somebody waits before its gate."""
        with self._change:
            self._books.want(one)
            self._go_on()

    def _await(self, one: Resident) -> None:
        """Until it is awake. The lock is held. Raises what goes wrong, or Closed."""
        bed = self._beds[one]
        failures, bed.waiting = bed.failures, bed.waiting + 1
        try:
            while not one.awake or one.leaving or self._moving is one:
                self._books.want(one)
                self._go_on()
                self._change.wait()
                if one not in self._beds:
                    raise Closed()
                if bed.failures > failures and bed.error:
                    raise bed.error
        finally:
            bed.waiting -= 1

    def _find(self, model: Living) -> Resident | None:
        return next((one for one, bed in self._beds.items() if bed.model is model), None)

    def _of(self, model: Living) -> Resident:
        if (one := self._find(model)) is None:
            raise Closed()
        return one

    # Looking.

    @property
    def places(self) -> Places:
        with self._change:
            self._look()
            return Places({one.name: _place(one, bed) for one, bed in self._beds.items() if bed.model})

    def _look(self) -> None:
        """Bring the books up to date. The lock is held."""
        for one, bed in self._beds.items():
            if bed.model:
                one.size = bed.model.nbytes * _alike(bed.model)
                one.busy = any(room.busy for room in bed.rooms)
                one.used = max(room.gate.used for room in bed.rooms)
                if any(room.gate.awaited for room in bed.rooms):
                    self._books.want(one)
                elif not bed.waiting:
                    self._books.unwant(one)  # whoever waited has gone

    # Moving.

    def _go_on(self) -> None:
        """See whether somebody is to be moved. The lock is held."""
        self._change.notify_all()
        self._look()
        if self._thread is None and self._books.next():
            self._thread = threading.Thread(target=self._work, name="jaxinfer-dormitory", daemon=True)
            self._thread.start()

    def _work(self) -> None:
        while True:
            with self._change:
                move = self._next()
                if move is None:
                    self._thread = None
                    return
                self._moving = move.who
                self._books.begin(move)
                bed = self._beds[move.who]
            error: Exception | None = None
            try:
                self._make(move, bed)
            except Exception as found:
                error = found
                traceback.clear_frames(error.__traceback__)  # they would hold on to weights
            with self._change:
                told, gone = self._ended(move, error), move.who not in self._beds
            if gone:
                bed.give_up()
            if error and told:
                told.refuse(error)

    def _next(self) -> Move | None:
        """The next move, waited for while somebody is about to go. The lock is held."""
        self._look()
        while (move := self._books.next()) is None and any(one.leaving for one in self._books):
            self._change.wait(PAUSE)
            self._look()
        return move

    def _ended(self, move: Move, error: Exception | None) -> Bed | None:
        """Write down what became of a move. What went wrong is the matter of whoever it was made for, which is
        returned, and of who was sent to sleep."""
        head = move.who if move.what in ("wake", "refuse") else next(iter(self._books.wanted), None)
        self._books.ended(move, done=error is None)
        self._moving = None
        self._change.notify_all()
        if error is None:
            return None
        for one, bed in self._beds.items():
            bed.error = error if one.stuck else bed.error
        if head is None or head not in self._beds:
            return None
        self._books.unwant(head)
        told = self._beds[head]
        told.failures, told.error = told.failures + 1, error
        return told

    def _make(self, move: Move, bed: Bed) -> None:
        """Make a move. Raises what goes wrong; then everything lies where it lay."""
        match move.what:
            case "leave":
                for room in bed.rooms:
                    room.gate.shut()
            case "stay":
                for room in bed.rooms:
                    room.gate.open()
            case "sleep":
                keep = bed.stash.copy if move.to == "host" else bed.stash.store
                keep(bed.rooms[0].weights)
                for room in bed.rooms:
                    while not room.lie_down():
                        time.sleep(PAUSE)  # until the last who slipped in has been served
            case "drop":
                bed.stash.drop()
            case "store":
                bed.stash.store()
            case "wake" if bed.model:
                self._wake(bed)
            case "refuse":
                if error := self._too_large(move.who):
                    raise error

    def _wake(self, bed: Bed) -> None:
        start = time.perf_counter()
        params = bed.stash.fetch()
        try:
            for n, room in enumerate(bed.rooms):
                place = lambda room=room: jax.device_put(params, jax.tree.map(lambda x: x.sharding, room.shapes))
                room.rise(place() if n else params)
        except BaseException:
            for room in bed.rooms:
                with suppress(Closed):
                    room.lie_down()
            raise
        bed.seconds, bed.wakes = time.perf_counter() - start, bed.wakes + 1
        if bed.stash.aliased:
            bed.stash.drop()
        for room in bed.rooms:
            room.gate.open()


def _alike(model: Living) -> int:
    """How many of its devices share one memory: all of a CPU's, which are made up."""
    devices = [device for room in model.rooms for device in room.place.devices]
    return len(devices) if devices[0].platform == "cpu" else 1


def _place(one: Resident, bed: Bed) -> Place:
    hits, misses = (sum(getattr(room.gate, what) for room in bed.rooms) for what in ("hits", "misses"))
    return Place(one.name, one.tier, one.size, hits, misses, bed.wakes, bed.seconds,
                 one.weights / bed.seconds if bed.wakes else 0.0)
