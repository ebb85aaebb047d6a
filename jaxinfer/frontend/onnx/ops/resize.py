"""Resize and Upsample: along one axis at a time, every output is a weighted sum of a few inputs.

The weights depend on shapes and scales alone, so numpy makes them while JAX traces. The definitions of coordinates and
coefficients are those of https://onnx.ai/onnx/operators/onnx__Resize.html.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, aligned, cast, floating


@dataclass(frozen=True)
class Manner:
    """The attributes of Resize that say how positions and weights are found."""

    mode: str = "nearest"
    coordinates: str = "asymmetric"
    nearest: str = "floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False


def positions(size: int, count: int, scale: float, coordinates: str, roi: tuple[float, float]) -> np.ndarray:
    """Where each of `count` outputs lies among `size` inputs."""
    out = np.arange(count, dtype=np.float64)
    if coordinates == "asymmetric":
        return out / scale
    if coordinates == "align_corners":
        return out * (size - 1) / (scale * size - 1) if count > 1 else np.zeros(count)
    if coordinates == "tf_crop_and_resize":
        start, end = roi
        return (start + (end - start) * (out / (scale * size - 1) if count > 1 else out + 0.5)) * (size - 1)
    if coordinates == "tf_half_pixel_for_nn":
        return (out + 0.5) / scale
    if coordinates == "pytorch_half_pixel" and count == 1:
        return np.zeros(1)
    centred = (out + 0.5) / scale - 0.5
    if coordinates == "half_pixel_symmetric":
        return centred + size / 2 * (1 - count / (scale * size))
    return centred


def nearest_index(place: np.ndarray, rule: str) -> np.ndarray:
    return {"round_prefer_floor": lambda x: np.ceil(x - 0.5), "round_prefer_ceil": lambda x: np.floor(x + 0.5),
            "floor": np.floor, "ceil": np.ceil}[rule](place).astype(int)


def taps(place: np.ndarray, scale: float, manner: Manner) -> tuple[np.ndarray, np.ndarray]:
    """The inputs that each output reads, and their weights: two arrays [outputs, taps]."""
    if manner.mode == "nearest":
        return nearest_index(place, manner.nearest)[:, None], np.ones((len(place), 1))
    stretch = min(scale, 1.0) if manner.antialias else 1.0
    reach = (1 if manner.mode == "linear" else 2) / stretch
    offsets = np.arange(math.floor(-reach) + 1, math.ceil(reach) + 1)
    index = np.floor(place).astype(int)[:, None] + offsets
    distance = np.abs(index - place[:, None]) * stretch
    weights = np.clip(1 - distance, 0, None) if manner.mode == "linear" else cubic_weights(distance, manner.cubic)
    if manner.antialias:
        weights = weights / weights.sum(1, keepdims=True)
    return index, weights


def cubic_weights(distance: np.ndarray, a: float) -> np.ndarray:
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def resized_axis(x: Value, axis: int, count: int, scale: float, manner: Manner, roi: tuple[float, float]) -> Value:
    size = x.shape[axis]
    place = positions(size, count, scale, manner.coordinates, roi)
    index, weights = taps(place, scale, manner)
    if manner.exclude_outside:
        weights = np.where((index >= 0) & (index < size), weights, 0)
        weights = weights / weights.sum(1, keepdims=True)
    index = np.clip(index, 0, size - 1)
    if manner.mode == "nearest":
        return picked(x, axis, index[:, 0])
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    parts = [jnp.take(x, index[:, tap], axis, mode="clip") * weights[:, tap].reshape(shape).astype(x.dtype)
             for tap in range(index.shape[1]) if weights[:, tap].any()]
    return sum(parts[1:], parts[0])


def picked(x: Value, axis: int, index: np.ndarray) -> Value:
    """Rows by number; whole repeats are broadcast, which is much cheaper than a gather."""
    size, times = x.shape[axis], len(index) // max(x.shape[axis], 1)
    if times and np.array_equal(index, np.repeat(np.arange(size), times)):
        spread = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*x.shape[: axis + 1], times, *x.shape[axis + 1 :]))
        return spread.reshape(*x.shape[:axis], size * times, *x.shape[axis + 1 :])
    return jnp.take(x, index, axis, mode="clip")


def resize(
    x: Value, counts: list[int], scales: list[float], manner: Manner, rois: list[tuple[float, float]],
    extrapolation: float = 0.0,
) -> Value:  # fmt: skip
    y = x if floating(x) or manner.mode == "nearest" else cast(x, np.float32)
    for axis, (count, scale) in enumerate(zip(counts, scales, strict=True)):
        if count != x.shape[axis] or scale != 1 or manner.coordinates == "tf_crop_and_resize":
            y = resized_axis(y, axis, count, scale, manner, rois[axis])
    if manner.coordinates == "tf_crop_and_resize":
        for axis, count in enumerate(counts):
            place = positions(x.shape[axis], count, scales[axis], manner.coordinates, rois[axis])
            inside = aligned((place >= 0) & (place <= x.shape[axis] - 1), axis, x.ndim)
            y = jnp.where(inside, y, extrapolation)
    return y.astype(x.dtype) if floating(x) else cast(jnp.round(y) if floating(y) else y, x.dtype)


def _policy(sizes: list[int], along: list[int], x: Value, policy: str) -> tuple[list[int], list[float]]:
    """Sizes and scales of the axes named; two policies keep the picture's proportions."""
    scales = [size / x.shape[axis] for size, axis in zip(sizes, along, strict=True)]
    if policy == "stretch":
        return sizes, scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * x.shape[axis] + 0.5) for axis in along], [scale] * len(along)


