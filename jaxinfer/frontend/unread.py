"""Arrays that stay in a checkpoint until they are cut: a weight as the engine holds it, of a file's tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.alignment import aligned
from jaxinfer.errors import CheckpointMismatch
from jaxinfer.frontend.files import ALL, Mapped, Tensor
from jaxinfer.kernels.quantised import Format, Quantised, blank, fill, finite, rows_at_once

CHUNK = 1 << 16  # numbers read and rounded at a time: their temporaries stay in the cache


@dataclass(frozen=True, eq=False)
class Unread:
    """An array of `shape` and `dtype` that is read where it is cut: `x[...]` is all of it, `x[rows, columns]` a piece,
    for which nothing else is read if the file's format allows that. Rows are a slice, or an array of their numbers, and
    so are columns of many matrices; where a tensor holds all of these, the columns are then read whole.

    Its `tensors` are transposed, concatenated along the first axis and cast. As `x[...]` a tensor that needs no change,
    and that lies at a multiple of 64 in a file so that the CPU's `device_put` takes it over, is handed out as it is
    mapped, unless it is to be `copied`; all else is written once, into memory that is aligned alike.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    tensors: tuple[Tensor, ...]
    transpose: bool = False
    copied: bool = False

    def __getitem__(self, index: Any) -> np.ndarray:
        if index is ...:
            if (mapped := self._mapped()) is not None:
                return mapped
            if (whole := self.as_stored()) is not None:
                return whole
        cuts = _cuts(index, self.shape)
        numbers = [np.arange(size)[cut] for size, cut in zip(self.shape, cuts, strict=True)]
        out = aligned(tuple(map(len, numbers)), self.dtype)
        if not self.shape:
            out[...] = self.tensors[0].read()
            return out
        rows, deeper, flat = numbers[0], cuts[1:], out
        if len(self.shape) == 3 and len(self.tensors[0].shape) == 2:  # of matrices: in the file these axes are one
            rows, deeper = (rows[:, None] * self.shape[1] + numbers[1]).ravel(), cuts[2:]
            flat = out.reshape(len(rows), out.shape[2])
        asked = [cut for cut in deeper[:1] if isinstance(cut, slice)]
        left = ALL, *(ALL for _ in asked), *deeper[len(asked):]
        for start, piece in self.pieces(rows, *asked):
            cast_into(flat[start : start + len(piece)], piece[left])
        return out

    @property
    def in_rows(self) -> bool:
        """Whether some rows can be had for the price of some rows."""
        return bool(self.shape) and all(getattr(tensor, "together", 1) == 1 for tensor in self.tensors)

    def _mapped(self) -> np.ndarray | None:
        """The array where the file has it, if it can be taken over there."""
        tensor = self.tensors[0]
        if self.copied or len(self.tensors) > 1 or self.transpose or not isinstance(tensor, Mapped):
            return None
        return None if tensor.dtype != self.dtype or tensor.offset % 64 else tensor.read().reshape(self.shape)

    def as_stored(self, new: Callable[..., np.ndarray] | None = None) -> np.ndarray | None:
        """The array, in `new` memory, if its bytes are the files' in their order: read at once, since pieces of 128 KiB
        keep threads waiting for Python (16 GB from the page cache took 10 s)."""
        if self.transpose or not all(isinstance(t, Mapped) and t.dtype == self.dtype for t in self.tensors):
            return None
        out, at = (new or aligned)(self.shape, self.dtype), 0
        stored = memoryview(out.reshape(-1).view(np.uint8))
        for tensor in self.tensors:
            tensor.read_into(stored[at : at + tensor.nbytes])  # type: ignore[attr-defined]
            at += tensor.nbytes
        return out

    def pieces(self, rows: np.ndarray, columns: slice = ALL) -> Iterator[tuple[int, np.ndarray]]:
        """These rows as the files have them, some at a time, each time with the place of the first. Those of a
        transposed tensor, the file's columns, come at once."""
        sizes = np.array([tensor.shape[1 if self.transpose else 0] for tensor in self.tensors])
        ends = sizes.cumsum()
        owner = ends.searchsorted(rows, "right")
        breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(owner) != 0)) + 1
        for run in np.split(np.arange(len(rows)), breaks):
            if not len(run):
                continue
            tensor, base = self.tensors[owner[run[0]]], ends[owner[run[0]]] - sizes[owner[run[0]]]
            place, first, last = int(run[0]), int(rows[run[0]] - base), int(rows[run[-1]] - base) + 1
            if self.transpose:
                low, high, _ = columns.indices(tensor.shape[0])
                yield place, tensor.rows(low, high, slice(first, last)).T
                continue
            of_columns, step = () if columns is ALL else (columns,), _together(tensor)
            for row in range(first, last, step):
                yield place + row - first, tensor.rows(row, min(row + step, last), *of_columns)


    def of_matrix(self, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """`pieces` of a stack of matrices as one that has the rows of all. Where the file has it as a stack of its own,
        each matrix is read whole."""
        if len(self.tensors[0].shape) < 3:
            yield from self.pieces(rows)
            return
        owner, within = np.divmod(rows, self.shape[1])
        for run in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(owner)) + 1):
            for _, piece in self.pieces(owner[run[:1]]):
                yield int(run[0]), piece[0][within[run]]


