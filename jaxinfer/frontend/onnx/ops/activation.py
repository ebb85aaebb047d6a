"""Activations and softmaxes. Always jax.numpy: no shape is ever made from one."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, cast, wide


def celu(x: Value, alpha: float) -> Value:
    return jnp.maximum(x, 0) + jnp.minimum(0, alpha * jnp.expm1(x / alpha))


def elu(x: Value, alpha: float) -> Value:
    return jnp.where(x < 0, alpha * jnp.expm1(jnp.minimum(x, 0)), x)


def hard_sigmoid(x: Value, alpha: float, beta: float) -> Value:
    return jnp.clip(alpha * x + beta, 0, 1)


def leaky_relu(x: Value, alpha: float) -> Value:
    return jnp.where(x < 0, alpha * x, x)


def softplus(x: Value) -> Value:
    return jnp.logaddexp(x, 0)


op("Relu")(lambda node, x: jnp.maximum(x, 0))
op("Sigmoid")(lambda node, x: jax.nn.sigmoid(jnp.asarray(x)))
op("Softplus")(lambda node, x: softplus(x))
op("Softsign")(lambda node, x: x / (1 + jnp.abs(x)))
op("Mish", since=18)(lambda node, x: x * jnp.tanh(softplus(x)))
op("HardSwish", since=14)(lambda node, x: x * hard_sigmoid(x, 1 / 6, 0.5))
op("PRelu")(lambda node, x, slope: jnp.where(x < 0, cast(prelu_slope(node, x, slope), x.dtype) * x, x))


def prelu_slope(node: Node, x: Value, slope: Value) -> Value:
    """Until opset 6 a vector of slopes belongs to the channels."""
    by_channel = node.version < 7 and slope.ndim == 1 and slope.size > 1
    return slope.reshape((-1,) + (1,) * (x.ndim - 2)) if by_channel else slope


@op("Elu")
def elu_op(node: Node, x: Value, *, alpha: float = 1.0) -> Value:
    return elu(x, alpha)


@op("Celu", since=12)
def celu_op(node: Node, x: Value, *, alpha: float = 1.0) -> Value:
    return celu(x, alpha)


@op("Selu")
def selu(node: Node, x: Value, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Value:
    return gamma * elu(x, alpha)


@op("LeakyRelu")
def leaky_relu_op(node: Node, x: Value, *, alpha: float = 0.01) -> Value:
    return leaky_relu(x, alpha)


@op("HardSigmoid")
def hard_sigmoid_op(node: Node, x: Value, *, alpha: float = 0.2, beta: float = 0.5) -> Value:
    return hard_sigmoid(x, alpha, beta)


@op("ThresholdedRelu", since=10)
def thresholded_relu(node: Node, x: Value, *, alpha: float = 1.0) -> Value:
    return jnp.where(x > alpha, x, 0)


@op("Shrink", since=9)
def shrink(node: Node, x: Value, *, bias: float = 0.0, lambd: float = 0.5) -> Value:
    step = np.asarray(bias).astype(x.dtype)
    return jnp.where(x < -lambd, x + step, jnp.where(x > lambd, x - step, 0)).astype(x.dtype)


@op("Gelu", since=20)
def gelu(node: Node, x: Value, *, approximate: str = "none") -> Value:
    return jax.nn.gelu(jnp.asarray(x), approximate=approximate == "tanh")


@op("Swish", since=24)
def swish(node: Node, x: Value, *, alpha: float = 1.0) -> Value:
    x = jnp.asarray(x)
    return x * jax.nn.sigmoid(alpha * x)


def hardmax(x: Value, axis: int) -> Value:
    return jax.nn.one_hot(jnp.argmax(x, axis), x.shape[axis], axis=axis, dtype=x.dtype)


def softmax(x: Value, axis: int) -> Value:
    return jax.nn.softmax(wide(jnp.asarray(x)), axis).astype(x.dtype)


def log_softmax(x: Value, axis: int) -> Value:
    return jax.nn.log_softmax(wide(jnp.asarray(x)), axis).astype(x.dtype)


def _both_axis_rules(name: str, function: Callable[[Value, int], Value]) -> None:
    """Since opset 13 one axis is normalised; before, x became a matrix whose rows began at `axis`."""

    @op(name, since=13)
    def one_axis(node: Node, x: Value, *, axis: int = -1) -> Value:
        return function(x, axis)

    @op(name)
    def flattened(node: Node, x: Value, *, axis: int = 1) -> Value:
        rows = int(np.prod(x.shape[: axis % x.ndim]))
        return function(x.reshape(rows, -1), -1).reshape(x.shape)


_both_axis_rules("Softmax", softmax)
_both_axis_rules("LogSoftmax", log_softmax)
_both_axis_rules("Hardmax", hardmax)
