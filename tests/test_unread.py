"""What is unread is the same however it is cut, and no more of a tensor is read than is cut of it."""

from dataclasses import dataclass, field

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.frontend.files import ALL
from jaxinfer.frontend.unread import Rounded, Unread
from jaxinfer.kernels.quantised import FP8, INT4, INT8, blank, quantise

BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclass
class Counted:
    """A tensor in memory that counts the numbers that are read of it; `together` as in a format of large pieces."""

    array: np.ndarray
    together: int | None = 1
    read_of_it: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)

    shape = property(lambda self: self.array.shape)
    dtype = property(lambda self: self.array.dtype)
    nbytes = property(lambda self: self.array.nbytes)

    def read(self) -> np.ndarray:
        return self.rows(0, len(self.array))

    def rows(self, start: int, stop: int, columns: slice = ALL) -> np.ndarray:
        part = self.array[start:stop] if columns == ALL else self.array[start:stop, columns]
        self.read_of_it += part.size
        self.asked.append((start, stop))
        return part


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


@st.composite
def stretches(draw, size: int) -> slice:
    start, stop = sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size))))
    return draw(st.sampled_from([slice(start, stop), slice(None), slice(0, size), slice(start, None)]))


def unread(data) -> tuple[Unread, np.ndarray]:
    """One of the shapes that weights come in, and what it is when it is read."""
    dtype = data.draw(st.sampled_from([np.dtype(np.float32), BF16]))
    kind = data.draw(st.sampled_from(["vector", "joined", "transposed", "experts", "cube"]))
    if kind == "cube":
        return Unread((3, 5, 4), dtype, (Counted(numbers(3, 5, 4)),)), numbers(3, 5, 4).astype(dtype)
    if kind == "experts":
        parts = [numbers(rows, 4) + e for e in range(3) for rows in (2, 3)]
        return (Unread((3, 5, 4), dtype, tuple(map(Counted, parts))),
                np.concatenate(parts).reshape(3, 5, 4).astype(dtype))
    shapes = {"vector": [(6,), (2,)], "joined": [(6, 4), (1, 4), (3, 4)], "transposed": [(4, 6), (4, 3)]}[kind]
    parts = [numbers(*shape) for shape in shapes]
    turned = kind == "transposed"
    whole = np.concatenate([part.T if turned else part for part in parts]).astype(dtype)
    return Unread(whole.shape, dtype, tuple(map(Counted, parts)), turned), whole


@given(data=st.data())
def test_a_piece_is_that_piece_of_the_whole_and_nothing_else_was_read(data):
    array, whole = unread(data)
    assert (array.shape, array.dtype) == (whole.shape, whole.dtype)
    index = [data.draw(stretches(size)) for size in array.shape[: data.draw(st.integers(1, len(array.shape)))]]
    if data.draw(st.booleans()):
        index[0] = np.array(data.draw(st.lists(st.integers(0, array.shape[0] - 1), unique=True)), int)
    wanted, of_cube = whole[tuple(index)], index[:2]  # where a cube is stored whole, a row is read to its end
    if len(index) == 3 and data.draw(st.booleans()):
        of_cube = index[:1]
        index[1] = np.arange(array.shape[1])[index[1]][::-1]
        wanted = wanted[:, ::-1]
    piece = array[tuple(index)]
    np.testing.assert_array_equal(piece, wanted)
    assert piece.dtype == whole.dtype and (not piece.size or piece.ctypes.data % 64 == 0)
    read = sum(tensor.read_of_it for tensor in array.tensors)
    assert read == (piece.size if len(array.tensors) > 1 else whole[tuple(of_cube)].size)


@given(data=st.data())
def test_all_of_it_is_read_once(data):
    array, whole = unread(data)
    np.testing.assert_array_equal(array[...], whole)
    assert [tensor.read_of_it for tensor in array.tensors] == [tensor.array.size for tensor in array.tensors]


def test_a_number_by_itself_is_cast_too():
    tensor = Counted(np.array(1.5, np.float32))
    tensor.read = lambda: tensor.array
    assert Unread((), BF16, (tensor,))[...] == 1.5


def test_rows_that_are_stored_together_are_read_together():
    tensor = Counted(numbers(64, 4096), together=40)
    Unread((64, 4096), BF16, (tensor,))[...]
    assert tensor.asked == [(0, 40), (40, 64)]


@pytest.mark.parametrize("format", [INT8, INT4, FP8], ids=lambda format: format.name)
@given(data=st.data())
def test_parts_of_a_weight_that_is_quantised_while_it_is_read_are_read_together_and_then_forgotten(format, data):
    tensor = Counted(numbers(24, 64))
    weight = Rounded(Unread((24, 64), BF16, (tensor,)), format, BF16, "here", "w")
    wanted = quantise(tensor.array, blank(format, (24, 64), BF16))
    rows = data.draw(st.sampled_from([slice(0, 12), slice(12, 24), slice(None)]))
    for part, whole in zip(jax.tree.leaves(weight.parts()), jax.tree.leaves(wanted), strict=True):
        assert (part.shape, part.dtype) == (whole.shape, whole.dtype)
        np.testing.assert_array_equal(part[rows,], whole[rows])
    assert tensor.read_of_it == len(range(24)[rows]) * 64 and not weight._made


@pytest.mark.parametrize("format", [INT8, INT4, FP8], ids=lambda format: format.name)
@given(data=st.data())
def test_of_a_stack_of_matrices_that_is_quantised_some_rows_are_read_too(format, data):
    """Each expert's in a tensor of its own; a device's rows are every expert's, in an order of their own."""
    tensors = [Counted(numbers(8, 64)) for _ in range(3)]
    weight = Rounded(Unread((3, 8, 64), BF16, tuple(tensors)), format, BF16, "here", "w")
    wanted = quantise(np.stack([tensor.array for tensor in tensors]), blank(format, (3, 8, 64), BF16))
    rows = data.draw(st.sampled_from([slice(0, 4), slice(4, 8), slice(None), np.array([0, 1, 4, 5])]))
    for part, whole in zip(jax.tree.leaves(weight.parts()), jax.tree.leaves(wanted), strict=True):
        assert (part.shape, part.dtype) == (whole.shape, whole.dtype)
        np.testing.assert_array_equal(part[:, rows], whole[:, rows])
    assert sum(tensor.read_of_it for tensor in tensors) == 3 * len(np.arange(8)[rows]) * 64 and not weight._made
