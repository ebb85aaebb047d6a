"""Batches of a function's requests: padded to the ladder, computed, and taken apart again.

Axes: B requests of a batch; further ragged axes have names of their own.
"""

from __future__ import annotations

import itertools
import time
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxinfer.compiler.functions import FunctionKey, Functions
from jaxinfer.errors import RequestFailed
from jaxinfer.runtime.buffers import Buffers, is_aligned
from jaxinfer.runtime.runner import Flight, Result
from jaxinfer.runtime.served import VersionedWork
from jaxinfer.runtime.versions import Version
from jaxinfer.scheduler.batcher import Ask

NanPolicy = Literal["pass", "flag", "reject"]
SMALL = 2**20  # bytes
BATCH = "B"  # the name of the batch axis among the axes of a ladder


@dataclass(frozen=True)
class Ladders:
    """The rungs that named axes are padded to, those of the batch under "B" (absent: requests are not batched). An
    axis without rungs is not padded: every size of it has an Executable of its own.

    >>> Ladders({"B": (1, 2, 4), "length": (16, 32)}).key((("length", 16),), 3)
    FunctionKey(rows=4, sizes=(('length', 16),))
    """

    axes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def padded(self, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
        """Each axis as long as it is padded to."""
        return tuple((name, _rung(self.axes[name], size) if name in self.axes else size)
                     for name, size in sorted(sizes.items()))

    def key(self, sizes: tuple[tuple[str, int], ...], count: int) -> FunctionKey:
        return FunctionKey(_rung(self.axes[BATCH], count) if BATCH in self.axes else None, sizes)

    def keys(self, named: set[str]) -> list[FunctionKey]:
        """All Executables that there can be, if each axis that is `named` has rungs; else none."""
        if not named <= self.axes.keys():
            return []
        names = sorted(named)
        combinations = itertools.product(*(self.axes[name] for name in names))
        return [FunctionKey(rows, tuple(zip(names, sizes, strict=True)))
                for sizes in combinations for rows in self.axes.get(BATCH, (None,))]


def _rung(rungs: tuple[int, ...], size: int) -> int:
    return rungs[bisect_left(rungs, size)]


class Cargo(NamedTuple):
    """A request's arrays, the true sizes of its named axes, and those of its arrays that have NaN in them."""

    arrays: list[np.ndarray]
    sizes: dict[str, int]
    flagged: tuple[str, ...] = ()


@dataclass
class Packed:
    key: FunctionKey
    outputs: Any
    buffers: list[np.ndarray] | None
    started: float


class PaddedWork(VersionedWork):
    """Runs `functions` for a `Runner`. `version` and `ladders` may be replaced at any time: a batch reads each once.
    `sizes` counts the true sizes that came, by axis."""

    def __init__(self, functions: Functions, version: Version, ladders: Ladders, nan: NanPolicy):
        super().__init__(version)
        self.functions, self.ladders, self.nan = functions, ladders, nan
        self.sizes: dict[str, Counter[int]] = defaultdict(Counter)
        self._buffers = Buffers()

    def cost(self, shape: Any, count: int) -> float:
        """Seconds that a batch will take, as far as is known."""
        return self.seconds(self.ladders.key(shape, count))

    def dispatch(self, asks: list[Ask]) -> Flight:
        version, key = self.version, self.ladders.key(asks[0].shape, len(asks))
        self.sizes[BATCH][len(asks)] += 1
        for ask in asks:
            for axis, size in ask.payload.sizes.items():
                self.sizes[axis][size] += 1
        arrays, buffers = self._pack(asks, key)
        program = self.functions.get(key, len(asks), key.rows or 1)
        args, kwargs = jax.tree.unflatten(self.functions.structure, arrays)
        started = time.perf_counter()
        outputs = program(version.params, *args, **kwargs)
        return Flight(asks, version.number, Packed(key, outputs, buffers, started))

    def _pack(self, asks: list[Ask], key: FunctionKey) -> tuple[list[np.ndarray], list[np.ndarray] | None]:
        """A batch's arrays. One request that fills its shape is taken as it lies; the others are written into buffers,
        which the batch gives back."""
        leaves, sizes = self.functions.leaves, dict(key.sizes)
        nbytes = sum(array.nbytes for ask in asks for array in ask.payload.arrays)
        self.bytes_in += nbytes
        if len(asks) == 1 and key.rows in (None, 1):
            arrays = asks[0].payload.arrays
            whole = [array if key.rows is None else np.expand_dims(array, leaf.batch)
                     for array, leaf in zip(arrays, leaves, strict=True)]
            if all(array.shape == leaf.sized(key.rows, sizes) for array, leaf in zip(whole, leaves, strict=True)):
                self.bytes_copied += sum(array.nbytes for array in whole if not is_aligned(array))
                return whole, None
        self.bytes_copied += nbytes
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
        return buffers, buffers

    def collect(self, flight: Flight) -> list[Result]:
        packed: Packed = flight.work
        leaves, structure = jax.tree.flatten(packed.outputs)
        arrays = [np.asarray(leaf) for leaf in leaves]
        self.took(packed.key, packed.started)
        rows = ([[array.copy() for array in arrays]] if packed.key.rows is None
                else self._rows(arrays, len(flight.asks)))
        results = [self._result(ask, row, packed.key, structure) for ask, row in zip(flight.asks, rows, strict=True)]
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
        if key.sizes and (true := tuple(sorted(ask.payload.sizes.items()))) != key.sizes:
            shapes = self.functions.output_shapes(FunctionKey(None if key.rows is None else 1, true))
            if key.rows is not None:
                at = self.functions.out_batch
                shapes = [(*shape[:at], *shape[at + 1:]) for shape in shapes]
            arrays = [array[tuple(map(slice, shape))] for array, shape in zip(arrays, shapes, strict=True)]
        flagged = ask.payload.flagged
        if self.nan != "pass":
            wrong = tuple(f"output {name}".rstrip() for name, array in zip(self.functions.names, arrays, strict=True)
                          if has_nan(array))
            if wrong and self.nan == "reject":
                return Result(error=RequestFailed(f"{', '.join(wrong)} has NaN in it, and this endpoint rejects NaN"))
            flagged += wrong
        return Result(jax.tree.unflatten(structure, arrays), None, flagged)


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
