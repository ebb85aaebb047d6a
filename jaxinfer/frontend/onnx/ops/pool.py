"""Pooling over windows of channels-first arrays: x [N, C, spatial...]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.ops.convolution import extent, ones, padding
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, cast, floating, wide


@dataclass(frozen=True)
class Windows:
    """Where each window lies: kernel, strides and dilations by axis, padding that it may touch, and `overhang`, what
    `ceil_mode` adds behind that so that a last, partial window fits."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    overhang: list[int]

    def reduced(self, x: Value, start: Value, combine) -> Value:
        around = [(before, after + more) for (before, after), more in zip(self.pads, self.overhang, strict=True)]
        full = lambda sizes: (1, 1, *sizes)
        return lax.reduce_window(x, start, combine, full(self.kernel), full(self.strides),
                                 [(0, 0), (0, 0), *around], window_dilation=full(self.dilations))

    def taps(self, axis: int, size: int) -> np.ndarray:
        """[outputs, kernel]: the position in the input of every tap, outside of it where it reads padding."""
        before, after = self.pads[axis]
        reach = extent(self.kernel[axis], self.dilations[axis])
        outputs = (size + before + after + self.overhang[axis] - reach) // self.strides[axis] + 1
        return (np.arange(outputs)[:, None] * self.strides[axis] - before
                + np.arange(self.kernel[axis]) * self.dilations[axis])

    def counted(self, sizes: tuple[int, ...], include_pads: bool) -> np.ndarray:
        """How many taps of each window count for the average."""
        def along(axis: int, size: int) -> np.ndarray:
            taps, (before, after) = self.taps(axis, size), self.pads[axis]
            low, high = (-before, size + after) if include_pads else (0, size)
            return ((taps >= low) & (taps < high)).sum(1)

        return reduce(np.multiply.outer, [along(axis, size) for axis, size in enumerate(sizes)])


def windows(
    x: Value, kernel: list[int], strides: list[int] | None, dilations: list[int] | None,
    pads: list[int] | None, auto_pad: str, ceil_mode: int,
) -> Windows:  # fmt: skip
    rank = len(kernel)
    strides, dilations = ones(strides, rank), ones(dilations, rank)
    around = padding(auto_pad, pads, x.shape[2:], kernel, strides, dilations)
    overhang = [0] * rank
    if ceil_mode and auto_pad in ("NOTSET", ""):
        for axis, size in enumerate(x.shape[2:]):
            before, after = around[axis]
            room = size + before + after - extent(kernel[axis], dilations[axis])
            steps = -(-room // strides[axis])
            if steps * strides[axis] >= size + before:  # a window may not begin behind the input
                steps -= 1
            overhang[axis] = max(steps * strides[axis] - room, 0)
    return Windows(kernel, strides, dilations, around, overhang)


@op("MaxPool")
def max_pool(
    node: Node, x: Value, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: list[int] | None = None, pads: list[int] | None = None, storage_order: int = 0,
    strides: list[int] | None = None,
) -> Value:  # fmt: skip
    """The second output, if asked for, is the flat index of each maximum in x."""
    x, where = jnp.asarray(x), windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    lowest = np.array(-np.inf if floating(x) else jnp.iinfo(x.dtype).min, x.dtype)
    if len(node.outputs) < 2:
        return where.reduced(x, lowest, lax.max)
    return _max_and_place(x, where, lowest, storage_order)


def _max_and_place(x: Value, where: Windows, lowest: np.ndarray, column_major: int) -> tuple[Value, Value]:
    rank, sizes = x.ndim - 2, x.shape[2:]
    taps = [where.taps(axis, size) for axis, size in enumerate(sizes)]
    outs, kernel = [len(tap) for tap in taps], where.kernel
    spread = [tap.reshape([n if i in (axis, rank + axis) else 1 for i, n in enumerate(outs + kernel)])
              for axis, tap in enumerate(taps)]
    inside = reduce(np.logical_and, [(s >= 0) & (s < n) for s, n in zip(spread, sizes, strict=True)])
    index = [np.clip(s, 0, n - 1) for s, n in zip(spread, sizes, strict=True)]
    flat = jnp.where(inside, x[(slice(None), slice(None), *index)], lowest).reshape(*x.shape[:2], *outs, -1)
    best = jnp.argmax(flat, -1)
    weights = np.cumprod([1, *sizes])[:-1] if column_major else np.cumprod([1, *sizes[::-1]])[-2::-1]
    place = sum(i * int(w) for i, w in zip(index, weights, strict=True))
    place = np.broadcast_to(place, (*outs, *kernel)).reshape(*outs, -1)
    chosen = jnp.take_along_axis(jnp.broadcast_to(place, flat.shape), best[..., None], -1)[..., 0]
    plane = np.arange(math.prod(x.shape[:2])).reshape(*x.shape[:2], *(1,) * rank) * math.prod(sizes)
    return flat.max(-1), cast(chosen + plane, np.int64)


@op("AveragePool")
def average_pool(
    node: Node, x: Value, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    count_include_pad: int = 0, dilations: list[int] | None = None, pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Value:  # fmt: skip
    where = windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    total = where.reduced(jnp.asarray(x), np.zeros((), x.dtype), lax.add)
    return total / where.counted(x.shape[2:], bool(count_include_pad)).astype(x.dtype)


@op("LpPool", since=2)
def lp_pool(
    node: Node, x: Value, *, kernel_shape: list[int], auto_pad: str = "NOTSET", ceil_mode: int = 0,
    dilations: list[int] | None = None, p: int = 2, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    where = windows(x, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return where.reduced(jnp.abs(x) ** p, np.zeros((), x.dtype), lax.add) ** (1 / p)


def _spatial(x: Value) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


op("GlobalAveragePool")(lambda node, x: jnp.mean(x, _spatial(x), keepdims=True))
op("GlobalMaxPool")(lambda node, x: jnp.max(x, _spatial(x), keepdims=True))


@op("GlobalLpPool")
def global_lp_pool(node: Node, x: Value, *, p: float = 2) -> Value:
    return jnp.sum(jnp.abs(wide(x)) ** p, _spatial(x), keepdims=True) ** (1 / p)


@op("MaxUnpool", since=9, shaping=(2,))
def max_unpool(
    node: Node, x: Value, indices: Value, output_shape: Value = None, *, kernel_shape: list[int],
    pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    """Each maximum goes back where MaxPool found it; the rest is zero. A larger `output_shape` adds at the ends."""
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * 2 * rank
    sizes = [(n - 1) * s + k - pads[i] - pads[i + rank]
             for i, (n, s, k) in enumerate(zip(x.shape[2:], strides, kernel_shape, strict=True))]
    small = (*x.shape[:2], *sizes)
    y = jnp.zeros(math.prod(small), x.dtype).at[jnp.ravel(indices)].set(jnp.ravel(x)).reshape(small)
    if output_shape is None:
        return y
    wanted = node.ints(output_shape, "output_shape")
    return jnp.pad(y, [(0, target - n) for target, n in zip(wanted, small, strict=True)])
