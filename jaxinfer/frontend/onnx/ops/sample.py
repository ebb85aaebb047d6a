"""Reading between the pixels: grid sampling and region pooling; and which boxes to keep."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce

import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import ANY, op
from jaxinfer.frontend.onnx.values import Value

CUBIC = -0.75  # the sharpness that GridSample uses


def product(factors: Sequence[Value]) -> Value:
    return reduce(operator.mul, factors)


def pixels(x: Value, index: Sequence[Value], outside: Callable[[Value, int], Value] | None) -> Value:
    """x [N, C, spatial...] read at whole positions index[axis] [N, points...]: [N, C, points...].

    `outside` maps a position into the image; without it, there is zero.
    """
    sizes = x.shape[2:]
    if outside is not None:
        index = [outside(i, n) for i, n in zip(index, sizes, strict=True)]
    inside = product([(i >= 0) & (i < n) for i, n in zip(index, sizes, strict=True)])
    clipped = [jnp.clip(i, 0, n - 1).astype(np.int32) for i, n in zip(index, sizes, strict=True)]
    row = np.arange(x.shape[0]).reshape((-1,) + (1,) * (clipped[0].ndim - 1))
    values = jnp.moveaxis(jnp.asarray(x)[(row, slice(None), *clipped)], -1, 1)
    return jnp.where(inside[:, None], values, 0).astype(x.dtype)


def interpolate(x: Value, places: Sequence[Value], taps: str = "linear",
                outside: Callable[[Value, int], Value] | None = None) -> Value:
    """x read at real positions, as a weighted sum of the pixels around each."""
    offsets, weigh = ((0, 1), linear_weight) if taps == "linear" else ((-1, 0, 1, 2), cubic_weight)
    floors = [jnp.floor(place) for place in places]
    total: Value = 0
    for corner in itertools.product(offsets, repeat=len(places)):
        index = [floor + step for floor, step in zip(floors, corner, strict=True)]
        weight = product([weigh(abs(place - i)) for place, i in zip(places, index, strict=True)])
        total = total + pixels(x, index, outside) * weight[:, None].astype(x.dtype)
    return total


def linear_weight(distance: Value) -> Value:
    return 1 - distance


def cubic_weight(distance: Value, a: float = CUBIC) -> Value:
    """Keys' cubic convolution kernel."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return jnp.where(distance <= 1, near, jnp.where(distance < 2, far, 0))


def reflect(place: Value, low: float, high: float) -> Value:
    """Positions mirrored at both ends until they lie between them."""
    span = high - low
    if span <= 0:
        return jnp.zeros_like(place)
    beyond = jnp.mod(place - low, 2 * span)
    return low + jnp.where(beyond > span, 2 * span - beyond, beyond)


@op("GridSample", since=16)
def grid_sample(node: Node, x: Value, grid: Value, *, align_corners: int = 0, mode: str = "linear",
                padding_mode: str = "zeros") -> Value:
    """x at `grid` [N, out..., axes], whose coordinates run from -1 to 1, the last spatial axis first."""
    sizes, mode = x.shape[2:], mode.removeprefix("bi")
    ends = lambda n: (0, n - 1) if align_corners else (-0.5, n - 0.5)
    scale = lambda g, n: (g + 1) / 2 * (n - 1) if align_corners else ((g + 1) * n - 1) / 2
    places = [scale(grid[..., -1 - axis], n) for axis, n in enumerate(sizes)]
    inwards = {
        "zeros": None,
        "border": lambda i, n: jnp.clip(i, 0, n - 1),
        "reflection": lambda i, n: jnp.clip(reflect(i, *ends(n)), 0, n - 1),
    }[padding_mode]
    if mode == "cubic":
        return interpolate(x, places, "cubic", inwards)
    if inwards is not None:
        places = [inwards(place, n) for place, n in zip(places, sizes, strict=True)]
    if mode == "nearest":
        return pixels(x, [jnp.round(place) for place in places], None)
    return interpolate(x, places)


def _roi_align(
    node: Node, x: Value, rois: Value, batch: Value, mode: str, output_height: int, output_width: int,
    sampling_ratio: int, spatial_scale: float, shift: float,
) -> Value:  # fmt: skip
    """Samples on a regular grid in every bin, averaged; regions [R, (x1, y1, x2, y2)]."""
    corners = rois * np.asarray(spatial_scale, rois.dtype) - np.asarray(shift, rois.dtype)
    places, valid, counts = [], [], []
    for axis, bins in ((1, output_height), (0, output_width)):
        start, size = corners[:, axis], corners[:, axis + 2] - corners[:, axis]
        size = size if shift else jnp.maximum(size, 1)
        if sampling_ratio > 0:
            count = np.full(rois.shape[0], sampling_ratio)
        else:
            count = np.maximum(np.ceil(node.array(size, "rois") / bins).astype(int), 1)
        tick = np.arange(max(count.max(initial=1), 1))
        share = (np.arange(bins)[:, None] + (tick + 0.5) / count[:, None, None]) / bins  # [R, bins, ticks]
        places.append(start[:, None, None] + share.astype(rois.dtype) * size[:, None, None])
        valid.append(tick < count[:, None])
        counts.append(count)
    return _bins(x, places, valid, counts, batch, mode)


