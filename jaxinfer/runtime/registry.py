"""Named models with versions: loaded, warmed, flipped to, drained and rolled back while requests run; and asleep while
nobody asks, where there is not room for all of them."""

from __future__ import annotations

import inspect
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from jaxinfer import events
from jaxinfer.errors import Closed, InvalidOption, ModelNotFound, Rejected
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.dormitory import Dormitory
from jaxinfer.runtime.places import Places

Policy = Literal["available", "frugal"]
STABLE = "stable"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a named model: its `number`, and what serves it, an Endpoint or a LanguageModel. Weights that are
    swapped within it have numbers of their own (`model.version`), which no other version of the name gets."""

    name: str
    number: int
    model: Any


@dataclass
class _Shelf:
    """The versions of one name. `labels` is replaced, never changed: whoever reads it sees one state of it."""

    make: dict[int, Callable[[], Any]] = field(default_factory=dict)  # of those that may be needed again
    ready: dict[int, ModelVersion] = field(default_factory=dict)
    labels: dict[str, ModelVersion] = field(default_factory=dict)
    coming: frozenset[str] = frozenset()  # labels whose old version had to go before the new one comes
    before: int | None = None  # the number that was stable before
    lock: threading.RLock = field(default_factory=threading.RLock)
    numbers: Iterator[int] = field(default_factory=partial(itertools.count, 1))
    seconds: float = 1.0  # that the last version took to make


class Registry:
    """Models by name, each with its own queue, memory and threads, so that one's overload or end leaves the others
    alone.

    `load` makes a version, warms it and flips a label to it; the version that had the label is drained and closed.
    `registry[name]` is a handle that always asks the version with the label "stable", `registry.at(name, label)` that
    of another label. Handles never lock.

    With `device_memory`, bytes (or a text such as "60GiB") of each device, it keeps more models than fit: those that
    were not asked for the longest sleep. Their weights go to the host, up to `host_memory` bytes (by default half of
    what is free; on a CPU, whose memory is the device's, none), and those of the least recently used to the disk: the
    checkpoint that they came from is read again, or a file of our own is. Programs stay. A request to a model that
    sleeps waits in its queue, with its deadlines, until the model has been woken, once who else has the room has
    served whoever is being served. What pages held of earlier prompts is lost. `tiers` says who is where.

    >>> from jaxinfer import endpoint
    >>> registry = Registry()
    >>> registry.load("double", lambda: endpoint(lambda x: 2 * x, example=0.0, max_batch=2))
    1
    >>> registry.load("double", lambda: endpoint(lambda x: x + x, example=0.0, max_batch=2))
    2
    >>> float(registry["double"](3.0))
    6.0
    >>> registry.close()
    """

    def __init__(self, device_memory: int | str | None = None, host_memory: int | str | None = None):
        self._shelves: dict[str, _Shelf] = {}
        self._lock, self._closed = threading.Lock(), False
        self._dormitory = Dormitory(device_memory, host_memory)

    # Reading.

    def __getitem__(self, name: str) -> Handle:
        return self.at(name)

    def __iter__(self) -> Iterator[str]:
        """The names that have a version, or are between two."""
        return iter([name for name, shelf in tuple(self._shelves.items()) if shelf.ready or shelf.coming])

    def at(self, name: str, label: str = STABLE) -> Handle:
        """A handle to whatever version has a label."""
        shelf = self._shelf(name)
        if label not in shelf.labels and label not in shelf.coming:
            raise ModelNotFound(f"{name} has no version with the label {label!r}; it has {sorted(shelf.labels)}")
        return Handle(shelf, name, label)

    def serving(self, name: str) -> dict[int, ModelVersion]:
        """The versions that are loaded, by the number of the weights that they run on now."""
        return {version.model.version: version for version in tuple(self._shelf(name).ready.values())}

    def versions(self, name: str) -> list[int]:
        """The numbers of the versions that are loaded."""
        return sorted(self._shelf(name).ready)

    @property
    def models(self) -> list[ModelVersion]:
        """All versions that are loaded, of all names."""
        return [version for shelf in tuple(self._shelves.values()) for version in tuple(shelf.ready.values())]

    def labels(self, name: str) -> dict[str, int]:
        return {label: version.number for label, version in self._shelf(name).labels.items()}

    @property
    def tiers(self) -> Places:
        """Where every version is, how many of its requests found it awake, and how long it took to wake it: a table."""
        return self._dormitory.places

    # Changing.

    def load(self, name: str, make: Callable[[], Any], *, label: str = STABLE, policy: Policy | None = None,
             needs: int | str | None = None, drain: float = 60.0) -> int:
        """Make a version (`make()` returns an Endpoint or a LanguageModel), warm it, and give it the `label`; whoever
        had that is drained for at most `drain` seconds and closed. Returns its number.

        Where no version of the name is there, this returns as soon as requests can be served, and the other programs
        are compiled in the background (`model.coming`). Beside one that serves, and with a `device_memory`, which is
        for what all programs need, a version is compiled whole before it gets a label: the flip stalls nobody.

        `policy`: "available" loads the new version beside the old one, so that there always is one; "frugal" closes
        the old one first, where both do not fit: callers are Rejected until the new one has come, with every label that
        the old one had. By default it follows from `needs`, the bytes of the new version (those of the old one if it is
        not given), and from what is free. If `make` raises, so does this, and the old version serves on; a frugal load
        makes it again.

        In a registry with a `device_memory`, others go to sleep to make room for `needs` bytes; for a new name without
        `needs` all do that are idle, and none is woken until it is made. Raises OutOfMemory, with the numbers, where it
        can never fit.
        """
        if policy not in (None, "available", "frugal"):
            raise InvalidOption(f"policy is {policy!r}; it must be 'available' or 'frugal'")
        with self._held(name, new=True) as shelf:
            old = shelf.labels.get(label)
            size = planning.parse_bytes(needs, "needs") if needs is not None else None
            if old is not None:
                size = size or old.model.nbytes
                if (policy or self._policy(old, size)) == "frugal":
                    return self._load_frugally(shelf, name, make, label, old, drain, size)
            new = self._make(shelf, name, make, size)
            self._flip(shelf, new, label, drain=drain)
            return new.number

    def flip(self, name: str, number: int, label: str = STABLE, drain: float = 60.0) -> None:
        """Give a label to a version that is loaded; whoever had it is drained and closed, unless it has another."""
        with self._held(name) as shelf:
            self._check_ready(shelf, name, number)
            self._flip(shelf, shelf.ready[number], label, drain=drain)

    def roll_back(self, name: str, drain: float = 60.0) -> int:
        """Make the version that was stable before stable again, loading it anew if it was closed. Once: what was stable
        before that is not kept."""
        with self._held(name) as shelf:
            before = shelf.before
            if before is None:
                raise ModelNotFound(f"{name} has no earlier stable version to roll back to")
            found = shelf.ready.get(before) or self._make(shelf, name, shelf.make[before], number=before)
            self._flip(shelf, found, STABLE, drain=drain)
            shelf.before = None
            return before

    def unload(self, name: str, number: int | None = None, drain: float = 60.0) -> None:
        """Drain and close one version, or all of them; then the name is forgotten."""
        with self._held(name) as shelf:
            if number is not None:
                self._check_ready(shelf, name, number)
            for version in tuple(shelf.ready.values()):
                if number in (None, version.number):
                    shelf.labels = {label: v for label, v in shelf.labels.items() if v is not version}
                    self._retire(shelf, version, drain)

    def sleep(self, name: str) -> None:
        """Put all versions of a name to sleep, now: whoever is being served is, first, and the next request wakes it.
        Raises InvalidOption for one that cannot sleep, since its weights are streamed, say."""
        for version in tuple(self._shelf(name).ready.values()):
            self._dormitory.sleep(version.model)

    def wake(self, name: str, label: str = STABLE) -> None:
        """Wake the version with a label, and wait until it is awake. Raises OutOfMemory, or what went wrong."""
        self._dormitory.wake(self.at(name, label).version.model)

    def close(self) -> None:
        """Close everything at once: what waits fails with Closed."""
        with self._lock:
            self._closed = True
        for name in tuple(self._shelves):
            with suppress(ModelNotFound):  # its load has failed meanwhile
                self.unload(name, drain=0.0)

    # Inside.

    def _shelf(self, name: str) -> _Shelf:
        try:
            return self._shelves[name]
        except KeyError:
            raise ModelNotFound(f"there is no model {name!r}; there are {sorted(self._shelves)}") from None

    @contextmanager
    def _held(self, name: str, new: bool = False) -> Iterator[_Shelf]:
        """A name's shelf, to change. Afterwards it is forgotten if nothing is on it; who waited for one that was
        forgotten looks again."""
        while True:
            with self._lock:
                if new and self._closed:
                    raise Closed()
                shelf = self._shelves.setdefault(name, _Shelf()) if new else self._shelf(name)
            with shelf.lock:
                if self._shelves.get(name) is not shelf:
                    continue
                try:
                    yield shelf
                finally:
                    kept = {shelf.before, *shelf.ready}
                    shelf.make = {number: make for number, make in shelf.make.items() if number in kept}
                    if not shelf.ready and self._shelves.get(name) is shelf:
                        del self._shelves[name]
                return

    def _check_ready(self, shelf: _Shelf, name: str, number: int) -> None:
        if number not in shelf.ready:
            raise ModelNotFound(f"{name} has no version {number}; loaded are {sorted(shelf.ready)}")

    def _make(self, shelf: _Shelf, name: str, make: Callable[[], Any], needs: int | None = None,
              number: int | None = None) -> ModelVersion:
        with self._dormitory.room(needs) as move_in:
            start, model = time.monotonic(), make()
            try:
                model.rename(name)
                model.warmup(background=not shelf.ready and self._dormitory.budget == math.inf)
                number = next(shelf.numbers) if number is None else number
                model.renumber(number, shelf.numbers)
                move_in(f"{name}/{number}", model)
            except BaseException:
                model.close()
                raise
        shelf.seconds = time.monotonic() - start
        version = ModelVersion(name, number, model)
        shelf.make[number], shelf.ready[number] = make, version
        return version

    def _flip(self, shelf: _Shelf, version: ModelVersion, *labels: str, drain: float) -> None:
        """Give labels to a version; those that had them and have none now are drained and closed."""
        old = {label: shelf.labels[label] for label in labels if shelf.labels.get(label) not in (None, version)}
        if STABLE in old:
            shelf.before = old[STABLE].number
        shelf.labels = {**shelf.labels, **dict.fromkeys(labels, version)}
        if old:
            events.emit(events.Swapped(version.name, version.model.version))
        for other in old.values():
            self._retire(shelf, other, drain)

    def _retire(self, shelf: _Shelf, version: ModelVersion, drain: float) -> None:
        """Close a version that has no label any more, when what it has begun has ended."""
        if any(v is version for v in shelf.labels.values()):
            return
        version.model.drain(drain)
        events.emit(events.Retired(version.name, version.model, version.model.stats))
        shelf.ready.pop(version.number, None)

    def _load_frugally(self, shelf: _Shelf, name: str, make: Callable[[], Any], label: str, old: ModelVersion,
                       drain: float, needs: int) -> int:
        labels = [key for key, version in shelf.labels.items() if version is old]
        shelf.coming = frozenset(labels)
        try:
            shelf.labels = {key: v for key, v in shelf.labels.items() if v is not old}
            self._retire(shelf, old, drain)
            try:
                new = self._make(shelf, name, make, needs)
            except BaseException:
                old = self._make(shelf, name, shelf.make[old.number], old.model.nbytes, old.number)
                self._flip(shelf, old, *labels, drain=drain)
                raise
            if STABLE in labels:
                shelf.before = old.number
            self._flip(shelf, new, *labels, drain=drain)
            return new.number
        finally:
            shelf.coming = frozenset()

    def _policy(self, old: ModelVersion, needs: int) -> Policy:
        """Whether the new version has room beside the old one, as far as the budget goes, or else the device."""
        budget = self._dormitory.budget
        free = planning.available(old.model.device) if budget == math.inf else budget - old.model.nbytes
        return "available" if needs <= free else "frugal"


class Handle:
    """A model by name and label: what is asked of it, the version that has the label answers. A version that is closed
    between the look and the question is asked no more: the next one is."""

    def __init__(self, shelf: _Shelf, name: str, label: str):
        self._shelf, self._name, self._label = shelf, name, label

    @property
    def version(self) -> ModelVersion:
        shelf = self._shelf
        found = shelf.labels.get(self._label)
        if found is None and self._label in shelf.coming:
            raise Rejected(f"{self._name} is being loaded, and there was no memory for the old version beside the new; "
                           f"try again in {shelf.seconds:.1f} s", 0, shelf.seconds)
        found = found or shelf.labels.get(self._label)  # if it has come just now
        if found is None:
            raise ModelNotFound(f"{self._name} has no version with the label {self._label!r} now")
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("__call__", args, kwargs)

    def __getattr__(self, verb: str) -> Any:
        if verb.startswith("_"):
            raise AttributeError(verb)
        found = getattr(self.version.model, verb)
        if inspect.iscoroutinefunction(found):
            return lambda *args, **kwargs: self._await(verb, args, kwargs)
        return (lambda *args, **kwargs: self._ask(verb, args, kwargs)) if callable(found) else found

    def _ask(self, verb: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = _repeatable(args), dict(zip(kwargs, _repeatable(kwargs.values()), strict=True))
        while True:
            version = self.version
            try:
                return getattr(version.model, verb)(*args, **kwargs)
            except Closed:
                self._check_moved(version)

    async def _await(self, verb: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        args, kwargs = _repeatable(args), dict(zip(kwargs, _repeatable(kwargs.values()), strict=True))
        while True:
            version = self.version
            try:
                return await getattr(version.model, verb)(*args, **kwargs)
            except Closed:
                self._check_moved(version)

    def _check_moved(self, version: ModelVersion) -> None:
        if self._shelf.labels.get(self._label) is version:
            raise Closed()


def _repeatable(values: Iterable[Any]) -> tuple:
    """What is asked twice if the version is closed meanwhile: an iterator would be empty the second time."""
    return tuple(list(value) if isinstance(value, Iterator) else value for value in values)
