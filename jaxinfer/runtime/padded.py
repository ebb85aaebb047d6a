"""Batches of a function's requests: padded to the ladder, computed, and taken apart again.

Axes: B requests of a batch; further ragged axes have names of their own.
"""

from __future__ import annotations

import itertools
import math
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxinfer.alignment import is_aligned
from jaxinfer.compiler.functions import FunctionKey, Functions
from jaxinfer.errors import RequestFailed
from jaxinfer.runtime.buffers import Buffers
from jaxinfer.runtime.replies import Result
from jaxinfer.runtime.runner import Flight
from jaxinfer.runtime.served import VersionedWork
from jaxinfer.runtime.versions import Version
from jaxinfer.scheduler.batcher import Ask

NanPolicy = Literal["pass", "flag", "reject"]
SMALL = 2**20  # bytes
BATCH = "B"  # the name of the batch axis among the axes of a ladder
MOST_PROGRAMS = 128  # that are kept of an endpoint which has an axis without rungs

Sizes = tuple[tuple[str, int], ...]  # of named axes, in the order of their names


@dataclass(frozen=True)
class Ladders:
    """The rungs that named axes are padded to, those of the batch under "B" (absent: requests are not batched). An
    axis without rungs is not padded: every size of it has an Executable of its own, while it is among the last used.

    >>> Ladders({"B": (1, 2, 4), "length": (16, 32)}).key((("length", 16),), 3)
    FunctionKey(rows=4, sizes=(('length', 16),))
    """

    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def padded(self, sizes: Mapping[str, int]) -> Sizes:
        """Each axis as long as it is padded to."""
        return tuple((name, _rung(self.axes[name], size) if name in self.axes else size)
                     for name, size in in_order(sizes))

    def key(self, sizes: Sizes, count: int) -> FunctionKey:
        return FunctionKey(_rung(self.axes[BATCH], count) if BATCH in self.axes else None, sizes)

    def keys(self, named: set[str]) -> list[FunctionKey]:
        """All Executables that there can be, if each axis that is `named` has rungs; else none."""
        if not named <= self.axes.keys():
            return []
        rows = self.axes.get(BATCH, (None,))
        return _keys({name: self.axes[name] for name in sorted(named)}, rows)

    def holding(self, key: FunctionKey) -> list[FunctionKey]:
        """Those that a batch of `key` fits into, from itself to the largest. An axis without rungs stays as it is."""
        from_ = lambda name, size: [rung for rung in self.axes.get(name, (size,)) if rung >= size]
        rows = (None,) if key.rows is None else from_(BATCH, key.rows)
        found = _keys({name: from_(name, size) for name, size in key.sizes}, rows)
        return sorted(found, key=lambda key: (key.rows or 1) * math.prod(size for _, size in key.sizes))


def _keys(axes: Mapping[str, Sequence[int]], rows: Sequence[int | None]) -> list[FunctionKey]:
    """Every combination of rungs and rows."""
    return [FunctionKey(count, tuple(zip(axes, sizes, strict=True)))
            for sizes in itertools.product(*axes.values()) for count in rows]


def _rung(rungs: tuple[int, ...], size: int) -> int:
    return rungs[bisect_left(rungs, size)]


class Cargo(NamedTuple):
    """A request's arrays, the true sizes of its named axes, the bytes that the door had to copy, and those of its
    arrays that have NaN in them."""

    arrays: list[np.ndarray]
    sizes: dict[str, int]
    copied: int = 0
    flagged: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


@dataclass
class Packed:
    key: FunctionKey
    outputs: Any
    buffers: list[np.ndarray] | None
    copied: list[int]  # bytes of each request
    started: float


