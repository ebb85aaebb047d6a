"""Layers that come one by one: read from the disk, moved to the device, computed from, given back. Each of these goes
on in a thread of its own, so that they overlap.

Source of the scheme: Sheng et al., "FlexGen", 2023 (weights pass through a share of the device's memory).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxinfer.alignment import aligned
from jaxinfer.errors import Closed, UnsupportedModel
from jaxinfer.graph import Graph, Leaf
from jaxinfer.runtime.record import Spill
from jaxinfer.runtime.tiers import AHEAD, Tiers
from jaxinfer.runtime.timeline import Timeline


@dataclass
class Passing:
    """A layer on its way through the ring: its weights, or what went wrong with them, and the buffer they lie in, if
    that is not the layer's own memory."""

    layer: int
    weights: Any
    buffer: np.ndarray | None = None


class Ring:
    """A model's layers, of which some stay on the device and the others pass through.

    `put` takes weights while they are loaded, and `start` those that stay; from then on the engine takes and gives
    (`compiler.streamed.Layers`). `aliased`: the device computes from the host's memory where it lies, so that layers
    are read from the disk into the ring itself, and nothing is moved. `held` and `peak` are bytes of weights on the
    device, now and at most; `timeline` is what happened when.
    """

    def __init__(self, graph: Graph, tiers: Tiers, device: jax.Device, aliased: bool):
        self.tiers, self.timeline, self.held, self.peak = tiers, Timeline(), 0, 0
        self._device, self._aliased = device, aliased
        self._numbers = dict(_numbers(graph, tiers))
        self._staying: dict[int, Any] = {}
        self._hosted = {i: [None] * len(record.parts) for i, record in tiers.records.items() if i not in tiers.on_disk}
        self._spill = Spill({i: tiers.records[i] for i in tiers.on_disk}) if tiers.on_disk else None
        count = (tiers.slots if aliased else tiers.stages) if tiers.on_disk else 0
        self._buffers = [aligned((tiers.largest,), np.uint8) for _ in range(count)]
        self._slots, self._taken = tiers.slots, None
        self._came: deque[Passing] = deque()  # to the host,
        self._there: deque[Passing] = deque()  # to the device,
        self._flying: deque[tuple[int, Passing | None, jax.Array, float]] = deque()  # and is computed from
        self._change, self._closing = threading.Condition(), False
        self._threads = [threading.Thread(target=self._until_closed, args=(work,), name=f"jaxinfer{work.__name__}",
                                          daemon=True) for work in (self._read, self._move, self._watch)]

    # While the weights are loaded, from several threads.

    def put(self, leaf: Leaf, unread: Any) -> jax.Array | None:
        """Read a leaf's next array, and bring it to where it belongs; returned if it stays on the device."""
        array = unread[...]
        if leaf not in self._numbers:
            return jax.device_put(array, self._device)
        layer, numbers = self._numbers[leaf]
        n = next(numbers)
        if layer in self._hosted:
            self._hosted[layer][n] = self._on_host(array)
        else:
            assert self._spill is not None
            self._spill.write(layer, n, array)
        return None

    def _on_host(self, array: np.ndarray) -> Any:
        """A copy in memory that the device computes from, or from which it fetches fastest."""
        if not self._aliased:
            return jax.device_put(array, SingleDeviceSharding(self._device, memory_kind="pinned_host"))
        copy = aligned(array.shape, array.dtype)
        copy[...] = array
        return copy

    def start(self, outer: Any, blocks: list[Any]) -> None:
        """Let layers come. `outer` is what is no layer; of `blocks`, those that stay are arrays."""
        self._staying = {i: layer for i, layer in enumerate(blocks) if i not in self.tiers.records}
        self._hosted = {i: jax.tree.unflatten(self.tiers.records[i].tree, arrays) for i, arrays in self._hosted.items()}
        self._count(sum(x.nbytes for x in jax.tree.leaves((outer, self._staying))))
        for thread in self._threads:
            thread.start()

    # In the engine's thread.

    def take(self, i: int) -> Any:
        """The weights of layer i, once they are there. Raises what went wrong when they were read."""
        if i in self._staying:
            return self._staying[i]
        with self._change:
            while self._taken is None or self._taken.layer != i:
                if self._taken is not None:
                    self._free(self._taken)  # a sweep has broken off
                self._wait(lambda: self._there)
                self._taken = self._there.popleft()
            if isinstance(self._taken.weights, Exception):
                error, passing, self._taken = self._taken.weights, self._taken, None
                self._free(passing)
                raise error
            return self._taken.weights

    def give(self, i: int, x_TD: jax.Array) -> None:
        """Layer i is free once what was computed from it is there."""
        with self._change:
            self._wait(lambda: len(self._flying) < AHEAD)
            passing, self._taken = self._taken, None
            self._flying.append((i, passing, x_TD, time.perf_counter()))
            self._change.notify_all()

    def close(self) -> None:
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        if self._spill is not None:
            self._spill.close()
        self._staying, self._hosted, self._buffers = {}, {}, []
        for passing in (self._came, self._there, self._flying):
            passing.clear()

    # In threads of their own.

    def _read(self) -> None:
        """Bring layers to the host, one after another, for ever."""
        for i in cycle(self.tiers.streamed):
            passing = Passing(i, self._hosted.get(i))
            if i not in self._hosted:
                passing.buffer = self._next(self._buffers)
                passing.weights = self._timed("read", i, lambda passing=passing: self._filled(passing))
            self._push(self._came, passing, most=1)

    def _filled(self, passing: Passing) -> Any:
        assert self._spill is not None and passing.buffer is not None
        self._spill.read(passing.layer, passing.buffer)
        return self.tiers.records[passing.layer].views(passing.buffer)

    def _move(self) -> None:
        """Bring what is on the host to the device, as slots become free."""
        while True:
            with self._change:
                self._wait(lambda: self._came and self._slots)
                passing = self._came.popleft()
                self._slots -= 1
                self._count(self.tiers.records[passing.layer].size)
                self._change.notify_all()
            if not isinstance(passing.weights, Exception):
                moved = lambda passing=passing: self._to_device(passing.weights)
                passing.weights = self._timed("" if self._aliased else "move", passing.layer, moved)
            if not self._aliased and passing.buffer is not None:
                self._push(self._buffers, passing.buffer)
                passing.buffer = None
            self._push(self._there, passing)

    def _to_device(self, weights: Any) -> Any:
        return jax.block_until_ready(jax.device_put(weights, SingleDeviceSharding(self._device)))

    def _watch(self) -> None:
        """See layers computed, one after another, and free them."""
        end = 0.0
        while True:
            with self._change:
                self._wait(lambda: self._flying)
                i, passing, x_TD, start = self._flying[0]
            with suppress(Exception):  # whoever reads the step's tokens is told
                jax.block_until_ready(x_TD)
            start, end = max(start, end), time.perf_counter()
            self.timeline.add("compute", i, start, end)
            with self._change:
                del x_TD
                self._flying.popleft()
                if passing is not None:
                    self._free(passing)
                self._change.notify_all()

    def _until_closed(self, work: Callable[[], None]) -> None:
        with suppress(Closed):
            work()

    def _wait(self, ready: Callable[[], Any]) -> None:
        """Until something is so. The lock is held. Raises Closed."""
        self._change.wait_for(lambda: self._closing or ready())
        if self._closing:
            raise Closed()

    def _next(self, items: Any) -> Any:
        with self._change:
            self._wait(lambda: items)
            return items.pop()

    def _push(self, items: Any, item: Any, most: int | None = None) -> None:
        with self._change:
            self._wait(lambda: most is None or len(items) < most)
            items.append(item)
            self._change.notify_all()

    def _timed(self, what: str, i: int, act: Callable[[], Any]) -> Any:
        """What `act` returns, or the exception that it raises, on the timeline if it has a name there."""
        start = time.perf_counter()
        try:
            return act()
        except Exception as error:
            return error
        finally:
            if what:
                self.timeline.add(what, i, start, time.perf_counter(), self.tiers.records[i].size)

    def _free(self, passing: Passing) -> None:
        """Its slot is free. The lock is held."""
        for array in jax.tree.leaves(passing.weights):
            if isinstance(array, jax.Array):
                array.delete()
        if passing.buffer is not None:
            self._buffers.append(passing.buffer)
        self._slots += 1
        self._count(-self.tiers.records[passing.layer].size)
        self._change.notify_all()

    def _count(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak = max(self.peak, self.held)


def _numbers(graph: Graph, tiers: Tiers) -> Iterator[tuple[Leaf, tuple[int, Iterator[int]]]]:
    """For each leaf of a layer that passes: which layer it is of, and the numbers of its arrays in that layer's record.
    Raises UnsupportedModel for a leaf of several layers."""
    seen: set[Leaf] = set()
    for i, layer in enumerate(graph.spec["blocks"]):
        leaves, tree = jax.tree.flatten(layer)
        if shared := seen.intersection(leaves):
            raise UnsupportedModel(f"{graph.name}: layer {i} has the weight {shared.pop().names[0]} of an earlier one; "
                                   "only layers with weights of their own can be streamed")
        seen.update(leaves)
        if i in tiers.records:
            record = tiers.records[i]
            numbers = tree.flatten_up_to(jax.tree.unflatten(record.tree, range(len(record.parts))))
            for leaf, its in zip(leaves, numbers, strict=True):
                yield leaf, (i, iter(jax.tree.leaves(its)))
