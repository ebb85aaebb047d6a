"""Fourier transforms, windows and mel filters."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import ANY, op
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, known, wide


def complex_of(x: Value) -> Value:
    """The last axis holds a real number, or a real and an imaginary part."""
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def parts_of(z: Value, dtype: np.dtype) -> Value:
    return jnp.stack([z.real, z.imag], -1).astype(dtype)


def dft(x: Value, length: int | None, axis: int, inverse: int, onesided: int) -> Value:
    z, axis = complex_of(jnp.asarray(wide(x))), axis % x.ndim
    if onesided and inverse:
        return jnp.fft.irfft(z, length, axis)[..., None].astype(x.dtype)
    if onesided:
        return parts_of(jnp.fft.rfft(z.real, length, axis), x.dtype)
    return parts_of((jnp.fft.ifft if inverse else jnp.fft.fft)(z, length, axis), x.dtype)


@op("DFT", since=20, shaping=(1, 2))
def dft_20(
    node: Node, x: Value, length: Value = None, axis: Value = None, *, inverse: int = 0, onesided: int = 0,
) -> Value:  # fmt: skip
    count = None if length is None else node.ints(length, "dft_length")[0]
    return dft(x, count, -2 if axis is None else node.ints(axis, "axis")[0], inverse, onesided)


@op("DFT", since=17, shaping=(1,))
def dft_17(node: Node, x: Value, length: Value = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Value:
    return dft(x, None if length is None else node.ints(length, "dft_length")[0], axis, inverse, onesided)


@op("STFT", since=17, shaping=(1, 3))
def stft(node: Node, x: Value, step: Value, window: Value = None, length: Value = None, *, onesided: int = 1) -> Value:
    """[N, samples, 1 or 2] to [N, frames, frequencies, 2]."""
    hop = node.ints(step, "frame_step")[0]
    size = window.shape[0] if length is None else node.ints(length, "frame_length")[0]
    frames = (x.shape[1] - size) // hop + 1
    index = np.arange(frames)[:, None] * hop + np.arange(size)
    z = complex_of(jnp.asarray(x))[:, index]
    z = z if window is None else z * window
    spectrum = jnp.fft.rfft(z.real, axis=-1) if onesided else jnp.fft.fft(z, axis=-1)
    return parts_of(spectrum, x.dtype)


# Coefficients of cosines: w(n) = sum_k a_k cos(2 pi k n / N).
WINDOWS = {"HannWindow": (0.5, -0.5), "HammingWindow": (25 / 46, -21 / 46), "BlackmanWindow": (0.42, -0.5, 0.08)}


def _window(name: str) -> None:
    @op(name, since=17, shaping=(0,))
    def window(node: Node, size: Value, *, output_datatype: int = 1, periodic: int = 1) -> Value:
        count = node.ints(size, "size")[0]
        angle = 2 * np.pi * np.arange(count) / (count if periodic else max(count - 1, 1))
        terms = [a * np.cos(k * angle) for k, a in enumerate(WINDOWS[name])]
        return sum(terms[1:], terms[0]).astype(element_type(output_datatype))


for _name in WINDOWS:
    _window(_name)


@op("MelWeightMatrix", since=17, shaping=(ANY,))
def mel_weight_matrix(
    node: Node, bins: Value, length: Value, rate: Value, low: Value, high: Value, *, output_datatype: int = 1,
) -> Value:  # fmt: skip
    """[length / 2 + 1, bins]: triangles between neighbouring mel frequencies, in whole spectrogram bins."""
    count, size = node.ints(bins, "num_mel_bins")[0], node.ints(length, "dft_length")[0]
    ends = [float(node.array(v, what).item()) for v, what in ((low, "lower_edge_hertz"), (high, "upper_edge_hertz"))]
    first, last = 2595 * np.log10(1 + np.array(ends) / 700)
    mel = first + np.arange(count + 2) * (last - first) / (count + 2)  # as ONNX has it: the last edge is not `high`
    hertz = 700 * (10 ** (mel / 2595) - 1)
    edges = np.floor((size + 1) * hertz / node.ints(rate, "sample_rate")[0]).astype(int)
    place = np.arange(size // 2 + 1)[:, None]
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    rise = np.where(centre > left, (place - left) / np.maximum(centre - left, 1), place == centre)
    fall = np.where(right > centre, (right - place) / np.maximum(right - centre, 1), 0)
    weights = np.where((place >= left) & (place <= centre), rise, 0)
    weights += np.where((place > centre) & (place < right), fall, 0)
    return weights.astype(known(element_type(output_datatype)))
