"""Safetensors files whose tensors lie at multiples of 64: the CPU's `device_put` takes them over where they are mapped.

They are valid safetensors, whose data may have no gaps: a tensor after one of an odd size is put in its place by a
tensor of zeros, which has a name that begins with `PADDING`. The header is filled up with spaces.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxinfer.alignment import ALIGNMENT
from jaxinfer.errors import CorruptFile
from jaxinfer.events import Progress, emit
from jaxinfer.frontend.files import Tensor, parse_json
from jaxinfer.frontend.safetensors import DTYPES
from jaxinfer.frontend.saved import KEY, Saved, read_told
from jaxinfer.frontend.unread import Unread

PADDING = "padding of jaxinfer "
NAMES = {dtype: name for name, dtype in DTYPES.items()}
BLOCK = 1 << 24  # bytes written at a time


def write_aligned(path: Path, arrays: Mapping[str, Any], saved: Saved, what: str) -> None:
    """Write arrays, read or unread, one after another, some rows of an unread one at a time. `saved` and the SHA-256
    of each go into the metadata. Emits Progress("save", what, bytes, bytes). Raises OSError."""
    told = lambda sums: {KEY: json.dumps(replace(saved, sha256=sums).told())}
    write(path, arrays, told, what, ALIGNMENT)


def write(path: Path, arrays: Mapping[str, Any], told: Callable[[Mapping[str, str]], Mapping[str, str]], what: str,
          alignment: int = 1) -> None:
    """The same, at multiples of `alignment`. `told` makes the metadata of the arrays' checksums, always as long."""
    header, total = _layout(arrays, alignment)
    sums = dict.fromkeys(arrays, "0" * 64)
    room = len(_packed(header, told(sums)))
    with path.open("xb") as file:
        file.seek(room)
        done = 0
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            if name.startswith(PADDING):
                file.write(bytes(end - begin))
                continue
            digest = hashlib.sha256()
            for block in _blocks(arrays[name]):
                digest.update(block)
                file.write(block)
                done += len(block)
                emit(Progress("save", what, done, total))
            sums[name] = digest.hexdigest()
        file.seek(0)
        file.write(_packed(header, told(sums)))


def read_saved(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path
               ) -> tuple[Mapping[str, Tensor], Saved | None]:
    """The tensors of a file less their padding, and how we saved them; None if it is not ours. Raises CorruptFile."""
    if KEY not in metadata:
        return tensors, None
    saved = read_told(parse_json(metadata[KEY].encode(), path), str(path))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(PADDING)}, saved


def verify(tensors: Mapping[str, Tensor], saved: Saved, source: str) -> None:
    """Read all tensors and compare their checksums. Emits Progress("verify", source, bytes, bytes). Raises CorruptFile
    that names those that differ."""
    wrong, done, total = [], 0, sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        digest = hashlib.sha256()
        for block in _blocks(Unread(tensor.shape, tensor.dtype, (tensor,))):
            digest.update(block)
            done += len(block)
            emit(Progress("verify", source, done, total))
        if digest.hexdigest() != saved.sha256.get(name):
            wrong.append(name)
    if wrong:
        raise CorruptFile(f"{source}: {len(wrong)} of {len(tensors)} tensors have other bytes than their checksums say:"
                          f" {', '.join(wrong[:8])}")


def _layout(arrays: Mapping[str, Any], alignment: int) -> tuple[dict[str, Any], int]:
    """The header's entries in the order of the data, and the bytes of the arrays."""
    header: dict[str, Any] = {}
    end = total = 0
    for name, array in arrays.items():
        if gap := -end % alignment:
            header[f"{PADDING}{len(header)}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
        start, size = end + gap, math.prod(array.shape) * array.dtype.itemsize
        end, total = start + size, total + size
        dtype = NAMES[np.dtype(array.dtype)]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
    return header, total


def _packed(header: Mapping[str, Any], told: Mapping[str, str]) -> bytes:
    text = json.dumps({"__metadata__": told, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _blocks(array: Any) -> Iterator[memoryview]:
    """The bytes of an array, in order."""
    if isinstance(array, Unread) and array.in_rows:
        step = max(1, BLOCK // max(1, math.prod(array.shape[1:]) * array.dtype.itemsize))
        pieces = (array[start : start + step] for start in range(0, array.shape[0], step))
    else:
        pieces = iter([array if isinstance(array, jax.Array) else array[...]])
    for piece in pieces:
        yield memoryview(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))
