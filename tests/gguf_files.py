"""GGUF files written with the `gguf` package, for the tests of our reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

PYTHON_TYPES = {bool: GGUFValueType.BOOL, int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32,
                str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}


class Typed(NamedTuple):
    """A metadata value with its GGUF type, where Python's type does not say enough."""

    value: Any
    type: GGUFValueType


class Blocks(NamedTuple):
    """A tensor's raw bytes `[rows, bytes per row]`, of a block format."""

    data: np.ndarray
    kind: str


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray | Blocks], alignment: int | None = None
) -> Path:
    """Write the file; `metadata` must name `general.architecture`."""
    writer = GGUFWriter(path, metadata["general.architecture"])
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, value in metadata.items():
        if key != "general.architecture":
            typed = value if isinstance(value, Typed) else Typed(value, PYTHON_TYPES[type(value)])
            writer.add_key_value(key, *typed)
    for name, tensor in tensors.items():
        if isinstance(tensor, Blocks):
            writer.add_tensor(name, tensor.data, raw_dtype=GGMLQuantizationType[tensor.kind])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
