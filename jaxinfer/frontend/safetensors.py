"""The safetensors format: eight bytes of header length, a JSON header, then the tensors' bytes without a gap.

Format: https://github.com/huggingface/safetensors#format. A file that contradicts itself is refused whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxinfer.errors import CorruptFile, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.files import Mapped, MappedFile, Tensor, map_file, parse_json, read_json, representable

DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"),
    "I8": np.dtype("i1"), "I16": np.dtype("<i2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn), "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}  # fmt: skip
LONGEST_HEADER = 100_000_000  # bytes; the safetensors package refuses more


def open_safetensors(path: Path) -> dict[str, Mapped]:
    """The tensors of one file by name, none of them read. Raises CorruptFile or UnsupportedModel."""
    buffer = map_file(path)
    header, start = _header(buffer, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile(f"{path}: __metadata__ must map strings to strings")
    tensors = {name: _tensor(buffer, start, name, entry, path) for name, entry in header.items()}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            problem = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise CorruptFile(f"{path}: tensor {name!r} {problem}: starts at {tensor.offset}, expected {end}")
        end += tensor.nbytes
    if end != len(buffer):
        kind = "ends early" if end > len(buffer) else "has bytes that belong to no tensor"
        raise CorruptFile(f"{path}: {kind}: the tensors end at byte {end}, the file at {len(buffer)}")
    return tensors


def open_safetensors_directory(directory: Path) -> Mapping[str, Tensor]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises ModelNotFound if there is neither or a shard is missing, CorruptFile if index and shards disagree.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return open_safetensors(single)
    if not index.is_file():
        raise ModelNotFound(f"{directory}: neither {single.name} nor {index.name} is there; "
                            "other weight formats can be converted with transformers' save_pretrained")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CorruptFile(f"{index}: 'weight_map' must map tensor names to file names")
    files = sorted(set(weight_map.values()))
    if strange := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
        raise CorruptFile(f"{index}: shards must be .safetensors files beside the index, not {strange!r:.200}")
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise ModelNotFound(f"{directory}: {len(missing)} of the {len(files)} shards that {index.name} names "
                            f"are missing: {', '.join(missing)}")
    shards = {file: open_safetensors(directory / file) for file in files}
    if absent := [f"{name!r} in {file}" for name, file in weight_map.items() if name not in shards[file]]:
        raise CorruptFile(f"{index}: {len(absent)} tensors are not in the shard that should hold them: "
                          + ", ".join(absent[:8]))
    unlisted = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    return unlisted | {name: shards[file][name] for name, file in weight_map.items()}


def _header(buffer: MappedFile, path: Path) -> tuple[dict, int]:
    """The parsed header and the offset of the first tensor's bytes."""
    length = int.from_bytes(buffer[:8], "little")
    if len(buffer) < 8 or length > len(buffer) - 8:
        raise CorruptFile(f"{path}: ends early: a header of {length} bytes in a file of {len(buffer)}")
    if length > LONGEST_HEADER:
        raise CorruptFile(f"{path}: a header of {length} bytes is longer than the format's {LONGEST_HEADER}")
    text = buffer[8 : 8 + length]
    if not text.startswith(b"{"):
        raise CorruptFile(f"{path}: the header starts with {text[:1]!r}, not '{{': is it a safetensors file?")
    return parse_json(text, path, object_pairs_hook=lambda pairs: _unique(pairs, path)), 8 + length


def _unique(pairs: list[tuple[str, object]], path: Path) -> dict:
    keys: dict = {}
    for key, value in pairs:
        if key in keys:
            raise CorruptFile(f"{path}: the header names {key!r} twice")
        keys[key] = value
    return keys


def _tensor(buffer: MappedFile, start: int, name: str, entry: object, path: Path) -> Mapped:
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CorruptFile(f"{where}: needs exactly dtype, shape and data_offsets, has {entry!r:.200}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not representable(tuple(shape)):
        raise CorruptFile(f"{where}: shape {shape!r:.200} is not a list of sizes that an array can have")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= len(buffer) - start:
        raise CorruptFile(f"{where}: data_offsets {offsets!r:.200} do not lie in the file's "
                          f"{len(buffer) - start} bytes of data")
    if not isinstance(entry["dtype"], str):
        raise CorruptFile(f"{where}: dtype {entry['dtype']!r:.200} is not a string")
    if (dtype := DTYPES.get(entry["dtype"])) is None:
        raise UnsupportedModel(f"{where}: dtype {entry['dtype']!r:.40} is not one of {', '.join(DTYPES)}")
    if (needed := math.prod(shape) * dtype.itemsize) != offsets[1] - offsets[0]:
        raise CorruptFile(f"{where}: shape {shape} of {entry['dtype']} takes {needed} bytes, "
                          f"data_offsets {offsets} give it {offsets[1] - offsets[0]}")
    return Mapped(buffer, start + offsets[0], tuple(shape), dtype)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
