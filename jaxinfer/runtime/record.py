"""A tree of arrays as one run of bytes: written array by array, read at once, seen again as arrays without a copy."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.alignment import ALIGNMENT
from jaxinfer.errors import CorruptFile, OutOfMemory
from jaxinfer.home import cache_dir

BLOCK = 4096  # bytes: records begin at multiples of it in the file, as the disk's own blocks do
CHUNK = 2**23  # bytes of one read
READERS = 4  # reads at once


class Part(NamedTuple):
    """One array's place in a record."""

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, buffer: np.ndarray) -> np.ndarray:
        return buffer[self.offset: self.offset + self.nbytes].view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class Record:
    """Where each array of a tree lies in `size` bytes: one after another, each at a multiple of 64.

    >>> record = Record.of({"up": jax.ShapeDtypeStruct((2, 3), "float32"), "norm": jax.ShapeDtypeStruct((3,), "int8")})
    >>> [part.offset for part in record.parts], record.size
    ([0, 64], 128)
    """

    parts: tuple[Part, ...]
    tree: Any
    size: int

    @classmethod
    def of(cls, shapes: Any) -> Record:
        leaves, tree = jax.tree.flatten(shapes)
        parts, end = [], 0
        for leaf in leaves:
            parts.append(Part(end, tuple(leaf.shape), np.dtype(leaf.dtype)))
            end += -(-parts[-1].nbytes // ALIGNMENT) * ALIGNMENT
        return cls(tuple(parts), tree, end)

    @property
    def blocks(self) -> int:
        """Bytes that it takes in a file."""
        return -(-self.size // BLOCK) * BLOCK

    def views(self, buffer: np.ndarray) -> Any:
        """The tree of arrays that a buffer holds."""
        return jax.tree.unflatten(self.tree, [part.view(buffer) for part in self.parts])


class Spill:
    """Records in a file of our own, in the directory of our caches: of layers that stream, or of `what` else, of which
    there are `counts` of each kind. The file has no name: however this process ends, the disk gets its room back.

    Raises OutOfMemory where the disk has no room, before anything is written or when it is.
    """

    def __init__(self, records: Mapping[Any, Record], what: str = "streamed weights", instead: str = "host_memory",
                 counts: Mapping[Any, int] | None = None):
        self.records, self.what, self.instead = records, what, instead
        self._starts: dict[Hashable, int] = {}
        self.nbytes = 0
        for i, record in records.items():
            self._starts[i] = self.nbytes
            self.nbytes += record.blocks * (counts[i] if counts else 1)
        self.directory = cache_dir()
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.nbytes > shutil.disk_usage(self.directory).free:
            raise self._full()
        self.file = tempfile.TemporaryFile(dir=self.directory)  # noqa: SIM115  # until `close`
        os.ftruncate(self.file.fileno(), self.nbytes)
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="jaxinfer-read")

    def write(self, i: Hashable, n: int, array: np.ndarray, nth: int = 0) -> None:
        """Put the n-th array of record i, or the `nth` of its kind, into its place."""
        at = self._starts[i] + nth * self.records[i].blocks + self.records[i].parts[n].offset
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        try:
            while data:
                count = os.pwrite(self.file.fileno(), data, at)
                data, at = data[count:], at + count
        except OSError as error:
            raise (self._full() if error.errno == errno.ENOSPC else error) from error

    def read(self, i: Hashable, buffer: np.ndarray, nth: int = 0) -> None:
        """Fill a buffer with record i, or the `nth` of its kind. Raises CorruptFile if the file has become shorter."""
        size, at = self.records[i].size, self._starts[i] + nth * self.records[i].blocks
        list(self._pool.map(partial(self._fill, i, at, memoryview(buffer)[:size]), range(0, size, CHUNK)))

    def _fill(self, i: Hashable, at: int, data: memoryview, start: int) -> None:
        stop = min(start + CHUNK, len(data))
        while start < stop:
            count = os.preadv(self.file.fileno(), [data[start:stop]], at + start)
            if not count:
                raise CorruptFile(f"the file of {self.what} in {self.directory} ends within record {i}")
            start += count

    def _full(self) -> OutOfMemory:
        free = shutil.disk_usage(self.directory).free
        return OutOfMemory(f"{self.nbytes:,} bytes of {self.what} are to lie in {self.directory}, where {free:,} are "
                           f"free; give {self.instead}, or $JAXINFER_CACHE a directory on a larger disk")

    def close(self) -> None:
        self._pool.shutdown()
        self.file.close()
