"""The protocol's datatypes: numpy's for each, and tensors of them as JSON and as bytes (little-endian, row-major)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import InvalidRequest

BYTES = "BYTES"  # texts: their elements are bytes objects
DTYPES = {"BOOL": np.dtype(np.bool_), "FP16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16),
          "FP32": np.dtype(np.float32), "FP64": np.dtype(np.float64), BYTES: np.dtype(object)}
DTYPES |= {f"{kind.upper()}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MOST_AXES = 32
LENGTH = 4  # bytes in front of each text


def datatype_of(what: str, dtype: Any) -> str:
    """The protocol's name of a numpy dtype. Raises InvalidRequest if it has none."""
    if np.dtype(dtype) not in NAMES:
        raise InvalidRequest(f"{what} is {dtype}, for which the Open Inference Protocol has no datatype; it has "
                             f"{', '.join(sorted(DTYPES))}")
    return NAMES[np.dtype(dtype)]


def dtype_of(what: str, datatype: Any) -> np.dtype:
    if not isinstance(datatype, str) or datatype not in DTYPES:
        raise InvalidRequest(f"{what} has the datatype {short(datatype)}; it must be one of "
                             f"{', '.join(sorted(DTYPES))}")
    return DTYPES[datatype]


def count_of(what: str, shape: Any) -> int:
    """The elements of a tensor of this shape, which must be one."""
    right = isinstance(shape, list) and len(shape) <= MOST_AXES
    if not right or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise InvalidRequest(f"{what} has the shape {short(shape)}; it must be a list of at most {MOST_AXES} integers "
                             "from 0 on")
    return math.prod(shape)


def from_bytes(what: str, data: memoryview, datatype: Any, shape: list[int]) -> np.ndarray:
    """A tensor that lies in `data`, which it must fill: a view. Texts are copied out."""
    dtype, count = dtype_of(what, datatype), count_of(what, shape)
    if datatype == BYTES:
        return shaped(what, _texts(what, data, count), shape)
    if len(data) != count * dtype.itemsize:
        raise InvalidRequest(f"{what} has {len(data)} bytes of data; a tensor of {datatype}{list(shape)} has "
                             f"{count * dtype.itemsize}")
    if datatype == "BOOL" and (np.frombuffer(data, np.uint8) > 1).any():
        raise InvalidRequest(f"{what} is BOOL and has bytes that are neither 0 nor 1")
    return shaped(what, np.frombuffer(data, dtype), shape)


def from_json(what: str, data: Any, datatype: Any, shape: list[int]) -> np.ndarray:
    """A tensor from JSON: a list of lists of its shape, or one flat list of all elements, the last axis fastest."""
    dtype, count = dtype_of(what, datatype), count_of(what, shape)
    flat = _flat(what, data, shape)
    if len(flat) != count:
        raise InvalidRequest(f"{what} has {len(flat)} elements; its shape {list(shape)} says {count}")
    wanted = _kinds(dtype)
    if odd := sorted(kind.__name__ for kind in {*map(type, flat)} - wanted):
        raise InvalidRequest(f"{what} is {datatype} and has elements of the types {', '.join(odd)}; they must be "
                             f"{' or '.join(sorted(kind.__name__ for kind in wanted))}")
    if datatype == BYTES:
        return shaped(what, objects([text.encode("utf-8", "surrogatepass") for text in flat]), shape)
    try:
        with np.errstate(all="ignore"):
            array = np.array(flat, np.float64 if float in wanted else dtype)
            new = array.astype(dtype, copy=False)
    except OverflowError as error:
        raise InvalidRequest(f"{what} has a number that {datatype} cannot hold: {error}") from error
    if float in wanted and (np.isinf(new) & ~np.isinf(array)).any():
        raise InvalidRequest(f"{what} has a number that is too large for {datatype}")
    return shaped(what, new, shape)


def to_json(rows: Sequence[np.ndarray]) -> list[Any]:
    """The elements of a tensor in one flat list; of each row its own behind those of the one before."""
    plain = [row.astype(np.float32) if row.dtype == jnp.bfloat16 else row for row in rows]
    return list(chain.from_iterable(row.reshape(-1).tolist() for row in plain))


def to_buffer(array: np.ndarray) -> memoryview:
    """The bytes of a tensor, where they lie if they lie together."""
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def objects(texts: list[bytes]) -> np.ndarray:
    """Texts as an array; numpy would make one of letters."""
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def short(value: Any) -> str:
    """What somebody sent, to quote it."""
    said = repr(value)
    return said if len(said) <= 100 else f"{said[:100]}..."


def _kinds(dtype: np.dtype) -> set[type]:
    """What elements are in JSON."""
    return {"O": {str}, "b": {bool}, "i": {int}, "u": {int}}.get(dtype.kind, {int, float})


def _flat(what: str, data: Any, shape: list[int]) -> list[Any]:
    if not isinstance(data, list):
        raise InvalidRequest(f"{what} has the data {short(data)}; it must be a list")
    if not data or not isinstance(data[0], list):
        return data
    wanted = InvalidRequest(f"{what} has data that is neither flat nor nested as its shape {list(shape)} says")
    if not shape or len(data) != shape[0]:
        raise wanted
    for size in shape[1:]:
        if {*map(type, data)} - {list} or {*map(len, data)} - {size}:
            raise wanted
        data = list(chain.from_iterable(data))
    return data


def _texts(what: str, data: memoryview, count: int) -> np.ndarray:
    """`count` texts, each behind its length."""
    found, at = [], 0
    while at < len(data) and len(found) < count:
        start = at + LENGTH
        at = start + int.from_bytes(data[at:start], "little")
        if at > len(data):
            break
        found.append(bytes(data[start:at]))
    if at != len(data) or len(found) != count:
        raise InvalidRequest(f"{what} has {len(data)} bytes of data, which are not {count} texts with their lengths "
                             f"in front ({LENGTH} bytes each)")
    return objects(found)


def shaped(what: str, array: np.ndarray, shape: list[int]) -> np.ndarray:
    try:
        return array.reshape(shape)
    except ValueError as error:  # of no elements, and one axis that no array can have
        raise InvalidRequest(f"{what} has the shape {list(shape)}, which is too large: {error}") from error
