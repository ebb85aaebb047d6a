"""What flows along the edges of a graph, and the one rule by which an op chooses numpy or jax.numpy.

A value is *concrete* (a numpy array, strings as objects), or *traced* (a jax array or tracer), or a Python list of
values (an ONNX sequence), or None (an empty optional). An op whose inputs are all concrete computes with numpy, so that
the arithmetic on shapes stays known while `jax.jit` traces; any other computes with jax.numpy.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Value = Any  # np.ndarray | jax.Array | list[Value] | None


def is_concrete(value: Value) -> bool:
    return isinstance(value, np.ndarray)


def namespace(*values: Value) -> ModuleType:
    """numpy where every value is concrete (or absent), else jax.numpy."""
    return np if all(value is None or isinstance(value, np.ndarray) for value in values) else jnp


def known(dtype: Any) -> np.dtype:
    """`dtype` as JAX can hold it now: without x64, int64 is int32 and float64 is float32."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def cast(value: Value, dtype: Any) -> Value:
    """`value` in `dtype`; a traced value gets the nearest dtype that JAX may hold."""
    return value.astype(dtype if is_concrete(value) else known(dtype))


def floating(value: Value) -> bool:
    """Whether the elements are real floating-point numbers, those of ml_dtypes among them."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def integral(value: Value) -> bool:
    return jnp.issubdtype(value.dtype, jnp.integer)


def wide(value: Value) -> Value:
    """`value` in float32 if its own floats are narrower, else as it is: for sums and exponentials."""
    return cast(value, np.float32) if floating(value) and value.dtype.itemsize < 4 else value


def positive_axis(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def aligned(value: Value, axis: int, rank: int) -> Value:
    """A vector as an array of `rank` dimensions that broadcasts along `axis`; a scalar as it is."""
    if value.ndim != 1:
        return value
    return value.reshape([-1 if i == positive_axis(axis, rank) else 1 for i in range(rank)])
