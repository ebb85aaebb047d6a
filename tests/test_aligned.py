"""Our own safetensors files: the safetensors package reads them, every tensor is aligned, damage is found and named."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file

from jaxinfer.errors import CorruptFile, UnsupportedModel
from jaxinfer.events import observe
from jaxinfer.frontend.aligned import PADDING, read_saved, verify, write_aligned
from jaxinfer.frontend.safetensors import DTYPES, open_with_metadata
from jaxinfer.frontend.saved import Saved, read_told

names = st.text("abc.0é\"", min_size=1, max_size=8)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)
arrays = st.tuples(st.sampled_from(list(DTYPES.values())), shapes, st.integers(0, 99)).map(
    lambda of: np.random.default_rng(of[2]).integers(0, 2, of[1]).astype(of[0]))


def opened(path: Path):
    return read_saved(*open_with_metadata(path), path)


@given(st.dictionaries(names, arrays, max_size=6), st.sampled_from([None, "int8"]))
def test_what_is_written_is_read_back_by_us_and_by_the_package(tensors, quantize):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        write_aligned(path, tensors, Saved("bfloat16", quantize), "here")
        found, saved = opened(path)
        assert (saved.dtype, saved.quantize, list(found)) == ("bfloat16", quantize, list(tensors))
        for name, array in tensors.items():
            tensor = found[name]
            assert (tensor.shape, tensor.dtype, tensor.offset % 64) == (array.shape, array.dtype, 0)
            assert tensor.read().tobytes() == array.tobytes()
        verify(found, saved, "here")
        with safe_open(path, "numpy") as theirs:
            assert {name for name in theirs.keys() if not name.startswith(PADDING)} == tensors.keys()  # noqa: SIM118
        if not any(array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float8"))
                   for array in tensors.values()):
            for name, array in load_file(path).items():
                assert name.startswith(PADDING) or array.tobytes() == tensors[name].tobytes()


def test_only_a_tensor_of_an_odd_size_is_followed_by_padding(tmp_path):
    tensors = {"a": np.ones((4, 16), np.float32), "b": np.ones(3, np.float32), "c": np.ones(16, np.float32)}
    write_aligned(tmp_path / "m", tensors, Saved("float32"), "here")
    written, _ = open_with_metadata(tmp_path / "m")
    assert [name if not name.startswith(PADDING) else tensor.nbytes for name, tensor in written.items()] == [
        "a", "b", 52, "c"]


@given(place=st.integers(0, 511))
def test_a_byte_that_is_not_what_it_was_is_found_and_its_tensor_named(place):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m"
        write_aligned(path, {"a": np.zeros(64, np.float32), "b": np.zeros(64, np.float32)}, Saved("float32"), "here")
        data = bytearray(path.read_bytes())
        data[len(data) - 512 + place] ^= 4
        path.write_bytes(data)
        found, saved = opened(path)
        with pytest.raises(CorruptFile, match=f"1 of 2 tensors.*: {'ab'[place // 256]}$"):
            verify(found, saved, "here")


def test_progress_rises_to_the_bytes_of_the_arrays(tmp_path):
    seen = []
    with observe(seen.append):
        write_aligned(tmp_path / "m", {"a": np.ones(3, np.float32), "b": np.ones(8, np.int8)}, Saved("float32"), "m")
        verify(*opened(tmp_path / "m"), "m")
    assert [(event.what, event.done, event.total) for event in seen] == [
        ("save", 12, 20), ("save", 20, 20), ("verify", 12, 20), ("verify", 20, 20)]


def test_what_a_later_version_wrote_is_refused():
    later = Saved("float32").told() | {"layout": 2}
    with pytest.raises(UnsupportedModel, match="saved in layout 2, this version knows 1"):
        read_told(later, "here")


@pytest.mark.parametrize("told", [[], {}, {"layout": True}, {"layout": 1}, Saved("float32", "int3").told(),
                                  Saved("float32").told() | {"sha256": None}, Saved("").told() | {"dtype": 4}])
def test_notes_of_ours_that_make_no_sense_are_corrupt(told):
    with pytest.raises(CorruptFile, match=r"here: what jaxinfer notes"):
        read_told(told, "here")
