"""Safetensors promises: what its own package reads we read alike, what it refuses we refuse, and nothing early."""

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from jaxinfer.errors import CorruptFile, JaxinferError, ModelNotFound, UnsupportedModel
from jaxinfer.frontend.safetensors import DTYPES, open_safetensors, open_safetensors_directory

names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__")
numpy_dtypes = st.sampled_from([dtype for name, dtype in DTYPES.items() if name != "BF16" and name[:2] != "F8"])
arrays = numpy_dtypes.flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=5)))


@contextmanager
def holding(data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        yield path


def packed(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list, start: int, end: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


TWO = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}
TWO_FILE = packed({"__metadata__": {"format": "pt"}, **TWO}, bytes(range(32)))


@given(st.dictionaries(names, arrays, max_size=5))
def test_what_the_package_saves_is_read_back_bit_for_bit(tensors):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        opened = open_safetensors(path)
        assert opened.keys() == tensors.keys()
        for name, array in tensors.items():
            read = opened[name].read()
            assert (opened[name].shape, opened[name].dtype, opened[name].nbytes) == (
                array.shape, array.dtype, array.nbytes)
            assert (read.shape, read.dtype, read.tobytes()) == (array.shape, array.dtype, array.tobytes())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_has_the_bytes_that_the_package_sees(dtype):
    width = DTYPES[dtype].itemsize
    data = packed({"x": entry(dtype, [3, 2], 0, 6 * width)}, bytes(range(6 * width)))
    [(name, expected)] = deserialize(data)
    with holding(data) as path:
        tensor = open_safetensors(path)[name]
        assert tensor.shape == tuple(expected["shape"]) and expected["dtype"] == dtype
        assert tensor.read().tobytes() == bytes(expected["data"])


def test_narrow_floats_have_the_values_that_their_names_promise():
    shapes = {"BF16": (b"\x80\x3f", 1.0), "F8_E4M3": (b"\x38", 1.0), "F8_E5M2": (b"\x3c", 1.0)}
    for dtype, (data, value) in shapes.items():
        with holding(packed({"x": entry(dtype, [], 0, len(data))}, data)) as path:
            assert float(open_safetensors(path)["x"].read()) == value


def test_reading_copies_nothing_and_cannot_change_the_file(tmp_path):
    save_file({"x": np.arange(6, dtype=np.float32)}, tmp_path / "m")
    tensor = open_safetensors(tmp_path / "m")["x"]
    first, second = tensor.read(), tensor.read()
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1


@given(st.integers(0, len(TWO_FILE) - 1))
def test_a_file_cut_short_anywhere_is_corrupt(length):
    with holding(TWO_FILE[:length]) as path, pytest.raises(CorruptFile, match=r"model\.safetensors"):
        open_safetensors(path)


@given(st.lists(st.tuples(st.integers(0, len(TWO_FILE) - 33), st.integers(0, 255)), min_size=1, max_size=3))
@example([(0, 255)])
def test_of_a_damaged_header_we_accept_only_what_the_package_accepts_too(damage):
    data = bytearray(TWO_FILE)
    for place, byte in damage:
        data[place] = byte
    with holding(bytes(data)) as path:
        try:
            opened = {name: tensor.read() for name, tensor in open_safetensors(path).items()}
        except JaxinferError as error:
            assert str(path) in str(error)
            return
        expected = dict(deserialize(bytes(data)))
        assert {name: array.tobytes() for name, array in opened.items()} == {
            name: bytes(view["data"]) for name, view in expected.items()}


REFUSED = {
    "the header's length": (b"\xff" * 8 + b"{}", "ends early"),
    "no header at all": (b"\x02\x00", "ends early"),
    "an empty file": (b"", "empty"),
    "something else": (packed(b"PK..."), "is it a safetensors file"),
    "broken JSON": (packed(b'{"a": {"dtype"\n  "F32"}}'), "line 2, column 3"),
    "deep JSON": (packed(b'{"a":' * 100_000), "not JSON"),
    "not UTF-8": (packed(b'{"\xff": 1}'), "not JSON"),
    "a tensor named twice": (packed(b'{"a": 1, "a": 2}'), "'a' twice"),
    "metadata that is no text": (packed({"__metadata__": {"x": 1}}), "__metadata__"),
    "an entry without offsets": (packed({"a": {"dtype": "F32", "shape": [1]}}), "'a'.*exactly dtype, shape"),
    "an entry that is no object": (packed({"a": [1]}), "'a'.*exactly"),
    "a negative size": (packed({"a": entry("F32", [-1], 0, 4)}, bytes(4)), "'a'.*shape"),
    "a boolean size": (packed({"a": entry("F32", [True], 0, 4)}, bytes(4)), "'a'.*shape"),
    "an absurd size": (packed({"a": entry("F32", [2**62, 2**62, 0], 0, 0)}), "'a'.*shape"),
    "offsets past the end": (packed({"a": entry("F32", [2], 0, 8)}, bytes(4)), "'a'.*data_offsets"),
    "offsets backwards": (packed({"a": entry("F32", [1], 4, 0)}, bytes(4)), "'a'.*data_offsets"),
    "three offsets": (packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, bytes(4)), "'a'"),
    "a shape of another size": (packed({"a": entry("F32", [2], 0, 4)}, bytes(4)), "'a'.*takes 8 bytes.*give it 4"),
    "an overlap": (packed({"a": entry("I8", [4], 0, 4), "b": entry("I8", [4], 2, 6)}, bytes(6)), "'b' overlaps"),
    "a gap": (packed({"a": entry("I8", [2], 0, 2), "b": entry("I8", [2], 4, 6)}, bytes(6)), "'b' leaves a gap"),
    "bytes left over": (packed({"a": entry("I8", [2], 0, 2)}, bytes(3)), "belong to no tensor"),
    "a dtype that is no string": (packed({"a": entry(["F32"], [1], 0, 4)}, bytes(4)), "'a'.*not a string"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_corrupt_file_is_refused_with_its_reason(what):
    data, reason = REFUSED[what]
    with pytest.raises((SafetensorError, TypeError)):
        deserialize(data)
    with holding(data) as path, pytest.raises(CorruptFile, match=reason) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)


def test_a_dtype_that_we_do_not_know_is_unsupported_and_named():
    data = packed({"scales": entry("F8_E8M0", [4], 0, 4)}, bytes(4))
    with holding(data) as path, pytest.raises(UnsupportedModel, match=r"'scales'.*'F8_E8M0'.*BF16"):
        open_safetensors(path)


# Shards.


def sharded(folder: Path, weight_map: dict | None = None) -> Path:
    save_file({"a": np.float32([1])}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": np.float32([2]), "c": np.float32([3])}, folder / "model-00002-of-00002.safetensors")
    default = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {}, "weight_map": default if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_mapping_that_hides_no_tensor(tmp_path):
    tensors = open_safetensors_directory(sharded(tmp_path))
    assert {name: float(tensor.read()[0]) for name, tensor in tensors.items()} == {"a": 1, "b": 2, "c": 3}


def test_the_index_decides_which_shard_a_tensor_comes_from(tmp_path):
    sharded(tmp_path)
    save_file({"a": np.float32([1]), "b": np.float32([9])}, tmp_path / "model-00001-of-00002.safetensors")
    assert float(open_safetensors_directory(tmp_path)["b"].read()[0]) == 2


def test_a_missing_shard_is_named(tmp_path):
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"1 of the 2 shards.*model-00002-of-00002\.safetensors"):
        open_safetensors_directory(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    with pytest.raises(CorruptFile, match=r"'d' in model-00001-of-00002\.safetensors"):
        open_safetensors_directory(sharded(tmp_path, {"d": "model-00001-of-00002.safetensors"}))


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "..", ""])
def test_an_index_cannot_point_out_of_its_directory(tmp_path, file):
    with pytest.raises(CorruptFile, match="beside the index"):
        open_safetensors_directory(sharded(tmp_path, {"a": file}))


@pytest.mark.parametrize("text", ['{"weight_map": {"a": 1}}', '{"weight_map": []}', "{}"])
def test_an_index_without_a_weight_map_is_corrupt(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFile, match="weight_map"):
        open_safetensors_directory(tmp_path)


def test_a_directory_without_weights_says_what_would_be_right(tmp_path):
    with pytest.raises(ModelNotFound, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_safetensors_directory(tmp_path)
