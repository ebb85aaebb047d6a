"""Block formats: the weights are those of the `gguf` package, to the last bit."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize as reference
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.frontend.dequantize import CHUNK, FORMATS, dequantize


def expected(data: np.ndarray, kind: str) -> np.ndarray:
    with np.errstate(all="ignore"):  # random scales are often infinite or not numbers
        return reference(data.reshape(-1, FORMATS[kind].record.itemsize), GGMLQuantizationType[kind]).reshape(-1)


def assert_same_bits(actual: np.ndarray, wanted: np.ndarray) -> None:
    """Equal to the bit, signed zeros included; which of the many NaNs it is does not matter."""
    assert (actual.dtype, actual.shape) == (np.float32, wanted.shape)
    numbers = ~np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(actual), ~numbers)
    np.testing.assert_array_equal(actual.view(np.uint32)[numbers], wanted.view(np.uint32)[numbers])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_block_has_the_size_that_ggml_gives_it(kind):
    assert (FORMATS[kind].weights, FORMATS[kind].record.itemsize) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
def test_any_bytes_become_the_reference_s_weights(kind, data):
    size = FORMATS[kind].record.itemsize
    count = data.draw(st.integers(1, 3))
    raw = np.frombuffer(data.draw(st.binary(min_size=count * size, max_size=count * size)), np.uint8)
    assert_same_bits(dequantize(raw, FORMATS[kind]), expected(raw, kind))


@pytest.mark.parametrize("kind", FORMATS)
def test_tensors_longer_than_a_chunk_have_no_seams(kind):
    blocks = 2 * CHUNK // FORMATS[kind].weights + 3
    raw = np.random.default_rng(0).integers(0, 256, blocks * FORMATS[kind].record.itemsize, np.uint8)
    assert_same_bits(dequantize(raw, FORMATS[kind]), expected(raw, kind))


def test_bytes_at_an_odd_address_are_read_as_well():
    raw = np.random.default_rng(0).integers(0, 256, 1 + 4 * 20, np.uint8)[1:]
    assert_same_bits(dequantize(raw, FORMATS["Q4_1"]), expected(raw.copy(), "Q4_1"))