class PaddedWork(VersionedWork):
    """Runs `functions` for a `Runner`. `version` and `ladders` may be replaced at any time: a batch reads each once.
    `sizes` counts the true sizes that came, by axis."""

    def __init__(self, functions: Functions, version: Version, ladders: Ladders, nan: NanPolicy):
        super().__init__(version, functions)
        self.functions, self.ladders, self.nan = functions, ladders, nan
        self.sizes: dict[str, Counter[int]] = defaultdict(Counter)
        self._buffers = Buffers()
        self._last: dict[FunctionKey, None] = {}  # programs, the last used last

    def cost(self, shape: Any, count: int) -> float:
        """Seconds that a batch will take, as far as is known."""
        return self.seconds(self.ladders.key(shape, count))

    def dispatch(self, asks: list[Ask]) -> Flight:
        version, key = self.version, self._key(asks)
        self.sizes[BATCH][len(asks)] += 1
        for ask in asks:
            for axis, size in ask.payload.sizes.items():
                self.sizes[axis][size] += 1
        arrays, buffers, copied = self._pack(asks, key)
        self.bytes_in += sum(ask.payload.nbytes for ask in asks)
        self.bytes_copied += sum(copied)
        program = self.functions.get(key, len(asks), key.rows or 1)
        self._used(key)
        args, kwargs = jax.tree.unflatten(self.functions.structure, arrays)
        started = time.perf_counter()
        outputs = program(version.params, *args, **kwargs)
        return Flight(asks, version.number, Packed(key, outputs, buffers, copied, started))

    def _key(self, asks: list[Ask]) -> FunctionKey:
        """What a batch runs on: its own shape, or one that holds it while its own is compiled."""
        key = self.ladders.key(asks[0].shape, len(asks))
        if self.functions.is_ready(key):
            return key
        return self.functions.nearest(self.ladders.holding(key), self.functions.why)

    def _used(self, key: FunctionKey) -> None:
        """Where there is no end of sizes, the programs that were not used for the longest are forgotten."""
        if all(name in self.ladders.axes for name, _ in key.sizes):
            return
        self._last.pop(key, None)
        self._last[key] = None
        if len(self._last) > MOST_PROGRAMS:
            del self._last[next(iter(self._last))]
            self.keep_only(self._last.__contains__)

    def keep_only(self, wanted: Callable[[FunctionKey], bool]) -> None:
        """Forget the programs of all other keys, and the buffers."""
        self.functions.keep_only(wanted)
        self._buffers.keep_only(wanted)

    def shapes(self, true: Sizes) -> list[tuple[int, ...]]:
        """Those of a request's own results. The first of its sizes costs a trace of the function: what JAX's symbolic
        sizes would say at once is wrong where a function asks whether one is even, or equals another."""
        if BATCH not in self.ladders.axes:
            return self.functions.output_shapes(FunctionKey(None, true))
        at = self.functions.out_batch
        return [(*shape[:at], *shape[at + 1:]) for shape in self.functions.output_shapes(FunctionKey(1, true))]

    def _pack(self, asks: list[Ask], key: FunctionKey
              ) -> tuple[list[np.ndarray], list[np.ndarray] | None, list[int]]:
        """A batch's arrays. One request that fills its shape is taken as it lies; the others are written into buffers,
        which the batch gives back. Last, the bytes of each request that were copied, at the door and here."""
        leaves, sizes = self.functions.leaves, dict(key.sizes)
        if len(asks) == 1 and key.rows in (None, 1):
            arrays = asks[0].payload.arrays
            whole = [array if key.rows is None else np.expand_dims(array, leaf.batch)
                     for array, leaf in zip(arrays, leaves, strict=True)]
            if all(array.shape == leaf.sized(key.rows, sizes) for array, leaf in zip(whole, leaves, strict=True)):
                unaligned = sum(array.nbytes for array in whole if not is_aligned(array))
                return whole, None, [asks[0].payload.copied + unaligned]
        buffers = self._buffers.take(key, [(leaf.sized(key.rows, sizes), leaf.dtype) for leaf in leaves])
        for i, (leaf, buffer) in enumerate(zip(leaves, buffers, strict=True)):
            rows = [buffer]
            if key.rows is not None:
                moved = np.moveaxis(buffer, leaf.batch, 0)
                rows = [moved[row, ...] for row in range(key.rows)]  # views, of numbers as well
            for row, ask in zip(rows, asks, strict=False):
                write(row, ask.payload.arrays[i], leaf.pad)
            for row in rows[len(asks):]:
                row[...] = rows[0]  # padding is a request that nobody asked for, and cannot be out of the ordinary
        return buffers, buffers, [ask.payload.copied + ask.payload.nbytes for ask in asks]

    def collect(self, flight: Flight) -> list[Result]:
        packed: Packed = flight.work
        leaves, structure = jax.tree.flatten(packed.outputs)
        arrays = [np.asarray(leaf) for leaf in leaves]
        self.took(packed.key, packed.started)
        rows = ([[array.copy() for array in arrays]] if packed.key.rows is None
                else self._rows(arrays, len(flight.asks)))
        results = [self._result(ask, row, packed.key, structure)._replace(bytes_copied=copied)
                   for ask, row, copied in zip(flight.asks, rows, packed.copied, strict=True)]
        if packed.buffers is not None:
            self._buffers.give(packed.key, packed.buffers)
        return results

    def _rows(self, arrays: list[np.ndarray], count: int) -> list[list[np.ndarray]]:
        """Each request's own arrays, to keep and to write to. Small batches are copied as one, which stays as long as
        any of its rows; of large ones each row is copied, so that one that is kept does not keep the others."""
        at = self.functions.out_batch
        if sum(array.nbytes for array in arrays) > SMALL:
            return [[array.take(row, at) for array in arrays] for row in range(count)]
        columns = [np.moveaxis(array, at, 0)[:count].copy() for array in arrays]
        return [list(row) for row in zip(*columns, strict=True)]

    def _result(self, ask: Ask, arrays: list[Any], key: FunctionKey, structure: Any) -> Result:
        if (true := in_order(ask.payload.sizes)) != key.sizes:
            arrays = [array[tuple(map(slice, shape))]
                      for array, shape in zip(arrays, self.shapes(true), strict=True)]
        flagged = ask.payload.flagged
        if self.nan != "pass":
            wrong = tuple(f"output {name}".rstrip() for name, array in zip(self.functions.names, arrays, strict=True)
                          if has_nan(array))
            if wrong and self.nan == "reject":
                return Result(error=RequestFailed(f"{', '.join(wrong)} has NaN in it, and this endpoint rejects NaN"))
            flagged += wrong
        return Result(jax.tree.unflatten(structure, arrays), None, flagged)


def in_order(sizes: Mapping[str, int]) -> Sizes:
    return tuple(sorted(sizes.items()))


def write(row: np.ndarray, array: np.ndarray, pad: Any) -> None:
    """A request's array into its place, with padding behind it."""
    if row.shape == array.shape:
        row[...] = array
        return
    row[...] = pad
    row[tuple(map(slice, array.shape))] = array


def has_nan(array: np.ndarray) -> bool:
    """Whether an array of any type has NaN in it (only floats can; bfloat16 and its kin are floats that numpy does not
    know as such)."""
    return array.dtype.kind in "fcV" and bool(np.isnan(array.astype(np.float32) if array.dtype.kind == "V" else array
                                                        ).any())
