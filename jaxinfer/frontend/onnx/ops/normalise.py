"""Normalisation by batch, instance, layer, group, root mean square, neighbouring channels; and dropout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.ops.random import key
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, cast, is_concrete, positive_axis


def channels(vector: Value, rank: int) -> Value:
    """A vector of one number per channel, to broadcast over [N, C, spatial...]."""
    return vector.reshape((1, -1) + (1,) * (rank - 2)) if rank > 1 else vector


def normalised(x: Value, scale: Value, bias: Value, mean: Value, variance: Value, epsilon: float) -> Value:
    """One multiplication and one addition per element of x."""
    factor = scale * jax.lax.rsqrt(jnp.asarray(variance) + np.asarray(epsilon, variance.dtype))
    return (x * channels(factor, x.ndim) + channels(bias - mean * factor, x.ndim)).astype(x.dtype)


@op("BatchNormalization", since=14)
def batch_normalization(
    node: Node, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, *,
    epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
) -> Value:  # fmt: skip
    if not training_mode:
        return normalised(x, scale, bias, mean, variance, epsilon)
    axes = tuple(i for i in range(x.ndim) if i != 1)
    now, spread = jnp.mean(x, axes), jnp.var(x, axes)
    blend = lambda old, new: old * np.asarray(momentum, old.dtype) + new * np.asarray(1 - momentum, old.dtype)
    return normalised(x, scale, bias, now, spread, epsilon), blend(mean, now), blend(variance, spread)


@op("BatchNormalization")
def batch_normalization_1(
    node: Node, x: Value, scale: Value, bias: Value, mean: Value, variance: Value, *,
    epsilon: float = 1e-5, momentum: float = 0.9, is_test: int = 0, spatial: int = 1,
) -> Value:  # fmt: skip
    """Until opset 13 a file says by its number of outputs whether it trains; we only infer."""
    if sum(map(bool, node.outputs)) > 1 or not spatial:
        raise node.error("training, and statistics for every position (spatial=0), are not supported")
    return normalised(x, scale, bias, mean, variance, epsilon)


def standardised(x: Value, axes: tuple[int, ...], epsilon: float) -> tuple[Value, Value, Value]:
    """x with mean 0 and variance 1 over `axes`, the mean, and 1 / the standard deviation."""
    mean = jnp.mean(x, axes, keepdims=True)
    centred = x - mean
    inverse = jax.lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + np.asarray(epsilon, x.dtype))
    return centred * inverse, mean, inverse


@op("InstanceNormalization")
def instance_normalization(node: Node, x: Value, scale: Value, bias: Value, *, epsilon: float = 1e-5) -> Value:
    y, _, _ = standardised(x, tuple(range(2, x.ndim)), epsilon)
    return y * channels(scale, x.ndim) + channels(bias, x.ndim)


@op("LayerNormalization", since=17)
def layer_normalization(
    node: Node, x: Value, scale: Value, bias: Value = None, *,
    axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
) -> tuple[Value, ...]:  # fmt: skip
    axes = tuple(range(positive_axis(axis, x.ndim), x.ndim))
    y, mean, inverse = standardised(cast(x, element_type(stash_type)), axes, epsilon)
    y = cast(y, x.dtype) * scale
    return y if bias is None else y + bias, mean, inverse


@op("RMSNormalization", since=23)
def rms_normalization(
    node: Node, x: Value, scale: Value, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1,
) -> Value:  # fmt: skip
    axes, wide = tuple(range(positive_axis(axis, x.ndim), x.ndim)), cast(x, element_type(stash_type))
    inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + np.asarray(epsilon, wide.dtype))
    return cast(wide * inverse, x.dtype) * scale


@op("GroupNormalization", since=21)
def group_normalization(
    node: Node, x: Value, scale: Value, bias: Value, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1,
) -> Value:  # fmt: skip
    wide = cast(x, element_type(stash_type)).reshape(x.shape[0], num_groups, -1)
    y = cast(standardised(wide, (2,), epsilon)[0], x.dtype).reshape(x.shape)
    return y * channels(scale, x.ndim) + channels(bias, x.ndim)


@op("GroupNormalization", since=18)
def group_normalization_18(
    node: Node, x: Value, scale: Value, bias: Value, *, num_groups: int, epsilon: float = 1e-5,
) -> Value:  # fmt: skip
    """Opset 18 has one scale and one bias per group, not per channel."""
    spread = lambda vector: jnp.repeat(vector, x.shape[1] // num_groups)
    return group_normalization(node, x, spread(scale), spread(bias), num_groups=num_groups, epsilon=epsilon)


@op("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node, x: Value, *, axes: list[int] | None = None) -> Value:
    along = tuple(axes or (0, 2, 3))
    centred = x - jnp.mean(x, along, keepdims=True)
    return centred / (jnp.sqrt(jnp.mean(centred**2, along, keepdims=True)) + np.asarray(1e-9, x.dtype))


@op("LpNormalization")
def lp_normalization(node: Node, x: Value, *, axis: int = -1, p: int = 2) -> Value:
    """A vector of zeros stays one."""
    size = jnp.linalg.norm(x, p, axis, keepdims=True) if p == 2 else jnp.sum(jnp.abs(x), axis, keepdims=True)
    return jnp.where(size == 0, 0, x / jnp.where(size == 0, 1, size)).astype(x.dtype)


@op("LRN")
def lrn(node: Node, x: Value, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Value:
    """Divided by a power of the squares in a window of `size` channels."""
    before = (size - 1) // 2
    around = [(before, size - 1 - before) if axis == 1 else (0, 0) for axis in range(x.ndim)]
    window = tuple(size if axis == 1 else 1 for axis in range(x.ndim))
    squares = jax.lax.reduce_window(x * x, np.zeros((), x.dtype), jax.lax.add, window, (1,) * x.ndim, around)
    return x / (bias + alpha / size * squares) ** beta


@op("Dropout", since=12, shaping=(2,))
def dropout(
    node: Node, x: Value, ratio: Value = None, training_mode: Value = None, *, seed: int | None = None,
) -> tuple[Value, Value]:  # fmt: skip
    """Drops only where the model asks to train; the second output says what was kept."""
    training = training_mode is not None and bool(node.array(training_mode, "training_mode"))
    if not training or (is_concrete(ratio) and ratio == 0):
        return x, np.ones(x.shape, bool)
    rate = np.asarray(0.5, x.dtype) if ratio is None else cast(ratio, x.dtype)
    keep = jax.random.uniform(key(node, seed), x.shape) >= rate
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype), keep


@op("Dropout")
def dropout_1(node: Node, x: Value, *, ratio: float = 0.5, is_test: int = 0) -> tuple[Value, Value]:
    ones = np.ones(x.shape, bool) if math.prod(x.shape) < 1 << 20 else jnp.ones(x.shape, bool)
    return x, ones if node.version >= 10 else ones.astype(x.dtype)
