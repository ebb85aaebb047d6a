"""Tensors of an ONNX file: in the file itself, or mapped from a data file beside it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from jaxinfer.errors import CorruptFile, ModelNotFound
from jaxinfer.frontend.files import representable


def element_type(number: int) -> np.dtype:
    """The numpy dtype of an ONNX element type; strings are objects."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))


def read_tensor(proto: onnx.TensorProto, path: Path) -> np.ndarray:
    """The tensor as an array: mapped read-only where it is stored outside of the file. Raises CorruptFile."""
    shape = tuple(proto.dims)
    if any(size < 0 for size in shape) or not representable(shape):
        raise CorruptFile(f"{path}: tensor {proto.name!r} has shape {shape}, which no array has")
    try:
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            return _mapped(proto, shape, path)
        return numpy_helper.to_array(proto)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, CorruptFile):
            raise
        raise CorruptFile(f"{path}: tensor {proto.name!r} of shape {shape} cannot be read: {error}") from error


def read_sparse(proto: onnx.SparseTensorProto, path: Path) -> np.ndarray:
    """A sparse tensor, as a dense array; indices are flat [n] or by axis [n, rank]."""
    shape = tuple(proto.dims)
    if not representable(shape):
        raise CorruptFile(f"{path}: sparse tensor {proto.values.name!r} has shape {shape}, which no array has")
    values, indices = read_tensor(proto.values, path), read_tensor(proto.indices, path)
    dense = np.zeros(shape, values.dtype)
    try:
        dense[tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, shape)] = values
    except (ValueError, IndexError) as error:
        raise CorruptFile(f"{path}: sparse tensor {proto.values.name!r}: {error}") from error
    return dense


def _mapped(proto: onnx.TensorProto, shape: tuple[int, ...], path: Path) -> np.ndarray:
    where, entries = f"{path}: tensor {proto.name!r}", {entry.key: entry.value for entry in proto.external_data}
    dtype, file = element_type(proto.data_type), _beside(path, entries.get("location", ""), where)
    bits = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}.get(dtype.name, dtype.itemsize * 8)
    needed = -(-math.prod(shape) * bits // 8)
    offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    if length != needed:
        raise CorruptFile(f"{where} of shape {shape} and type {dtype} takes {needed} bytes, its entry says {length}")
    if offset < 0 or offset + needed > file.stat().st_size:
        raise CorruptFile(f"{where} lies at bytes {offset} to {offset + needed}, {file.name} ends at "
                          f"{file.stat().st_size}: was it cut short?")
    if not needed:
        return np.zeros(shape, dtype)
    raw = np.memmap(file, np.uint8, "r", offset, (needed,))
    return raw.view(dtype).reshape(shape) if bits >= 8 else _unpacked(proto, raw)


def _beside(path: Path, location: str, where: str) -> Path:
    """The data file, which may not lie outside of the model's folder."""
    file = (path.parent / location).resolve()
    if not location or not file.is_relative_to(path.parent.resolve()):
        raise CorruptFile(f"{where} is stored at {location!r}, which is not a path inside the model's folder")
    if not file.is_file():
        raise ModelNotFound(f"{where} is stored in {location}, which is not beside the model")
    return file


def _unpacked(proto: onnx.TensorProto, raw: np.ndarray) -> np.ndarray:
    """Elements of less than a byte are read now: numpy has no view of them."""
    copy = onnx.TensorProto(dims=proto.dims, data_type=proto.data_type, name=proto.name, raw_data=raw.tobytes())
    return numpy_helper.to_array(copy)
