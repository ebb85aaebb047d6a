"""Ops that read or make shapes: what they compute stays concrete wherever it can."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import ANY, op
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, is_concrete, namespace, positive_axis

LARGE = 1 << 16  # elements; above, a constant is made on the device


@op("Shape", shapes_only=True)
def shape(node: Node, x: Value, *, start: int = 0, end: int | None = None) -> Value:
    return np.array(x.shape[slice(start, end)], np.int64)


@op("Size", shapes_only=True)
def size(node: Node, x: Value) -> Value:
    return np.asarray(math.prod(x.shape), np.int64)


def reshaped(x: Value, sizes: list[int], allow_zero: bool = False) -> Value:
    """A size of 0 keeps the input's own, unless zero is allowed; -1 is what remains."""
    if not allow_zero:
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(sizes)


@op("Reshape", since=5, shaping=(1,))
def reshape(node: Node, x: Value, shape: Value, *, allowzero: int = 0) -> Value:
    return reshaped(x, node.ints(shape, "shape"), bool(allowzero))


@op("Reshape")
def reshape_1(node: Node, x: Value, *, shape: list[int]) -> Value:
    return reshaped(x, shape)


@op("Flatten")
def flatten(node: Node, x: Value, *, axis: int = 1) -> Value:
    axis = positive_axis(axis, x.ndim)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def squeezed(x: Value, axes: list[int] | None) -> Value:
    return x.reshape([n for i, n in enumerate(x.shape)
                      if (n != 1 if axes is None else i not in {positive_axis(a, x.ndim) for a in axes})])


def unsqueezed(x: Value, axes: list[int]) -> Value:
    rank = x.ndim + len(axes)
    new, sizes = {positive_axis(axis, rank) for axis in axes}, iter(x.shape)
    return x.reshape([1 if i in new else next(sizes) for i in range(rank)])


@op("Squeeze", since=13, shaping=(1,))
def squeeze(node: Node, x: Value, axes: Value = None) -> Value:
    return squeezed(x, None if axes is None else node.ints(axes, "axes"))


@op("Squeeze")
def squeeze_1(node: Node, x: Value, *, axes: list[int] | None = None) -> Value:
    return squeezed(x, axes)


@op("Unsqueeze", since=13, shaping=(1,))
def unsqueeze(node: Node, x: Value, axes: Value) -> Value:
    return unsqueezed(x, node.ints(axes, "axes"))


@op("Unsqueeze")
def unsqueeze_1(node: Node, x: Value, *, axes: list[int]) -> Value:
    return unsqueezed(x, axes)


@op("Expand", since=8, shaping=(1,))
def expand(node: Node, x: Value, shape: Value) -> Value:
    sizes = np.broadcast_shapes(x.shape, tuple(node.ints(shape, "shape")))
    xp = jnp if math.prod(sizes) > LARGE else namespace(x)
    return xp.broadcast_to(x, sizes)


@op("ConstantOfShape", since=9, shaping=(0,))
def constant_of_shape(node: Node, shape: Value, *, value: np.ndarray | None = None) -> Value:
    fill = np.zeros(1, np.float32) if value is None else value
    sizes = node.ints(shape, "input")
    xp = jnp if math.prod(sizes) > LARGE else np
    return xp.full(sizes, fill.reshape(()), fill.dtype)


@op("Range", since=11, shaping=(ANY,))
def arange(node: Node, start: Value, limit: Value, delta: Value, *, stash_type: int = 1) -> Value:
    """start + i * delta; narrow floats are computed in float32."""
    dtype = start.dtype
    first, last, step = (node.array(v, what).astype(np.float64 if dtype.kind not in "iu" else np.int64).item()
                         for v, what in ((start, "start"), (limit, "limit"), (delta, "delta")))
    count = max(math.ceil((last - first) / step), 0)
    return (first + np.arange(count) * step).astype(dtype)


@op("EyeLike", since=9, shapes_only=True)
def eye_like(node: Node, x: Value, *, dtype: int | None = None, k: int = 0) -> Value:
    return np.eye(*x.shape, k=k, dtype=x.dtype if dtype is None else element_type(dtype))


@op("NonZero", since=9, shaping=(0,))
def non_zero(node: Node, x: Value) -> Value:
    return np.array(np.nonzero(np.atleast_1d(node.array(x, "X"))), np.int64)


@op("Unique", since=11, shaping=(0,))
def unique(node: Node, x: Value, *, axis: int | None = None, sorted: int = 1) -> tuple[Value, ...]:
    """Without `sorted`, in the order of first appearance."""
    x = node.array(x, "X")
    values, first, inverse, counts = np.unique(x, True, True, True, axis=axis)
    if not sorted:
        order = np.argsort(first)
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        values, first, counts = np.take(values, order, axis or 0), first[order], counts[order]
        inverse = rank[inverse]
    return values, *(part.reshape(-1).astype(np.int64) for part in (first, inverse, counts))


@op("Compress", since=9, shaping=(1,))
def compress(node: Node, x: Value, condition: Value, *, axis: int | None = None) -> Value:
    chosen = np.flatnonzero(node.array(condition, "condition"))
    if axis is None:
        x, axis = x.reshape(-1), 0
    return namespace(x).take(x, chosen, axis) if is_concrete(x) else jnp.take(x, chosen, axis)
