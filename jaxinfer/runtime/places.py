"""Where the models of a registry are, and what it took to have them there, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxinfer.compiler.ledger import Table
from jaxinfer.scheduler.residents import Tier

LEVELS: dict[Tier, str] = {"device": "L1 device", "host": "L2 host", "disk": "L3 disk"}


@dataclass(frozen=True)
class Place:
    """A model's weights are in a `tier`; it takes `bytes` of each of its devices while it is awake. `hits` of its
    requests found it awake, and `misses` did not; it was woken `wakes` times, the last time in `seconds`, in which
    weights came at `rate` bytes a second."""

    name: str
    tier: Tier
    bytes: int
    hits: int
    misses: int
    wakes: int
    seconds: float
    rate: float


@dataclass(repr=False)
class Places(Table):
    """A table, in a terminal and in a notebook; iterate over it for the models, or ask for one by the registry's name
    for it and its number, as "chat/1".

    >>> print(Places({"chat/1": Place("chat/1", "host", 2_000_000, 3, 1, 1, 0.5, 3e6)}))
    model   tier     MB awake  hits  misses  wakes  last wake s  GB/s
    chat/1  L2 host  2.0       3     1       1      0.500        0.00
    all                        3     1       1      hit rate     75%
    """

    columns = "model", "tier", "MB awake", "hits", "misses", "wakes", "last wake s", "GB/s"
    places: dict[str, Place] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Place]:
        return iter(self.places.values())

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    @property
    def hit_rate(self) -> float:
        """The share of all requests that found their model awake."""
        hits, misses = sum(place.hits for place in self), sum(place.misses for place in self)
        return hits / max(hits + misses, 1)

    def rows(self) -> list[tuple[str, ...]]:
        rows = [(p.name, LEVELS[p.tier], f"{p.bytes / 1e6:,.1f}", str(p.hits), str(p.misses), str(p.wakes),
                 f"{p.seconds:.3f}" if p.wakes else "", f"{p.rate / 1e9:.2f}" if p.wakes else "") for p in self]
        sums = [str(sum(getattr(p, name) for p in self)) for name in ("hits", "misses", "wakes")]
        return [*rows, ("all", "", "", *sums, "hit rate", f"{self.hit_rate:.0%}")]
