"""How bytes from outside come in: files are mapped, tensors are views of them, bad JSON names its place."""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxinfer.errors import CorruptFile


class Tensor(Protocol):
    """A weight that stays on disk until it is read.

    `shape` is in numpy's order (outermost first), `dtype` is that of what `read()` returns, `nbytes` counts
    the bytes on disk. `read()` may be called from several threads at once. `rows(start, stop)` is a part of what
    `read()` returns, for which the rest need not be unpacked.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def read(self) -> np.ndarray: ...
    def rows(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class Mapped:
    """A tensor stored as plain numbers; `read()` is a read-only view of the mapped file, with no copy."""

    buffer: mmap.mmap
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype, buffer=self.buffer, offset=self.offset)

    def rows(self, start: int, stop: int) -> np.ndarray:
        return self.read()[start:stop]


def forget(tensor: Tensor) -> None:
    """Give back the pages of a mapped file that reading this tensor has brought into the process. They come again when
    somebody looks at them."""
    stored: Any = getattr(tensor, "stored", tensor)
    if isinstance(getattr(stored, "buffer", None), mmap.mmap):
        start = stored.offset // mmap.PAGESIZE * mmap.PAGESIZE
        stored.buffer.madvise(mmap.MADV_DONTNEED, start, stored.offset + stored.nbytes - start)


def map_file(path: Path) -> mmap.mmap:
    """Map `path` read-only; no byte is read. Raises CorruptFile if the file is empty."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise CorruptFile(f"{path}: the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


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