def _bins(x: Value, places: list[Value], valid: list[Value], counts: list[Value], batch: Value, mode: str) -> Value:
    """Positions [R, bins, ticks] by axis, read from image `batch[r]` and pooled: [R, C, bins, bins]."""
    (y_RHS, x_RWT), (height, width) = places, x.shape[2:]
    y, z = jnp.broadcast_arrays(y_RHS[:, :, None, :, None], x_RWT[:, None, :, None, :])
    beyond = (y < -1) | (y > height) | (z < -1) | (z > width)
    y, z = jnp.clip(y, 0, height - 1), jnp.clip(z, 0, width - 1)
    read = (valid[0][:, None, None, :, None] & valid[1][:, None, None, None, :] & ~beyond)[:, None]
    images = jnp.asarray(x)[batch]
    if mode == "avg":
        samples = jnp.where(read, interpolate(images, [y, z]), 0)
        return samples.sum((-2, -1)) / (counts[0] * counts[1]).astype(x.dtype).reshape(-1, 1, 1, 1)
    parts = []
    for corner in itertools.product((0, 1), repeat=2):  # the largest weighted pixel, as onnxruntime has it
        index = [jnp.floor(place) + step for place, step in zip((y, z), corner, strict=True)]
        weight = product([linear_weight(abs(place - i)) for place, i in zip((y, z), index, strict=True)])
        parts.append(jnp.where(read, pixels(images, index, None) * weight[:, None].astype(x.dtype), -jnp.inf))
    best = jnp.stack(parts).max((0, -2, -1))
    return jnp.where(jnp.isfinite(best), best, 0)


@op("RoiAlign", since=16)
def roi_align(
    node: Node, x: Value, rois: Value, batch: Value, *, coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg", output_height: int = 1, output_width: int = 1, sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Value:  # fmt: skip
    shift = 0.5 if coordinate_transformation_mode == "half_pixel" else 0.0
    return _roi_align(node, x, rois, batch, mode, output_height, output_width, sampling_ratio, spatial_scale, shift)


@op("RoiAlign", since=10)
def roi_align_10(
    node: Node, x: Value, rois: Value, batch: Value, *, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
) -> Value:  # fmt: skip
    """Before opset 16 pixels were taken at their corners."""
    return _roi_align(node, x, rois, batch, mode, output_height, output_width, sampling_ratio, spatial_scale, 0.0)


@op("NonMaxSuppression", since=10, shaping=(ANY,))
def non_max_suppression(
    node: Node, boxes: Value, scores: Value, most: Value = None, iou: Value = None, least: Value = None, *,
    center_point_box: int = 0,
) -> Value:  # fmt: skip
    """[kept, (image, class, box)]: by falling score, without those that overlap a kept one by more than `iou`."""
    first = lambda value, what, default: default if value is None else node.array(value, what).reshape(-1)[0]
    limit, overlap = int(first(most, "max_output_boxes_per_class", 0)), first(iou, "iou_threshold", 0.0)
    floor = first(least, "score_threshold", -np.inf)
    boxes, scores, kept = node.array(boxes, "boxes"), node.array(scores, "scores"), []
    for image, group in np.ndindex(scores.shape[:2]):
        corners = _corners(boxes[image], center_point_box)
        order = [b for b in np.argsort(-scores[image, group], kind="stable") if scores[image, group, b] > floor]
        kept += [(image, group, b) for b in _greedy(corners, order, limit, overlap)]
    return np.array(kept, np.int64).reshape(-1, 3)


def _greedy(corners: np.ndarray, order: list[int], limit: int, overlap: float) -> list[int]:
    chosen: list[int] = []
    for box in order:
        if len(chosen) == limit:
            break
        if not chosen or (_iou(corners[box], corners[chosen]) <= overlap).all():
            chosen.append(box)
    return chosen


def _corners(boxes: np.ndarray, centred: int) -> np.ndarray:
    """[(low, low, high, high)], from centres and sizes or from any two opposite corners."""
    if centred:
        half = boxes[:, 2:] / 2
        return np.concatenate([boxes[:, :2] - half, boxes[:, :2] + half], 1)
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], 1)


def _iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    area = lambda b: (b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1])
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.clip(sides, 0, None).prod(1)
    union = area(box) + area(others) - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0)


@op("MaxRoiPool")
def max_roi_pool(node: Node, x: Value, rois: Value, *, pooled_shape: list[int], spatial_scale: float = 1.0) -> Value:
    """The maximum in each bin of each region [R, (image, x1, y1, x2, y2)], which must be known."""
    regions = node.array(rois, "rois")
    rows = []
    for image, *corners in regions:
        x1, y1, x2, y2 = (round(float(c) * spatial_scale) for c in corners)
        crop, parts = jnp.asarray(x)[int(image)], []
        for row, column in np.ndindex(*pooled_shape):
            cut = []
            for start, end, index, bins in ((y1, y2, row, pooled_shape[0]), (x1, x2, column, pooled_shape[1])):
                size = max(end - start + 1, 1) / bins
                cut.append(slice(max(start + math.floor(index * size), 0), start + math.ceil((index + 1) * size)))
            part = crop[:, cut[0], cut[1]]
            parts.append(part.max((1, 2)) if math.prod(part.shape[1:]) else jnp.zeros(x.shape[1], x.dtype))
        rows.append(jnp.stack(parts, 1).reshape(-1, *pooled_shape))
    return jnp.stack(rows)
