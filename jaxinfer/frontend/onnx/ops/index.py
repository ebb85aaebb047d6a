"""Gather and scatter in all their forms, one-hot, top-k, arg-max and running sums."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, cast, integral, is_concrete, known, namespace, positive_axis

INT64 = np.dtype(np.int64)


def from_front(indices: Value, size: int) -> Value:
    """Indices that count from the back, as those from the front."""
    return namespace(indices).where(indices < 0, indices + np.asarray(size, indices.dtype), indices)


def take(x: Value, indices: Value, axis: int) -> Value:
    if is_concrete(x) and is_concrete(indices):
        return np.take(x, indices, axis)
    return jnp.take(x, from_front(indices, x.shape[axis]), axis, mode="clip")


@op("Gather")
def gather(node: Node, x: Value, indices: Value, *, axis: int = 0) -> Value:
    return take(x, indices, axis)


def elements(x: Value, indices: Value, axis: int) -> tuple[Value, ...]:
    """The index of one element of `x` for each of `indices`, which run along `axis`."""
    axis = positive_axis(axis, x.ndim)
    place = list(np.indices(indices.shape, sparse=True))
    place[axis] = from_front(indices, x.shape[axis])
    return tuple(place)


@op("GatherElements", since=11)
def gather_elements(node: Node, x: Value, indices: Value, *, axis: int = 0) -> Value:
    return as_indexable(x, indices)[elements(x, indices, axis)]


def as_indexable(x: Value, indices: Value) -> Value:
    """numpy arrays cannot be indexed by tracers."""
    return x if is_concrete(x) and is_concrete(indices) else jnp.asarray(x)


def points(x: Value, indices: Value, batch_dims: int = 0) -> tuple[Value, ...]:
    """The last axis of `indices` holds coordinates in `x`, behind `batch_dims` axes that both share."""
    lead = indices.shape[:-1]
    grid = np.indices(lead, sparse=True)[:batch_dims] if batch_dims else ()
    return *grid, *(from_front(indices[..., i], x.shape[batch_dims + i]) for i in range(indices.shape[-1]))


@op("GatherND", since=11)
def gather_nd(node: Node, x: Value, indices: Value, *, batch_dims: int = 0) -> Value:
    return as_indexable(x, indices)[points(x, indices, batch_dims)]


def scatter(x: Value, place: Sequence[Value], updates: Value, reduction: str = "none") -> Value:
    """`x` with `updates` put at `place`, or added to, multiplied with, or compared with what is there."""
    if namespace(x, updates, *place) is jnp:
        at = jnp.asarray(x).at[tuple(place)]
        name = {"none": "set", "mul": "multiply"}.get(reduction, reduction)
        return getattr(at, name)(cast(updates, x.dtype))
    y, names = x.copy(), {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
    if reduction == "none":
        y[tuple(place)] = updates
    else:
        names[reduction].at(y, tuple(place), updates)
    return y


@op("Scatter", "ScatterElements", since=9)
def scatter_elements(
    node: Node, x: Value, indices: Value, updates: Value, *, axis: int = 0, reduction: str = "none",
) -> Value:  # fmt: skip
    return scatter(x, elements(x, indices, axis), updates, reduction)


@op("ScatterND", since=11)
def scatter_nd(node: Node, x: Value, indices: Value, updates: Value, *, reduction: str = "none") -> Value:
    return scatter(x, points(x, indices), updates, reduction)


@op("TensorScatter", since=24)
def tensor_scatter(
    node: Node, past: Value, update: Value, write: Value = None, *, axis: int = -2, mode: str = "linear",
) -> Value:  # fmt: skip
    """Row b of `update` is written into row b of the cache at `write[b]`, around its end if `mode` is circular."""
    axis, rows = positive_axis(axis, past.ndim), past.shape[0]
    start = np.zeros(rows, np.int32) if write is None else write
    step = start[:, None] + np.arange(update.shape[axis], dtype=start.dtype)
    step = step % past.shape[axis] if mode == "circular" else step
    place = list(np.indices(update.shape, sparse=True))
    place[axis] = step.reshape([n if i in (0, axis) else 1 for i, n in enumerate(update.shape)])
    return scatter(past, place, update)


@op("OneHot", since=9, shaping=(1,))
def one_hot(node: Node, indices: Value, depth: Value, values: Value, *, axis: int = -1) -> Value:
    """Indices outside of [-depth, depth) light nothing."""
    count, rank = node.ints(depth, "depth")[0], indices.ndim + 1
    axis, xp = positive_axis(axis, rank), namespace(indices, values)
    place = np.arange(count).reshape([count if i == axis else 1 for i in range(rank)])
    wanted = cast(xp.expand_dims(indices, axis), INT64)
    return xp.where((wanted == place) | (wanted + count == place), values[1], values[0])


def argmax(x: Value, axis: int, keepdims: int, last: int) -> Value:
    xp = namespace(x)
    place = x.shape[axis] - 1 - xp.argmax(xp.flip(x, axis), axis) if last else xp.argmax(x, axis)
    return cast(xp.expand_dims(place, axis) if keepdims else place, INT64)


@op("ArgMax")
def arg_max(node: Node, x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
    return argmax(x, axis, keepdims, select_last_index)


@op("ArgMin")
def arg_min(node: Node, x: Value, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
    return argmax(descending(x), axis, keepdims, select_last_index)


def descending(x: Value) -> Value:
    """The same elements in the opposite order: -x for floats, ~x for integers (whose least has no negative)."""
    return ~x if integral(x) else -x


def top_k(x: Value, count: int, axis: int, largest: int) -> tuple[Value, Value]:
    """Of equal elements the first comes first."""
    if is_concrete(x):
        order = np.take(np.argsort(descending(x) if largest else x, axis, kind="stable"), np.arange(count), axis)
        return np.take_along_axis(x, order, axis), order.astype(INT64)
    moved = jnp.moveaxis(x, axis, -1)
    values, order = jax.lax.top_k(moved if largest else descending(moved), count)
    back = lambda y: jnp.moveaxis(y, -1, axis)
    return back(values if largest else descending(values)), back(order).astype(known(INT64))


@op("TopK", since=10, shaping=(1,))
def top_k_by_input(
    node: Node, x: Value, k: Value, *, axis: int = -1, largest: int = 1, sorted: int = 1,
) -> tuple[Value, Value]:  # fmt: skip
    return top_k(x, node.ints(k, "K")[0], axis, largest)


@op("TopK")
def top_k_by_attribute(node: Node, x: Value, *, k: int, axis: int = -1) -> tuple[Value, Value]:
    return top_k(x, k, axis, 1)


def running(name: str, x: Value, axis: int, exclusive: int, reverse: int) -> Value:
    """Running sums or products; exclusive ones leave out the element itself."""
    xp = namespace(x)
    x = xp.flip(x, axis) if reverse else x
    if exclusive:
        first = xp.full_like(x[(slice(None),) * (axis % x.ndim) + (slice(0, 1),)], 1 if name == "cumprod" else 0)
        x = xp.concatenate([first, x[(slice(None),) * (axis % x.ndim) + (slice(0, -1),)]], axis)
    y = getattr(xp, name)(x, axis, dtype=x.dtype)
    return xp.flip(y, axis) if reverse else y


@op("CumSum", since=11, shaping=(1,))
def cum_sum(node: Node, x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Value:
    return running("cumsum", x, node.ints(axis, "axis")[0], exclusive, reverse)


@op("CumProd", since=26, shaping=(1,))
def cum_prod(node: Node, x: Value, axis: Value, *, exclusive: int = 0, reverse: int = 0) -> Value:
    return running("cumprod", x, node.ints(axis, "axis")[0], exclusive, reverse)
