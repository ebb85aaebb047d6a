"""Convolutions, also transposed, on channels-first arrays: x [N, C, spatial...], w [M, C / group, kernel...]."""

from __future__ import annotations

import itertools
import math

import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.convolve import convolution
from jaxinfer.frontend.onnx.ops.index import scatter
from jaxinfer.frontend.onnx.ops.sample import interpolate
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, namespace


def pairs(pads: list[int] | None, rank: int) -> list[tuple[int, int]]:
    """ONNX lists all beginnings, then all ends."""
    return [(0, 0)] * rank if pads is None else list(zip(pads[:rank], pads[rank:], strict=True))


def ones(numbers: list[int] | None, rank: int) -> list[int]:
    """Strides or dilations, which are 1 unless given."""
    return numbers or [1] * rank


def extent(kernel: int, dilation: int) -> int:
    """How far a dilated kernel reaches."""
    return (kernel - 1) * dilation + 1


def halves(total: int, upper: bool) -> tuple[int, int]:
    return (total // 2, total - total // 2) if upper else (total - total // 2, total // 2)


def padding(
    auto_pad: str, pads: list[int] | None, sizes: tuple[int, ...],
    kernel: list[int], strides: list[int], dilations: list[int],
) -> list[tuple[int, int]]:  # fmt: skip
    """What is added before and after each spatial axis. SAME makes ceil(size / stride) outputs."""
    if auto_pad in ("NOTSET", ""):
        return pairs(pads, len(sizes))
    if auto_pad == "VALID":
        return pairs(None, len(sizes))
    wanted = [max((-(-n // s) - 1) * s + extent(k, d) - n, 0)
              for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)]
    return [halves(total, auto_pad == "SAME_UPPER") for total in wanted]


def convolve(
    x: Value, w: Value, auto_pad: str, dilations: list[int] | None, group: int,
    pads: list[int] | None, strides: list[int] | None,
) -> Value:  # fmt: skip
    rank = x.ndim - 2
    strides, dilations = ones(strides, rank), ones(dilations, rank)
    around = padding(auto_pad, pads, x.shape[2:], list(w.shape[2:]), strides, dilations)
    return convolution(jnp.asarray(x), jnp.asarray(w), strides, around, dilations, group)


def with_bias(y: Value, bias: Value) -> Value:
    return y if bias is None else y + bias.reshape((-1,) + (1,) * (y.ndim - 2))


@op("Conv")
def conv(
    node: Node, x: Value, w: Value, bias: Value = None, *,
    auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    return with_bias(convolve(x, w, auto_pad, dilations, group, pads, strides), bias)


@op("ConvTranspose")
def conv_transpose(
    node: Node, x: Value, w: Value, bias: Value = None, *,
    auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, output_padding: list[int] | None = None,
    output_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    """The gradient of a convolution: w [C, M / group, kernel...] is flipped, x is spread out by the strides."""
    rank = x.ndim - 2
    strides, dilations = ones(strides, rank), ones(dilations, rank)
    extra, reach = output_padding or [0] * rank, [extent(k, d) for k, d in zip(w.shape[2:], dilations, strict=True)]
    full = [(n - 1) * s + r + e for n, s, r, e in zip(x.shape[2:], strides, reach, extra, strict=True)]
    if output_shape is None and auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        output_shape = [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if output_shape is None:
        cut = pairs(None if auto_pad == "VALID" else pads, rank)
    else:
        cut = [halves(f - n, auto_pad == "SAME_UPPER") for f, n in zip(full, output_shape[-rank:], strict=True)]
    around = [(r - 1 - before, r - 1 - after + e) for r, e, (before, after) in zip(reach, extra, cut, strict=True)]
    y = convolution(jnp.asarray(x), turned(jnp.asarray(w), group), [1] * rank, around, dilations, group, strides)
    return with_bias(y, bias)


def turned(w: Value, group: int) -> Value:
    """[C, M / group, kernel...] as [M, C / group, kernel...], each kernel back to front."""
    c, m, *kernel = w.shape
    w = jnp.swapaxes(w.reshape(group, c // group, m, *kernel), 1, 2).reshape(group * m, c // group, *kernel)
    return jnp.flip(w, range(2, w.ndim))


@op("Col2Im", since=18, shaping=(1, 2))
def col2im(
    node: Node, columns: Value, image_shape: Value, block_shape: Value, *,
    dilations: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    """Blocks [N, C * block, positions] are added up where they lay in the image."""
    image, block = node.ints(image_shape, "image_shape"), node.ints(block_shape, "block_shape")
    rank = len(image)
    around, strides, dilations = pairs(pads, rank), ones(strides, rank), ones(dilations, rank)
    padded = [n + before + after for n, (before, after) in zip(image, around, strict=True)]
    counts = [(n - extent(k, d)) // s + 1 for n, k, d, s in zip(padded, block, dilations, strides, strict=True)]
    place = []
    for axis in range(rank):
        line = np.arange(block[axis])[:, None] * dilations[axis] + np.arange(counts[axis]) * strides[axis]
        place.append(line.reshape([n if i in (axis, rank + axis) else 1 for i, n in enumerate(block + counts)]))
    n, channels = columns.shape[0], columns.shape[1] // math.prod(block)
    canvas = namespace(columns).zeros((n, channels, *padded), columns.dtype)
    values = columns.reshape(n, channels, *block, *counts)
    lead = np.indices((n, channels) + (1,) * 2 * rank, sparse=True)[:2]
    y = scatter(canvas, (*lead, *place), values, "add")
    return y[(..., *(slice(before, before + n) for n, (before, _) in zip(image, around, strict=True)))]


@op("DeformConv", since=19)
def deform_conv(
    node: Node, x: Value, w: Value, offset: Value, bias: Value = None, mask: Value = None, *,
    dilations: list[int] | None = None, group: int = 1, kernel_shape: list[int] | None = None,
    offset_group: int = 1, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    """A convolution that reads each tap at a place moved by `offset`, between the pixels (arXiv:1811.11168)."""
    rank, kernel = x.ndim - 2, w.shape[2:]
    strides, dilations, around = ones(strides, rank), ones(dilations, rank), pairs(pads, rank)
    outs, (n, c), taps = offset.shape[2:], x.shape[:2], math.prod(kernel)
    moved = offset.reshape(n, offset_group, taps, rank, *outs)
    coordinates = []
    for axis in range(rank):
        tap = np.array([k[axis] for k in itertools.product(*map(range, kernel))]) * dilations[axis]
        start = np.arange(outs[axis]) * strides[axis] - around[axis][0]
        grid = tap.reshape((-1,) + (1,) * rank) + start.reshape([-1 if i == axis else 1 for i in range(rank)])
        coordinates.append(moved[:, :, :, axis] + grid.astype(x.dtype))
    parts = x.reshape(n * offset_group, c // offset_group, *x.shape[2:])
    places = [place.reshape(n * offset_group, taps, *outs) for place in coordinates]
    patches = interpolate(parts, places)
    if mask is not None:
        patches = patches * mask.reshape(n * offset_group, 1, taps, *outs)
    patches = patches.reshape(n, group, c // group, taps, *outs)
    weights = w.reshape(group, w.shape[0] // group, c // group, taps)
    return with_bias(jnp.einsum("ngct...,gmct->ngm...", patches, weights).reshape(n, -1, *outs), bias)