@op("Resize", since=11, shaping=(1, 2, 3))
def resize_11(
    node: Node, x: Value, roi: Value = None, scales: Value = None, sizes: Value = None, *,
    antialias: int = 0, axes: list[int] | None = None, coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest", nearest_mode: str = "round_prefer_floor",
) -> Value:  # fmt: skip
    manner = Manner(mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside),
                    bool(antialias) and mode != "nearest")
    along = [axis % x.ndim for axis in axes] if axes else list(range(x.ndim))
    counts, factors, rois = list(x.shape), [1.0] * x.ndim, [(0.0, 1.0)] * x.ndim
    if sizes is not None and sizes.size:
        chosen, by = _policy(node.ints(sizes, "sizes"), along, x, keep_aspect_ratio_policy)
    else:
        by = [float(scale) for scale in node.array(scales, "scales")]
        chosen = [math.floor(scale * x.shape[axis]) for scale, axis in zip(by, along, strict=True)]
    regions = node.array(roi, "roi").reshape(2, -1).T.tolist() if roi is not None and roi.size else []
    for i, axis in enumerate(along):
        counts[axis], factors[axis] = chosen[i], by[i]
        rois[axis] = tuple(regions[i]) if regions else rois[axis]
    return resize(x, counts, factors, manner, rois, extrapolation_value)


@op("Resize", "Upsample", since=9, shaping=(1,))
def resize_9(node: Node, x: Value, scales: Value, *, mode: str = "nearest") -> Value:
    """Before opset 11 pixel i of the result lay at i / scale, without any other choice."""
    return scaled(x, [float(scale) for scale in node.array(scales, "scales")], mode)


@op("Upsample", since=7)
def upsample_7(node: Node, x: Value, *, scales: list[float], mode: str = "nearest") -> Value:
    return scaled(x, scales, mode)


@op("Upsample")
def upsample_1(node: Node, x: Value, *, height_scale: float, width_scale: float, mode: str = "nearest") -> Value:
    return scaled(x, [1, 1, height_scale, width_scale], mode)


def scaled(x: Value, scales: list[float], mode: str) -> Value:
    counts = [math.floor(n * scale) for n, scale in zip(x.shape, scales, strict=True)]
    return resize(x, counts, scales, Manner("linear" if mode == "bilinear" else mode), [(0.0, 1.0)] * x.ndim)
