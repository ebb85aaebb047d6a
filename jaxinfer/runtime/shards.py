"""Data parallelism: shards that serve requests apart, each with an engine, a queue, pages and a delivery of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxinfer.compiler import Ledger
from jaxinfer.compiler.placement import Placement
from jaxinfer.errors import StepFailed
from jaxinfer.request import Sequence as Asked
from jaxinfer.runtime.delivery import Delivery
from jaxinfer.runtime.engine import Engine, Pulse
from jaxinfer.runtime.gate import Gate
from jaxinfer.runtime.memory import PAGE_SIZE

MOST_HOMES = 4096  # beginnings of prompts that are remembered


class Shard:
    """An engine, what delivers its answers, and the gate in front of it, to which a request's sequences come
    together. Another engine takes the place of one that stops (`Heart`)."""

    def __init__(self, engine: Engine, delivery: Delivery):
        self.engine, self.delivery = engine, delivery
        self.gate = Gate(lambda sequences: self.engine.submit(*sequences),
                         lambda sequences: any(sequence.ended is None for sequence in sequences), self.fail)

    @property
    def supervised(self) -> bool:
        return self.engine.supervised

    def supervise(self, on: bool) -> None:
        self.engine.supervised = on

    @property
    def pulse(self) -> Pulse | None:
        return self.engine.pulse

    @property
    def alive(self) -> bool:
        return self.engine.alive

    @property
    def compiling(self) -> bool:
        return self.engine.executables.awaited is not None

    def usual(self, pulse: Pulse) -> float | None:
        known = self.engine.executables.usual
        return sum(known[key] for key in pulse.keys) if all(key in known for key in pulse.keys) else None

    def revive(self, pulse: Pulse | None, why: str) -> bool:
        if not self.engine.executables.restarts:
            raise StepFailed("layers that stream, and meshes of several processes, cannot go on within a step")
        heir = self.engine.successor(pulse, why)
        if heir is None:
            return False
        self.engine = heir
        return True

    def give_up(self, why: str) -> None:
        self.engine.give_up(why)

    @property
    def load(self) -> int:
        """Requests that wait or run."""
        return self.engine.queue.waiting + len(self.engine.scheduler.running)

    def fail(self, sequences: Sequence[Asked], error: BaseException) -> None:
        """Tell a request that has not come to the engine."""
        self.delivery.failed(sequences[0], error)

    def close(self) -> None:
        self.engine.close()
        self.gate.open()  # whoever waits before it is told
        self.engine.executables.close()
        self.delivery.close()

    # What puts a model to sleep asks for.

    @property
    def place(self) -> Placement:
        return self.engine.executables.place

    @property
    def shapes(self) -> Any:
        """Of the weights, with their shardings."""
        return self.engine.executables.params

    @property
    def weights(self) -> Any:
        return self.engine.weights[self.engine.scheduler.version]

    @property
    def busy(self) -> bool:
        return self.engine.busy

    def lie_down(self) -> bool:
        return self.engine.lie_down()

    def rise(self, params: Any) -> None:
        self.engine.rise(params)


class Front:
    """Picks a request's shard; they share nothing but this."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = tuple(shards)
        self._homes: dict[tuple[int, ...], Shard] = {}  # who last read such a first page, the latest last
        self._lock = threading.Lock()

    def pick(self, tokens: Sequence[int]) -> Shard:
        """The shard with the fewest requests; or the one that has read such a beginning before, and may have it yet,
        if the wait for a place there is not longer."""
        if len(self.shards) == 1:
            return self.shards[0]
        least = min(self.shards, key=lambda shard: shard.load)
        if len(tokens) <= PAGE_SIZE:
            return least
        first = tuple(tokens[:PAGE_SIZE])
        with self._lock:
            home = self._homes.pop(first, least)
            chosen = home if home.load <= least.load + home.engine.scheduler.max_rows // 4 else least
            self._homes[first] = chosen
            if len(self._homes) > MOST_HOMES:
                del self._homes[next(iter(self._homes))]
        return chosen

    @property
    def ledger(self) -> Ledger:
        """The ledgers of all shards, as one where there are several."""
        ledgers = [shard.engine.executables.ledger for shard in self.shards]
        if len(ledgers) == 1:
            return ledgers[0]
        named = [replace(e, name=f"{e.name} data={i}") for i, ledger in enumerate(ledgers) for e in ledger]
        return Ledger({entry.name: entry for entry in named})

    def close(self) -> None:
        for shard in self.shards:
            shard.close()
