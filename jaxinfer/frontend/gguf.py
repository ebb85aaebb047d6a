"""The GGUF container, versions 2 and 3: typed metadata, tensor infos, then aligned tensor data.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is mapped; metadata is decoded
when it is opened, weights when they are read. What it all means for a model is `gguf_translate`'s business.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.frontend.dequantize import FORMATS, BlockFormat, dequantize
from jaxinfer.frontend.files import Mapped, MappedFile, Tensor, map_file, representable

MAGIC = b"GGUF"
TYPES = {  # numbers 4, 5 and the gaps belong to formats that ggml has removed
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K",
    11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32",
    27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
PLAIN = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9  # value types
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}  # to struct


@dataclass(frozen=True, eq=False)
class Quantised:
    """A tensor in blocks of `format`; `read()` returns a new float32 array."""

    buffer: MappedFile
    offset: int
    shape: tuple[int, ...]
    format: BlockFormat

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) // self.format.weights * self.format.record.itemsize

    def read(self) -> np.ndarray:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> np.ndarray:
        row, count = self.nbytes // self.shape[0], min(stop, self.shape[0]) - start
        data = np.ndarray((count * row,), np.uint8, buffer=self.buffer, offset=self.offset + start * row)
        return dequantize(data, self.format).reshape(count, *self.shape[1:])


def unstack(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor of this file stacks along its first axis, none of them read."""
    assert isinstance(tensor, Mapped | Quantised)
    size, shape = tensor.nbytes // tensor.shape[0], tensor.shape[1:]
    return [replace(tensor, offset=tensor.offset + i * size, shape=shape) for i in range(tensor.shape[0])]


def open_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata as plain Python values, and the tensors by their GGUF names, none of them read.

    Raises CorruptFile if the file ends early or contradicts itself, UnsupportedModel if it has a version or a
    tensor type that we do not read.
    """
    cursor = _Cursor(map_file(path), path)
    if (magic := cursor.take(4, "the magic")) != MAGIC:
        raise CorruptFile(f"{path}: starts with {magic!r} where {MAGIC!r} belongs: not a GGUF file")
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        order = " (a big-endian file?)" if version >= 1 << 16 else ""
        raise UnsupportedModel(f"{path}: GGUF version {version}{order} is not one of 2 and 3")
    tensor_count, key_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the key count")
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise CorruptFile(f"{path}: metadata names {key!r} twice")
        metadata[key] = cursor.value(cursor.number("I", key), key)
    return metadata, _tensors(cursor, tensor_count, metadata)


def _tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, Tensor]:
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.string("a tensor's name")
        if name in infos:
            raise CorruptFile(f"{cursor.path}: two tensors are named {name!r}")
        dimensions = cursor.number("I", name)
        if dimensions > 4:
            raise CorruptFile(f"{cursor.path}: tensor {name!r} has {dimensions} dimensions, GGUF allows 4")
        shape = tuple(cursor.number("Q", name) for _ in range(dimensions))[::-1]
        infos[name] = shape, cursor.number("I", name), cursor.number("Q", name)

    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise CorruptFile(f"{cursor.path}: general.alignment is {alignment!r:.40}, which is no power of two")
    start = -(-cursor.position // alignment) * alignment
    tensors = {name: _tensor(cursor, start, alignment, name, *info) for name, info in infos.items()}
    end, before = start, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset < end:
            raise CorruptFile(f"{cursor.path}: tensors {before!r} and {name!r} overlap")
        end, before = tensor.offset + tensor.nbytes, name
    return dict(tensors)


def _tensor(
    cursor: _Cursor, start: int, alignment: int, name: str, shape: tuple[int, ...], type_id: int, offset: int
) -> Mapped | Quantised:
    where, kind = f"{cursor.path}: tensor {name!r}", TYPES.get(type_id, f"number {type_id}")
    if kind not in PLAIN and kind not in FORMATS:
        known = ", ".join([*PLAIN, *FORMATS])
        raise UnsupportedModel(f"{where} is of type {kind}, which is not one of {known}; nothing was loaded")
    if 0 in shape or not representable(shape):
        raise CorruptFile(f"{where} has shape {shape}, which no weight has")
    if offset % alignment:
        raise CorruptFile(f"{where} starts at {offset}, which is no multiple of the alignment {alignment}")
    if kind in PLAIN:
        tensor = Mapped(cursor.buffer, start + offset, shape, PLAIN[kind])
    else:
        if not shape or shape[-1] % FORMATS[kind].weights:
            block = FORMATS[kind].weights
            raise CorruptFile(f"{where} has shape {shape}, whose rows are not whole {kind} blocks of {block}")
        tensor = Quantised(cursor.buffer, start + offset, shape, FORMATS[kind])
    if (end := start + offset + tensor.nbytes) > len(cursor.buffer):
        raise CorruptFile(f"{where} ends at byte {end}, the file at {len(cursor.buffer)}: was it cut short?")
    return tensor


class _Cursor:
    """Reads little-endian values one after another, and never more than the file holds."""

    def __init__(self, buffer: MappedFile, path: Path):
        self.buffer, self.path, self.position = buffer, path, 0

    def take(self, count: int, what: str) -> bytes:
        if count > len(self.buffer) - self.position:
            raise CorruptFile(f"{self.path}: ends early: {what} needs {count} bytes at {self.position}, "
                              f"the file ends at {len(self.buffer)}")
        self.position += count
        return self.buffer[self.position - count : self.position]

    def number(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str) -> str:
        return self._text(self.take(self.number("Q", what), what), what)

    def value(self, type_id: int, key: str) -> Any:
        if type_id == STRING:
            return self.string(key)
        if type_id == ARRAY:
            return self._array(key)
        if type_id == BOOL:
            return self._booleans(self.take(1, key), key)[0]
        return self.number(self._code(type_id, key), key)

    def _array(self, key: str) -> list:
        type_id, count = self.number("I", key), self.number("Q", key)
        if type_id == STRING:
            return self._strings(count, key)
        if type_id == BOOL:
            return self._booleans(self.take(count, key), key)
        code = self._code(type_id, key)
        return np.frombuffer(self.take(count * struct.calcsize("<" + code), key), "<" + code).tolist()

    def _strings(self, count: int, key: str) -> list[str]:
        """As `string`, unrolled: a vocabulary has up to 262,144 of them and its merges as many again."""
        buffer, position, size = self.buffer, self.position, len(self.buffer)
        unpack, texts = struct.Struct("<Q").unpack_from, list[str]()
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(buffer, position)[0]
                if position > size:
                    break
                texts.append(buffer[start:position].decode())
        except struct.error:
            position = size + 1
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{self.path}: {key}[{len(texts)}] is not UTF-8: {error}") from error
        if position > size:
            raise CorruptFile(f"{self.path}: ends early: {key} has {len(texts)} of its {count} strings")
        self.position = position
        return texts

    def _booleans(self, data: bytes, key: str) -> list[bool]:
        if not set(data) <= {0, 1}:
            raise CorruptFile(f"{self.path}: {key} holds a boolean that is neither 0 nor 1")
        return list(map(bool, data))

    def _code(self, type_id: int, key: str) -> str:
        if type_id not in NUMBERS:  # arrays of arrays too: no writer makes them
            raise CorruptFile(f"{self.path}: {key} has the unknown value type {type_id}")
        return NUMBERS[type_id]

    def _text(self, data: bytes, what: str) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise CorruptFile(f"{self.path}: {what} is not UTF-8: {error}") from error
