"""How bytes from outside come in: files are mapped, tensors are views of them, bad JSON names its place."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxinfer.errors import CorruptFile

ALL = slice(None)


class Tensor(Protocol):
    """A weight that stays on disk until it is read.

    `shape` is in numpy's order (outermost first), `dtype` is that of what `read()` returns, `nbytes` counts
    the bytes on disk. `read()` may be called from several threads at once. `rows(start, stop, columns)` is a part of
    what `read()` returns, in memory of its own, for which the rest need not be unpacked; `columns` is a slice of the
    second axis. Both raise CorruptFile, with the file and the tensor, if the file has changed since it was opened.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> np.ndarray: ...
    def rows(self, start: int, stop: int, columns: slice = ALL) -> np.ndarray: ...


class Seen:
    """A file as it was when it was first looked at. One that is open (`descriptor`) stays what it is when its name is
    taken away or given to another one."""

    def __init__(self, path: Path, descriptor: int | None = None):
        self.path, self._open = path, descriptor
        self._state = self._look()

    def _look(self) -> tuple[int, int, int]:
        found = os.stat(self.path if self._open is None else self._open)
        return found.st_size, found.st_mtime_ns, found.st_ino

    def check(self, tensor: str) -> None:
        """Raises CorruptFile if it is another file by now, or none; `tensor` is what is read of it."""
        try:
            now = self._look()
        except OSError as error:
            raise CorruptFile(f"{self.path}: is gone since it was opened ({error.strerror}); tensor {tensor!r} cannot "
                              "be read") from error
        if now != self._state:
            raise CorruptFile(f"{self.path}: has changed since it was opened (it had {self._state[0]} bytes, and now "
                              f"{now[0]}) while tensor {tensor!r} was read; load it again")


class File:
    """A file whose pieces are read as it was when it was opened, or not at all. `buffer` maps it: no byte is read
    before it is touched there. Raises CorruptFile if the file is empty."""

    def __init__(self, path: Path):
        self._file = path.open("rb", buffering=0)
        self.path, self._seen = path, Seen(path, self._file.fileno())
        if not path.stat().st_size:
            raise CorruptFile(f"{path}: the file is empty")
        self.buffer = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)

    def view(self, tensor: str, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Bytes of a tensor where they lie in the page cache, read-only."""
        self._seen.check(tensor)
        return np.ndarray(shape, dtype, buffer=self.buffer, offset=offset)

    def read(self, tensor: str, pieces: Iterable[tuple[int, memoryview]]) -> None:
        """Bytes of a tensor from each offset into memory. They are not read through the map: where a file ends early
        that would end the process."""
        for offset, out in pieces:
            while len(out):
                count = os.preadv(self._file.fileno(), [out], offset)
                if not count:
                    raise CorruptFile(f"{self.path}: ends early: tensor {tensor!r} has {len(out)} bytes from byte "
                                      f"{offset} on, where the file now ends")
                offset, out = offset + count, out[count:]
        self._seen.check(tensor)


@dataclass(frozen=True, eq=False)
class Mapped:
    """A tensor stored as plain numbers; `read()` is a read-only view of the mapped file, with no copy."""

    file: File
    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return self.file.view(self.name, self.offset, self.shape, self.dtype)

    def read_into(self, out: memoryview) -> None:
        """All bytes, in one call where the system takes so many."""
        self.file.read(self.name, [(self.offset, out)])

    def rows(self, start: int, stop: int, columns: slice = ALL) -> np.ndarray:
        row, inner = self.nbytes // self.shape[0], self.shape[1:]
        if columns == ALL:
            out = np.empty((max(min(stop, self.shape[0]) - start, 0), *inner), self.dtype)
            self.file.read(self.name, [(self.offset + start * row, _bytes(out))])
            return out
        first, last, _ = columns.indices(inner[0])
        out = np.empty((stop - start, last - first, *inner[1:]), self.dtype)
        skipped = first * (row // inner[0])
        self.file.read(self.name, ((self.offset + i * row + skipped, _bytes(part))
                                   for i, part in zip(range(start, stop), out, strict=True)))
        return out


def as_matrix(tensor: Tensor) -> Tensor:
    """A tensor of three axes, if it is plain numbers, as one matrix: any rows and columns of its matrices can then be
    read alone."""
    if not isinstance(tensor, Mapped) or len(tensor.shape) != 3:
        return tensor
    return replace(tensor, shape=(tensor.shape[0] * tensor.shape[1], tensor.shape[2]))


def _bytes(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def representable(shape: tuple[int, ...]) -> bool:
    """Whether numpy can hold an array of this shape, whose zero dimensions do not excuse the others."""
    return len(shape) <= 32 and math.prod(size or 1 for size in shape) < 2**59


def parse_json(text: bytes, path: Path, **options: Any) -> dict:
    """The JSON object in `text`. Raises CorruptFile that names `path`, the line and the column."""
    try:
        value = json.loads(text.decode(), **options)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise CorruptFile(f"{path}: not JSON at {place}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptFile(f"{path}: holds a JSON {type(value).__name__} where an object belongs")
    return value


def read_json(path: Path) -> dict:
    """The JSON object in the file at `path`. Raises CorruptFile."""
    return parse_json(path.read_bytes(), path)
