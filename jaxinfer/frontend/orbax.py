"""Orbax checkpoints: arrays are read as they are cut, by TensorStore, in which Orbax keeps them; Orbax itself saves.

To ask Orbax for one array of a checkpoint takes it 0.1 to 0.2 s, since it reads the description of all; a weight by
itself, and the rows and columns of it that a device needs, take TensorStore less than a millisecond more than their
bytes. What is relied on is Orbax's own description of a tree, `_METADATA`, in the four layouts that it writes (Zarr 2
or 3, in one OCDBT database or in folders).
"""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.files import ALL, Seen, Tensor, read_json
from jaxinfer.frontend.saved import KEY, Saved, read_told

TREE, CHECKPOINT, DATABASE = "_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"
CACHE = 1 << 26  # bytes of the database's own nodes that are kept
CHUNK = 1 << 22  # bytes that are stored together: what is read of a weight for a row of it
AT_ONCE = 1 << 28  # bytes on their way to the disk


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor in a TensorStore; `together` rows of it are stored in one piece."""

    store: Any
    seen: Seen
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    together: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        return self._read(self.store)

    def rows(self, start: int, stop: int, columns: slice = ALL) -> np.ndarray:
        rows = self.store[start : min(stop, self.shape[0])]
        return self._read(rows if columns == ALL else rows[:, columns])

    def _read(self, part: Any) -> np.ndarray:
        self.seen.check(self.name)
        try:
            return np.asarray(part.read().result())
        except ValueError as error:
            raise CorruptFile(f"{self.seen.path.parent}: tensor {self.name!r} cannot be read: {error}") from error


def find_orbax(directory: Path) -> Path | None:
    """The folder of the one tree of arrays in or under a directory; None if there is none.

    Raises UnsupportedModel if there are several: the steps of a training run, say.
    """
    for pattern in (TREE, f"*/{TREE}", f"*/*/{TREE}"):
        found = sorted(file.parent for file in directory.glob(pattern))
        if len(found) > 1:
            raise UnsupportedModel(f"{directory}: holds {len(found)} trees of arrays, {', '.join(map(str, found[:4]))}"
                                   f"{', ...' if len(found) > 4 else ''}; give the folder of one")
        if found:
            return found[0]
    return None


def open_orbax(tree: Path) -> tuple[Mapping[str, Tensor], Saved | None]:
    """The arrays of a tree by their paths ("params.dense.kernel"), none of them read; and how we saved them, if we did.

    Raises CorruptFile for what is missing or contradicts itself.
    """
    import tensorstore

    told = read_json(tree / TREE)
    try:
        named = {".".join(str(key["key"]) for key in entry["key_metadata"]): entry["value_metadata"]
                 for entry in told["tree_metadata"].values()}
        names = [name for name, value in named.items()
                 if not value.get("skip_deserialize") and value.get("value_type") != "string"]
    except (AttributeError, KeyError, TypeError) as error:
        raise CorruptFile(f"{tree / TREE}: is no description of a tree of arrays: {error!r}") from error
    database = tree / DATABASE
    seen = Seen(database if database.is_file() else tree / TREE)
    files = lambda path: {"driver": "file", "path": str(path.absolute())}
    kept = lambda name: (dict(driver="ocdbt", base=files(tree), path=f"{name}/") if database.is_file()
                         else files(tree / name))
    # Where even zeros are written, what is not there is lost.
    how = dict(driver="zarr3" if told.get("use_zarr3") else "zarr",
               fill_missing_data_reads=not told.get("store_array_data_equal_to_fill_value", False))
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": CACHE}})
    opening = {name: tensorstore.open({**how, "kvstore": kept(name)}, open=True, read=True, context=context)
               for name in names}
    tensors: dict[str, Tensor] = {}
    for name, future in opening.items():
        try:
            store = future.result()
        except ValueError as error:
            raise CorruptFile(f"{tree}: tensor {name!r} cannot be opened: {error}") from error
        chunk = store.chunk_layout.read_chunk.shape or store.shape
        tensors[name] = Stored(store, seen, name, tuple(store.shape), np.dtype(store.dtype.numpy_dtype),
                               (chunk[0] or 1) if chunk else 1)
    return tensors, _saved(tree)


def _saved(tree: Path) -> Saved | None:
    """What we noted of a checkpoint that we saved."""
    note = next((place / CHECKPOINT for place in (tree, tree.parent) if (place / CHECKPOINT).is_file()), None)
    noted = (read_json(note).get("custom_metadata") if note else None) or {}
    return read_told(noted[KEY], str(note)) if KEY in noted else None


def write_orbax(directory: Path, arrays: Any, saved: Saved) -> None:
    """Save a pytree of `jax.Array`s. Raises OSError."""
    import orbax.checkpoint.experimental.v1 as ocp

    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink (7 % in float32), and take twice the time
    context.array.saving.storage_options.chunk_byte_size = CHUNK
    context.array.saving.storage_options.shard_axes = (0,)  # rows stay whole
    context.memory.write_concurrent_bytes = AT_ONCE
    try:
        with context:
            ocp.save(str(directory.absolute()), arrays, custom_metadata={KEY: saved.told()})
    except ValueError as error:  # TensorStore's, in which the system's error is but text
        code = re.search(r"os_error_code='(\d+)'", str(error))
        raise OSError(int(code[1]) if code else errno.EIO, str(error)) from error
