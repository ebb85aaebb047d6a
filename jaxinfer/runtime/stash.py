"""The weights of a model that sleeps: on the host, in a file of our own, or in the checkpoint that they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxinfer.alignment import aligned
from jaxinfer.frontend.weights import READERS
from jaxinfer.runtime.record import Record, Spill


class Stash:
    """Where one version's weights lie beside, or instead of, the arrays on the device. Weights never change: what was
    made of them once serves until they are replaced. `shapes` are theirs, with their shardings; `again` reads them
    onto the device from where they came, where that can be done.

    `aliased`: the device computes from the host's memory. Then what lies on the host is the device's own arrays; else
    a copy in pinned memory, which the device fetches fastest, and which stays when it has.
    """

    def __init__(self, shapes: Any, aliased: bool, again: Callable[[], Any] | None):
        self.shapes, self.aliased, self._again = shapes, aliased, again
        self._host: Any = None
        self._spill: Spill | None = None

    @property
    def stored(self) -> bool:
        """Whether they are on the disk."""
        return self._again is not None or self._spill is not None

    @property
    def stage(self) -> int:
        """Bytes of the host through which they pass on their way to and from the disk: an array at a time, or those
        that are read at once from where they came."""
        sizes = sorted(Record.of(leaf).size for leaf in jax.tree.leaves(self.shapes))
        return 0 if self.aliased else sum(sizes[-(READERS if self._again else 1):])

    def copy(self, params: Any) -> None:
        """To the host, unless they are there."""
        if self._host is None:
            pinned = lambda x: x.sharding.with_memory_kind("pinned_host")
            copied = lambda: jax.block_until_ready(jax.device_put(params, jax.tree.map(pinned, params)))
            self._host = params if self.aliased else copied()

    def store(self, params: Any = None) -> None:
        """To the disk (from the host, if `params` are not given), unless they are there; and off the host. Raises
        OutOfMemory if the disk is full."""
        if not self.stored:
            self._spill = _written(self._host if params is None else params)
        self._host = None

    def drop(self) -> None:
        """Off the host."""
        self._host = None

    def fetch(self) -> Any:
        """The weights on their device. Raises CorruptFile if the disk has not got them any more."""
        if self._host is not None:
            if self.aliased:
                return self._host
            return jax.block_until_ready(jax.device_put(self._host, jax.tree.map(lambda x: x.sharding, self.shapes)))
        if self._spill is not None:
            return self._read(self._spill)
        assert self._again is not None
        return jax.block_until_ready(self._again())

    def _read(self, spill: Spill) -> Any:
        """Array by array: into memory of its own where that is the device's, or through a buffer."""
        leaves, tree = jax.tree.flatten(self.shapes)
        buffer, arrays = aligned((self.stage,), np.uint8), []
        for i, leaf in enumerate(leaves):
            record = spill.records[i]
            into = aligned((record.size,), np.uint8) if self.aliased else buffer
            spill.read(i, into)
            array = jax.device_put(record.views(into), leaf.sharding)
            arrays.append(array if self.aliased else jax.block_until_ready(array))
        return jax.tree.unflatten(tree, arrays)

    def forget(self) -> None:
        """They are replaced, or gone."""
        self._host = self._again = None
        spill, self._spill = self._spill, None
        if spill is not None:
            spill.close()


def _written(params: Any) -> Spill:
    leaves = jax.tree.leaves(params)
    spill = Spill({i: Record.of(leaf) for i, leaf in enumerate(leaves)})
    try:
        for i, leaf in enumerate(leaves):
            spill.write(i, 0, np.asarray(leaf))
    except BaseException:
        spill.close()
        raise
    return spill
