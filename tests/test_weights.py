"""Loading promises: everything is checked before anything is read, every byte is read once, arrays arrive exact."""

import os
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

from jaxinfer.alignment import aligned
from jaxinfer.errors import CheckpointMismatch, CorruptFile
from jaxinfer.events import observe
from jaxinfer.frontend.files import File, Mapped
from jaxinfer.frontend.safetensors import open_safetensors
from jaxinfer.frontend.unread import cast_into
from jaxinfer.frontend.weights import READERS, load_params
from jaxinfer.graph import Graph, Leaf


@dataclass
class Held:
    """A tensor in memory that notes which of its numbers are read."""

    array: np.ndarray
    reads: list[int] = field(default_factory=list)

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    nbytes = property(lambda self: self.array.nbytes)

    def read(self) -> np.ndarray:
        return self.rows(0, len(self.array))

    def rows(self, start: int, stop: int, columns: slice = slice(None)) -> np.ndarray:
        part = self.array[start:stop] if columns == slice(None) else self.array[start:stop, columns]
        self.reads.append(part.size)
        return part


def graph(**spec) -> Graph:
    return Graph("test", spec, (), lambda *_: None, (), lambda *_: None, 1, 1, ignore=("*.inv_freq",))


def numbers(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_a_leaf_concatenates_the_tensors_that_its_name_joins():
    spec = graph(qkv=Leaf((5, 4), ("a", "b"), "q + k", "qk"))
    q, k = numbers(3, 4), numbers(2, 4)
    params = load_params(spec, {"q": Held(q), "k": Held(k)}, dtype="float32", source="here")
    np.testing.assert_array_equal(params["qkv"], np.concatenate([q, k]))
    whole = numbers(5, 4)
    np.testing.assert_array_equal(load_params(spec, {"qk": Held(whole)}, dtype="float32", source="")["qkv"], whole)


def test_a_leaf_of_three_axes_is_joined_of_matrices_or_taken_whole():
    spec = graph(w=Leaf((2, 5, 4), ("e", "a", "b"), "0.gate + 0.up + 1.gate + 1.up", "all"))
    parts = {f"{e}.{part}": numbers(rows, 4) + e for e in (0, 1) for part, rows in (("gate", 3), ("up", 2))}
    for dtype in ("float32", "bfloat16"):
        params = load_params(spec, {name: Held(part) for name, part in parts.items()}, dtype=dtype, source="here")
        expected = [np.concatenate([parts[f"{e}.gate"], parts[f"{e}.up"]]) for e in (0, 1)]
        np.testing.assert_array_equal(params["w"], np.stack(expected).astype(params["w"].dtype))
    whole = numbers(2, 5, 4)
    np.testing.assert_array_equal(load_params(spec, {"all": Held(whole)}, dtype="float32", source="")["w"], whole)
    parts["1.up"] = numbers(1, 4)
    with pytest.raises(CheckpointMismatch) as caught:
        load_params(spec, {name: Held(part) for name, part in parts.items()}, dtype="float32", source="here")
    assert caught.value.problems == ["wrong shape: 0.gate + 0.up + 1.gate + 1.up has "
                                     "(3, 4) + (2, 4) + (3, 4) + (1, 4), expected (10, 4)"]


def test_of_many_tensors_that_are_missing_the_first_and_the_last_are_named():
    spec = graph(w=Leaf((6, 5, 4), ("e", "a", "b"), " + ".join(f"{e}.w" for e in range(6))))
    with pytest.raises(CheckpointMismatch) as caught:
        load_params(spec, {}, dtype="float32", source="here")
    assert caught.value.problems == ["missing: 0.w + ... + 5.w (6 in all), part of a weight of shape (6, 5, 4)"]


def test_a_transposed_leaf_is_swapped_tensor_by_tensor_before_it_is_joined():
    spec = graph(w=Leaf((5, 4), ("a", "b"), "x + y", transpose=True))
    x, y = numbers(4, 3), numbers(4, 2)
    params = load_params(spec, {"x": Held(x), "y": Held(y)}, dtype="bfloat16", source="here")
    np.testing.assert_array_equal(params["w"], np.concatenate([x.T, y.T]).astype(ml_dtypes.bfloat16))


def test_exact_leaves_keep_float32_and_the_others_take_the_dtype_asked_for():
    spec = graph(w=Leaf((4, 4), ("a", "b"), "w"), norm=Leaf((4,), ("a",), "norm", exact=True))
    tensors = {"w": Held(numbers(4, 4)), "norm": Held(numbers(4, dtype=ml_dtypes.bfloat16))}
    params = load_params(spec, tensors, dtype=jnp.bfloat16, source="here")
    assert (params["w"].dtype, params["norm"].dtype) == (jnp.bfloat16, jnp.float32)


def test_every_problem_is_reported_at_once_and_nothing_is_read():
    spec = graph(a=Leaf((4,), ("a",), "a"), b=Leaf((4, 2), ("a", "b"), "b"), c=Leaf((4, 2), ("a", "b"), "c1 + c2", "c"),
                 d=Leaf((3, 2), ("a", "b"), "d", transpose=True), e=Leaf((1,), (None,), "e"))
    tensors = {"b": Held(numbers(2, 4)), "c1": Held(numbers(2, 2)), "d": Held(numbers(3, 2)), "odd": Held(numbers(1)),
               "e": Held(np.zeros(1, np.int8)), "layers.0.inv_freq": Held(numbers(1))}
    with pytest.raises(CheckpointMismatch) as caught:
        load_params(spec, tensors, dtype="float32", source="model.safetensors")
    assert caught.value.problems == [
        "missing: a, shape (4,)",
        "missing: c2 (or c), part of a weight of shape (4, 2)",
        "surplus: odd with shape (1,) belongs to no weight of this model",
        "wrong dtype: e holds int8, expected floating-point numbers",
        "wrong shape: b has (2, 4), expected (4, 2)",
        "wrong shape: d has (3, 2), expected (2, 3)",
    ]
    assert "model.safetensors: 6 problems, nothing was loaded" in str(caught.value)
    assert not any(tensor.reads for tensor in tensors.values())


def test_a_tensor_under_two_of_a_leafs_names_is_surplus_under_the_second():
    spec = graph(w=Leaf((1,), ("a",), "w", "old_w"))
    with pytest.raises(CheckpointMismatch, match="surplus: old_w"):
        load_params(spec, {"w": Held(numbers(1)), "old_w": Held(numbers(1))}, dtype="float32", source="here")


def test_every_weight_is_read_once_and_what_is_ignored_never():
    spec = graph(w=[Leaf((8, 8), ("a", "b"), f"w{i}") for i in range(20)])
    tensors = {f"w{i}": Held(numbers(8, 8)) for i in range(20)} | {"rotary.inv_freq": Held(numbers(4))}
    load_params(spec, tensors, dtype="bfloat16", source="here")
    assert [sum(tensor.reads) for tensor in tensors.values()] == [64] * 20 + [0]


def test_progress_rises_to_the_bytes_on_disk():
    spec, seen = graph(a=Leaf((4,), ("a",), "a"), b=Leaf((8,), ("a",), "b")), []
    with observe(seen.append):
        load_params(spec, {"a": Held(numbers(4)), "b": Held(numbers(8))}, dtype="float32", source="here")
    assert [event.done for event in seen] == sorted(event.done for event in seen)
    assert (seen[-1].what, seen[-1].name, seen[-1].done, seen[-1].total) == ("load", "here", 48, 48)


def test_an_aligned_tensor_that_needs_no_change_is_taken_over_without_a_copy(tmp_path):
    (tmp_path / "w").write_bytes(np.ones((256, 256), np.float32).tobytes())
    mapped = Mapped(File(tmp_path / "w"), "w", 0, (256, 256), np.dtype(np.float32))
    w = load_params(graph(w=Leaf((256, 256), ("a", "b"), "w")), {"w": mapped}, dtype="float32", source="")["w"]
    cpu = jax.devices("cpu")[0]
    assert w.devices() != {cpu} or w.unsafe_buffer_pointer() == mapped.read().ctypes.data


def test_what_had_to_be_assembled_is_taken_over_too():
    held, taken = [], []

    def put(_, x):
        array = x[...]
        held.append(array.ctypes.data)
        taken.append(jax.device_put(array))
        return taken[-1]

    spec = graph(w=Leaf((256, 256), ("a", "b"), "w"))
    load_params(spec, {"w": Held(numbers(256, 256))}, dtype="bfloat16", source="", put=put)
    assert [array.unsafe_buffer_pointer() for array in taken] == held


def test_a_read_that_fails_stops_the_load_with_its_own_error():
    class Broken(Held):
        def rows(self, start, stop, columns=slice(None)):
            raise OSError("the disk is gone")
    spec = graph(w=[Leaf((1,), ("a",), f"w{i}") for i in range(50)])
    tensors = {f"w{i}": (Broken if i == 3 else Held)(numbers(1)) for i in range(50)}
    with pytest.raises(OSError, match="the disk is gone"):
        load_params(spec, tensors, dtype="float32", source="here")


@given(hnp.arrays(np.uint32, st.integers(1, 300), elements=st.integers(0, 2**32 - 1)), st.integers(1, 4))
def test_our_rounding_to_bfloat16_is_that_of_ml_dtypes_for_every_bit_pattern(bits, columns):
    array = np.resize(bits.view(np.float32), (len(bits), columns))
    out = aligned(array.shape, np.dtype(ml_dtypes.bfloat16))
    cast_into(out, array)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(out.view(np.uint16), array.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_where_put_copies_nothing_is_mapped_and_reading_is_timed(tmp_path):
    tensors = {f"{i}.{part}": numbers(rows, 4) + i for i in range(40) for part, rows in (("q", 3), ("k", 2))}
    tensors |= {"half": numbers(7, 4).astype(ml_dtypes.bfloat16), "turned": numbers(4, 6), "whole": numbers(16, 16)}
    save_file(tensors, tmp_path / "model.safetensors")
    spec = graph(**{f"w{i}": Leaf((5, 4), ("a", "b"), f"{i}.q + {i}.k") for i in range(40)},
                 half=Leaf((7, 4), ("a", "b"), "half"), turned=Leaf((6, 4), ("a", "b"), "turned", transpose=True),
                 whole=Leaf((16, 16), ("a", "b"), "whole"))
    opened, read, locked = open_safetensors(tmp_path / "model.safetensors"), [], []

    def put(leaf, x):
        array = x[...]
        if locked and leaf.names[0] == "whole" and array.dtype == np.float32:
            assert any(np.shares_memory(array, memory) for memory in locked)
        assert array.flags.writeable, "a mapped file's memory is not ours"
        return jnp.array(array)

    for dtype in ("float32", "bfloat16"):
        expected = load_params(spec, opened, dtype=dtype, source="here")
        for again in (None, locked.append):  # jnp.array has copied when it is ready
            read.clear()
            params = load_params(spec, opened, dtype=dtype, source="here", put=put, copies=True, again=again,
                                 timed=lambda *what: read.append(what))
            jax.tree.map(np.testing.assert_array_equal, params, expected)
            assert len(read) == 2 * 43 and all(began <= ended for _, began, ended, _ in read)
            sizes = [sum(nbytes for what, _, _, nbytes in read if what == name)
                     for name in ("weights read", "weights transferred")]
            assert sizes == [np.dtype(dtype).itemsize * sum(x.size for x in tensors.values())] * 2
    assert 1 <= len(locked) <= 2 * READERS and all(memory.nbytes == tensors["whole"].nbytes for memory in locked)


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    save_file({"w": numbers(64, 64)}, tmp_path / "model.safetensors")
    opened = open_safetensors(tmp_path / "model.safetensors")
    os.truncate(tmp_path / "model.safetensors", 5000)
    with pytest.raises(CorruptFile, match=r"model\.safetensors: .*'w'"):
        load_params(graph(w=Leaf((64, 64), ("a", "b"), "w")), opened, dtype="float32", source="here", copies=True)
