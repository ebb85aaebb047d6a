"""Reductions over axes, which moved from an attribute to an input: ReduceSum at opset 13, the others at 18."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jax.scipy.special
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, cast, integral, namespace, wide

Axes = tuple[int, ...] | None


def total(x: Value, axes: Axes, keep: bool) -> Value:
    return namespace(x).sum(x, axes, keepdims=keep, dtype=x.dtype)


def mean(x: Value, axes: Axes, keep: bool) -> Value:
    if integral(x):
        summed = total(x, axes, keep)
        return summed // (x.size // max(summed.size, 1))
    return namespace(x).mean(x, axes, keepdims=keep, dtype=x.dtype)


def _extreme(name: str, pick: Callable[[Any], Any]) -> Callable[[Value, Axes, bool], Value]:
    """The maximum or minimum; of nothing, the least or greatest number."""

    def run(x: Value, axes: Axes, keep: bool) -> Value:
        xp = namespace(x)
        if x.size:
            return getattr(xp, name)(x, axes, keepdims=keep)
        limit = pick(np.array([-np.inf, np.inf]) if jnp.issubdtype(x.dtype, jnp.floating) else
                     np.array([False, True]) if x.dtype == bool else np.array([*_range(x.dtype)]))
        return getattr(xp, name)(x, axes, keepdims=keep, initial=x.dtype.type(limit))

    return run


def _range(dtype: np.dtype) -> tuple[int, int]:
    return int(jnp.iinfo(dtype).min), int(jnp.iinfo(dtype).max)


def log_sum_exp(x: Value, axes: Axes, keep: bool) -> Value:
    floats = x if jnp.issubdtype(x.dtype, jnp.floating) else cast(x, np.float64)
    return cast(jax.scipy.special.logsumexp(jnp.asarray(wide(floats)), axes, keepdims=keep), x.dtype)


def root(x: Value) -> Value:
    return cast(namespace(x).sqrt(x if jnp.issubdtype(x.dtype, jnp.floating) else cast(x, np.float64)), x.dtype)


def log(x: Value) -> Value:
    return cast(namespace(x).log(x if jnp.issubdtype(x.dtype, jnp.floating) else cast(x, np.float64)), x.dtype)


REDUCTIONS: dict[str, Callable[[Value, Axes, bool], Value]] = {
    "ReduceSum": total,
    "ReduceMean": mean,
    "ReduceProd": lambda x, axes, keep: namespace(x).prod(x, axes, keepdims=keep, dtype=x.dtype),
    "ReduceMax": _extreme("max", lambda limits: limits[0]),
    "ReduceMin": _extreme("min", lambda limits: limits[1]),
    "ReduceL1": lambda x, axes, keep: total(abs(x), axes, keep),
    "ReduceL2": lambda x, axes, keep: root(total(x * x, axes, keep)),
    "ReduceSumSquare": lambda x, axes, keep: total(x * x, axes, keep),
    "ReduceLogSum": lambda x, axes, keep: log(total(x, axes, keep)),
    "ReduceLogSumExp": log_sum_exp,
}


# What an empty list of axes leaves of x, without a reduction (`noop_with_empty_axes`).
ALONE: dict[str, Callable[[Value], Value]] = {
    "ReduceL1": abs, "ReduceL2": abs, "ReduceSumSquare": lambda x: x * x, "ReduceLogSum": log,
}  # fmt: skip


def _register(name: str, function: Callable[[Value, Axes, bool], Value], axes_are_input_since: int) -> None:
    @op(name)
    def by_attribute(node: Node, x: Value, *, axes: list[int] | None = None, keepdims: int = 1) -> Value:
        return function(x, tuple(axes) if axes else None, bool(keepdims))

    @op(name, since=axes_are_input_since, shaping=(1,))
    def by_input(
        node: Node, x: Value, axes: Value = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0,
    ) -> Value:  # fmt: skip
        along = tuple(node.ints(axes, "axes")) if axes is not None else ()
        if not along and noop_with_empty_axes:
            return ALONE.get(name, lambda x: x)(x)
        return function(x, along or None, bool(keepdims))


for _name, _function in REDUCTIONS.items():
    _register(_name, _function, 13 if _name == "ReduceSum" else 18)
