"""Named models with versions: loaded, warmed, flipped to, drained and rolled back while requests run."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxinfer.errors import Closed, InvalidOption, ModelNotFound
from jaxinfer.runtime import memory as planning

Policy = Literal["available", "frugal"]
STABLE = "stable"


@dataclass(frozen=True)
class ModelVersion:
    """One version of a named model: its `number`, and what serves it, an Endpoint or a LanguageModel."""

    name: str
    number: int
    model: Any


@dataclass
class _Shelf:
    """The versions of one name. `labels` is replaced, never changed: whoever reads it sees one state of it."""

    make: dict[int, Callable[[], Any]] = field(default_factory=dict)
    ready: dict[int, ModelVersion] = field(default_factory=dict)
    labels: dict[str, ModelVersion] = field(default_factory=dict)
    history: list[int] = field(default_factory=list)  # the numbers that were stable, the latest last
    lock: threading.RLock = field(default_factory=threading.RLock)
    last: int = 0


class Registry:
    """Models by name, each with its own queue, memory and threads, so that one's overload or end leaves the others
    alone.

    `load` makes a version, warms it and flips a label to it; the version that had the label is drained and closed.
    `registry[name]` is a handle that always asks the version with the label "stable", `registry.at(name, label)` that
    of another label. Handles never lock.

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

    def __init__(self):
        self._shelves: dict[str, _Shelf] = {}
        self._lock, self._closed = threading.Lock(), False

    # Reading.

    def __getitem__(self, name: str) -> Handle:
        return self.at(name)

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._shelves))

    def at(self, name: str, label: str = STABLE) -> Handle:
        """A handle to whatever version has a label."""
        shelf = self._shelf(name)
        if label not in shelf.labels:
            raise ModelNotFound(f"{name} has no version with the label {label!r}; it has {sorted(shelf.labels)}")
        return Handle(shelf, name, label)

    def versions(self, name: str) -> list[int]:
        """The numbers of the versions that are loaded."""
        return sorted(self._shelf(name).ready)

    def labels(self, name: str) -> dict[str, int]:
        return {label: version.number for label, version in self._shelf(name).labels.items()}

    # Changing.

    def load(self, name: str, make: Callable[[], Any], *, label: str = STABLE, policy: Policy | None = None,
             needs: int | str | None = None, drain: float = 60.0) -> int:
        """Make a version (`make()` returns an Endpoint or a LanguageModel), warm it, and give it the `label`; whoever
        had that is drained for at most `drain` seconds and closed. Returns its number.

        `policy`: "available" loads the new version beside the old one, so that there always is one; "frugal" closes
        the old one first, where both do not fit. By default it follows from `needs`, the bytes of the new version
        (those of the old one if it is not given), and from what is free. If `make` raises, so does this, and the old
        version serves on; a frugal load makes it again.
        """
        if policy not in (None, "available", "frugal"):
            raise InvalidOption(f"policy is {policy!r}; it must be 'available' or 'frugal'")
        with self._lock:
            if self._closed:
                raise Closed()
            shelf = self._shelves.setdefault(name, _Shelf())
        with shelf.lock:
            old = shelf.labels.get(label)
            if old is not None and (policy or self._policy(old, needs)) == "frugal":
                return self._load_frugally(shelf, name, make, label, old, drain)
            try:
                new = self._make(shelf, name, make)
            except BaseException:
                if not shelf.ready:
                    self._shelves.pop(name, None)
                raise
            self._flip(shelf, label, new)
            if old is not None:
                self._retire(shelf, old, drain)
            return new.number

    def flip(self, name: str, number: int, label: str = STABLE, drain: float = 60.0) -> None:
        """Give a label to a version that is loaded; whoever had it is drained and closed, unless it has another."""
        shelf = self._shelf(name)
        with shelf.lock:
            if number not in shelf.ready:
                raise ModelNotFound(f"{name} has no version {number}; loaded are {sorted(shelf.ready)}")
            old = shelf.labels.get(label)
            self._flip(shelf, label, shelf.ready[number])
            if old is not None:
                self._retire(shelf, old, drain)

    def roll_back(self, name: str, drain: float = 60.0) -> int:
        """Make the version that was stable before stable again, loading it anew if it was closed."""
        shelf = self._shelf(name)
        with shelf.lock:
            before = next((n for n in reversed(shelf.history[:-1]) if n != shelf.history[-1]), None)
            if before is None:
                raise ModelNotFound(f"{name} has no earlier stable version to roll back to")
            old = shelf.labels[STABLE]
            version = shelf.ready.get(before) or self._make(shelf, name, shelf.make[before], before)
            self._flip(shelf, STABLE, version)
            self._retire(shelf, old, drain)
            return before

    def unload(self, name: str, number: int | None = None, drain: float = 60.0) -> None:
        """Drain and close one version, or all of them; then the name is forgotten."""
        shelf = self._shelf(name)
        with shelf.lock:
            for version in tuple(shelf.ready.values()):
                if number in (None, version.number):
                    shelf.labels = {label: v for label, v in shelf.labels.items() if v is not version}
                    self._retire(shelf, version, drain)
            if not shelf.ready:
                self._shelves.pop(name, None)

    def close(self) -> None:
        """Close everything at once: what waits fails with Closed."""
        with self._lock:
            self._closed = True
        for name in self:
            self.unload(name, drain=0.0)

    # Inside.

    def _shelf(self, name: str) -> _Shelf:
        try:
            return self._shelves[name]
        except KeyError:
            raise ModelNotFound(f"there is no model {name!r}; there are {sorted(self._shelves)}") from None

    def _make(self, shelf: _Shelf, name: str, make: Callable[[], Any], number: int | None = None) -> ModelVersion:
        model = make()
        try:
            model.warmup()
        except BaseException:
            model.close()
            raise
        if number is None:
            shelf.last += 1
            number = shelf.last
        version = ModelVersion(name, number, model)
        model.renumber(number)
        shelf.make[number], shelf.ready[number] = make, version
        return version

    def _flip(self, shelf: _Shelf, label: str, version: ModelVersion) -> None:
        shelf.labels = {**shelf.labels, label: version}
        if label == STABLE:
            shelf.history.append(version.number)

    def _retire(self, shelf: _Shelf, version: ModelVersion, drain: float) -> None:
        """Close a version that has no label any more, when what it has begun has ended."""
        if any(v is version for v in shelf.labels.values()):
            return
        version.model.drain(drain)
        shelf.ready.pop(version.number, None)

    def _load_frugally(self, shelf: _Shelf, name: str, make: Callable[[], Any], label: str, old: ModelVersion,
                       drain: float) -> int:
        shelf.labels = {key: v for key, v in shelf.labels.items() if v is not old}
        self._retire(shelf, old, drain)
        try:
            new = self._make(shelf, name, make)
        except BaseException:
            self._flip(shelf, label, self._make(shelf, name, shelf.make[old.number], old.number))
            raise
        self._flip(shelf, label, new)
        return new.number

    def _policy(self, old: ModelVersion, needs: int | str | None) -> Policy:
        wanted = planning.parse_bytes(needs) if needs is not None else old.model.nbytes
        return "available" if wanted <= planning.available(old.model.device) else "frugal"


class Handle:
    """A model by name and label: what is asked of it, the version that has the label answers. A version that is closed
    between the look and the question is asked no more: the next one is."""

    def __init__(self, shelf: _Shelf, name: str, label: str):
        self._shelf, self._name, self._label = shelf, name, label

    @property
    def version(self) -> ModelVersion:
        try:
            return self._shelf.labels[self._label]
        except KeyError:
            raise ModelNotFound(f"{self._name} has no version with the label {self._label!r} now") from None

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