@dataclass(frozen=True, eq=False)
class Rounded:
    """A weight that is quantised while it is read, some rows at a time, and so never held as floats. `parts()` are
    read where they are cut, rows alone (of a stack, rows of its matrices): what was made for one part waits for the
    others."""

    floats: Unread
    format: Format
    dtype: np.dtype
    source: str
    names: str
    _made: dict[bytes, tuple[Quantised, set[str]]] = field(default_factory=dict)

    def parts(self) -> Quantised:
        names = iter(("values", "scale", "minimum"))
        part = lambda shape, dtype: Part(shape, dtype, self, next(names))
        return blank(self.format, self.floats.shape, self.dtype, part)

    def take(self, name: str, rows: np.ndarray, last: bool) -> np.ndarray:
        """Some rows of a part, of which more is wanted unless this is the `last` time."""
        key, every = rows.tobytes(), {"values", "scale", "minimum"} if self.format.group else {"values", "scale"}
        weight, wanted = self._made.pop(key, (None, every))
        weight = weight or self._quantised(rows)
        if wanted := wanted - ({name} if last else set()):
            self._made[key] = weight, wanted
        return getattr(weight, name)

    def forget(self) -> None:
        """What was made for parts that nobody will read: other processes' devices have them."""
        self._made.clear()

    def _quantised(self, rows: np.ndarray) -> Quantised:
        out = blank(self.format, (len(rows), self.floats.shape[-1]), self.dtype, aligned)
        step = rows_at_once(out.shape)
        for start, piece in self.floats.of_matrix(rows):
            for i in range(0, len(piece), step):
                fill(out, start + i, piece[i : i + step])
        if not finite(out):
            raise CheckpointMismatch(self.source, [f"not finite: {self.names} holds NaN, or numbers too large for "
                                                   f"{self.format.name}; it cannot be quantised"])
        return out


@dataclass(frozen=True, eq=False)
class Part:
    """One of the arrays of a weight that is quantised while it is read. Of columns in several pieces, the last ones are
    to be read last."""

    shape: tuple[int, ...]
    dtype: np.dtype
    weight: Rounded
    name: str

    def __getitem__(self, index: Any) -> np.ndarray:
        cuts, outer = _cuts(index, self.shape), len(self.weight.floats.shape) - 1
        numbers = np.arange(math.prod(self.shape[:outer])).reshape(self.shape[:outer])
        for axis, cut in enumerate(cuts[:outer]):
            numbers = numbers[(ALL,) * axis + (cut,)]
        last = all(size - 1 in np.arange(size)[cut] for size, cut in zip(self.shape[outer:], cuts[outer:], strict=True))
        taken = self.weight.take(self.name, numbers.ravel(), last)
        return taken.reshape(*numbers.shape, *taken.shape[1:])[(ALL,) * outer + cuts[outer:]]


def _cuts(index: Any, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What is cut of each axis; `ALL` itself where that is all of it."""
    index = () if index is ... else index if isinstance(index, tuple) else (index,)
    cuts = (*index, *(ALL,) * (len(shape) - len(index)))
    return tuple(ALL if isinstance(cut, slice) and cut.indices(size) == (0, size, 1) else cut
                 for cut, size in zip(cuts, shape, strict=True))


def _together(tensor: Tensor) -> int:
    """How many rows of a tensor are read at a time: where its format has many of them in one piece, at least those
    (`together`; None: all)."""
    rows = getattr(tensor, "together", 1)
    return max(1, tensor.shape[0] if rows is None else rows, CHUNK // max(1, math.prod(tensor.shape[1:])))


def cast_into(out: np.ndarray, array: np.ndarray) -> None:
    """Write `array` over `out`, in out's dtype. float32 to bfloat16 on raw bits is twice as fast as ml_dtypes' own
    cast on one thread and, since numpy lets go of the lock, four times on two (3.3 and 4.4 GB/s of float32)."""
    if out.dtype != ml_dtypes.bfloat16 or array.dtype != np.float32:
        out[...] = array
        return
    step = max(1, CHUNK // max(1, math.prod(array.shape[1:])))
    for i in range(0, len(array), step):
        bits = np.ascontiguousarray(array[i : i + step]).view(np.uint32)
        if ((bits & 0x7FFFFFFF) > 0x7F800000).any():  # rounding could carry a NaN into an infinity
            out[i : i + step] = array[i : i + step]
            continue
        half = bits >> 16
        half &= 1  # to nearest, ties to even
        half += 0x7FFF
        half += bits
        half >>= 16
        out[i : i + step].view(np.uint16)[...] = half
