"""Ops that move elements about and change none: transpose, split, slice, pad and their kin."""

from __future__ import annotations

import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, namespace, positive_axis


@op("Transpose")
def transpose(node: Node, x: Value, *, perm: list[int] | None = None) -> Value:
    return x.transpose(perm) if perm else x.T


@op("Concat")
def concat(node: Node, *values: Value, axis: int = 1) -> Value:
    return namespace(*values).concatenate(values, axis)


def split_at(x: Value, sizes: list[int], axis: int) -> tuple[Value, ...]:
    ends = np.cumsum(sizes)
    cut = lambda start, end: x[(slice(None),) * positive_axis(axis, x.ndim) + (slice(start, end),)]
    return tuple(cut(int(end) - size, int(end)) for size, end in zip(sizes, ends, strict=True))


def even_sizes(total: int, parts: int) -> list[int]:
    """Sizes of `parts` pieces, of which the last may be smaller."""
    size = -(-total // parts)
    return [max(min(size, total - i * size), 0) for i in range(parts)]


@op("Split", since=13, shaping=(1,))
def split(
    node: Node, x: Value, sizes: Value = None, *, axis: int = 0, num_outputs: int | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    if sizes is not None:
        return split_at(x, node.ints(sizes, "split"), axis)
    return split_at(x, even_sizes(x.shape[axis], num_outputs or len(node.outputs)), axis)


@op("Split")
def split_1(
    node: Node, x: Value, sizes: Value = None, *, axis: int = 0, split: list[int] | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    given = node.ints(sizes, "split") if sizes is not None else split
    return split_at(x, given or even_sizes(x.shape[axis], len(node.outputs)), axis)


def sliced(x: Value, starts: list[int], ends: list[int], axes: list[int] | None, steps: list[int] | None) -> Value:
    """numpy's slices: out-of-range ends are clamped, negative ones count from the back."""
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        index[axis] = slice(starts[i], ends[i], steps[i] if steps else 1)
    return x[tuple(index)]


@op("Slice", since=10, shaping=(1, 2, 3, 4))
def slice_by_inputs(node: Node, x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    optional = lambda value, what: None if value is None else node.ints(value, what)
    return sliced(x, node.ints(starts, "starts"), node.ints(ends, "ends"), optional(axes, "axes"),
                  optional(steps, "steps"))


@op("Slice")
def slice_by_attributes(
    node: Node, x: Value, *, starts: list[int], ends: list[int], axes: list[int] | None = None,
) -> Value:  # fmt: skip
    return sliced(x, starts, ends, axes, None)


@op("Tile", since=6, shaping=(1,))
def tile(node: Node, x: Value, repeats: Value) -> Value:
    return namespace(x).tile(x, node.ints(repeats, "repeats"))


@op("Tile", shaping=(1, 2))
def tile_1(node: Node, x: Value, tiles: Value, axis: Value) -> Value:
    repeats = [1] * x.ndim
    repeats[node.ints(axis, "axis")[0]] = node.ints(tiles, "tiles")[0]
    return namespace(x).tile(x, repeats)


def padded(x: Value, pads: list[int], axes: list[int], mode: str, value: Value) -> Value:
    """`pads` lists what is added before each axis, then after each; a negative number crops."""
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[i + len(axes)]
    crop = tuple(slice(max(-b, 0), n - max(-a, 0)) for b, a, n in zip(before, after, x.shape, strict=True))
    x, widths = x[crop], [(max(b, 0), max(a, 0)) for b, a in zip(before, after, strict=True)]
    xp = namespace(x, value)
    if mode != "constant":
        return xp.pad(x, widths, mode=mode)
    fill = np.zeros((), x.dtype) if value is None else value.reshape(())
    return xp.pad(x, widths, constant_values=fill)


@op("Pad", since=11, shaping=(1, 3))
def pad(node: Node, x: Value, pads: Value, value: Value = None, axes: Value = None, *, mode: str = "constant") -> Value:
    along = list(range(x.ndim)) if axes is None else node.ints(axes, "axes")
    return padded(x, node.ints(pads, "pads"), along, mode, value)


@op("Pad", since=2)
def pad_2(node: Node, x: Value, *, pads: list[int], mode: str = "constant", value: float = 0.0) -> Value:
    return padded(x, pads, list(range(x.ndim)), mode, np.asarray(value, x.dtype))


@op("Pad")
def pad_1(node: Node, x: Value, *, paddings: list[int], mode: str = "constant", value: float = 0.0) -> Value:
    return padded(x, paddings, list(range(x.ndim)), mode, np.asarray(value, x.dtype))


@op("CenterCropPad", since=18, shaping=(1,))
def center_crop_pad(node: Node, x: Value, shape: Value, *, axes: list[int] | None = None) -> Value:
    """What is cut or added is shared by both sides; an odd one goes to the end."""
    along = list(range(x.ndim)) if axes is None else axes
    more = [target - x.shape[axis] for target, axis in zip(node.ints(shape, "shape"), along, strict=True)]
    before = [n // 2 if n > 0 else -(-n // 2) for n in more]
    return padded(x, before + [n - b for n, b in zip(more, before, strict=True)], along, "constant", None)


@op("DepthToSpace")
def depth_to_space(node: Node, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "DCR":
        y = x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        y = x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3)
    return y.reshape(n, c // b**2, h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(node: Node, x: Value, *, blocksize: int, mode: str = "DCR") -> Value:
    n, c, h, w = x.shape
    b = blocksize
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return x.reshape(n, c, h // b, b, w // b, b).transpose(order).reshape(n, c * b**2, h // b, w // b)


@op("Trilu", since=14)
def trilu(node: Node, x: Value, k: Value = None, *, upper: int = 1) -> Value:
    """The upper or lower triangle, from the `k`-th diagonal on."""
    rows, columns = np.arange(x.shape[-2])[:, None], np.arange(x.shape[-1])
    offset = 0 if k is None else k.reshape(())
    keep = columns - rows >= offset if upper else columns - rows <= offset
    xp = namespace(x, keep)
    return xp.where(keep, x, xp.zeros_like(x))


@op("ReverseSequence", since=10)
def reverse_sequence(node: Node, x: Value, lengths: Value, *, batch_axis: int = 1, time_axis: int = 0) -> Value:
    """The first `lengths[b]` steps of row b backwards, the rest as they are."""
    return reversed_steps(x, lengths, batch_axis, time_axis)


def reversed_steps(x: Value, lengths: Value, batch_axis: int, time_axis: int) -> Value:
    xp = namespace(x, lengths)
    step = np.arange(x.shape[time_axis])
    lengths = lengths[:, None]
    source_BT = xp.where(step < lengths, lengths - 1 - step, step)
    source = source_BT if batch_axis < time_axis else source_BT.T
    sizes = [x.shape[i] if i in (batch_axis, time_axis) else 1 for i in range(x.ndim)]
    return xp.take_along_axis(x, source.reshape(sizes), time_axis)
