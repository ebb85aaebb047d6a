"""Arithmetic, comparison and logic, element by element with numpy's broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, cast, integral, is_concrete, namespace

UNARY = {
    "Abs": "abs", "Acos": "arccos", "Acosh": "arccosh", "Asin": "arcsin", "Asinh": "arcsinh", "Atan": "arctan",
    "Atanh": "arctanh", "BitwiseNot": "invert", "Ceil": "ceil", "Cos": "cos", "Cosh": "cosh", "Exp": "exp",
    "Floor": "floor", "IsNaN": "isnan", "Log": "log", "Neg": "negative", "Not": "logical_not", "Round": "round",
    "Sign": "sign", "Sin": "sin", "Sinh": "sinh", "Sqrt": "sqrt", "Tan": "tan", "Tanh": "tanh",
}  # fmt: skip
BINARY = {
    "Add": "add", "Sub": "subtract", "Mul": "multiply", "And": "logical_and", "Or": "logical_or", "Xor": "logical_xor",
    "Equal": "equal", "Greater": "greater", "Less": "less", "GreaterOrEqual": "greater_equal",
    "LessOrEqual": "less_equal", "BitwiseAnd": "bitwise_and", "BitwiseOr": "bitwise_or", "BitwiseXor": "bitwise_xor",
}  # fmt: skip
BROADCAST_SINCE_7 = ["Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less"]


def _named(name: str) -> Callable[..., Value]:
    return lambda *values: getattr(namespace(*values), name)(*values)


def divide(a: Value, b: Value) -> Value:
    """Integers are divided towards zero, as in C; numpy would round down."""
    xp = namespace(a, b)
    if not integral(a):
        return xp.divide(a, b)
    down, rest = xp.floor_divide(a, b), xp.remainder(a, b)
    return (down + ((rest != 0) & ((a < 0) != (b < 0)))).astype(a.dtype)


def power(a: Value, b: Value) -> Value:
    """`a ** b` in the dtype of `a`. A known integer exponent multiplies, which is exact and differentiable at 0."""
    if not is_concrete(a) and is_concrete(b) and b.size == 1 and b.ndim <= a.ndim and b.item() in range(65):
        return lax.integer_pow(a, int(b.item()))
    return cast(namespace(a, b).power(a, b), a.dtype)


def _unary(name: str) -> None:
    op(name)(lambda node, x: _named(UNARY[name])(x))


def _aligned(function: Callable[..., Value]) -> Callable[..., Value]:
    """Opsets 1 to 6: where `broadcast` is 1, the first dimension of `b` is put at `axis` of `a`."""

    def run(node: Node, a: Value, b: Value, *, broadcast: int = 0, axis: int | None = None) -> Value:
        if broadcast and axis is not None and b.ndim:
            b = b.reshape(b.shape + (1,) * (a.ndim - axis % a.ndim - b.ndim))
        return function(a, b)

    return run


def _binary(name: str, function: Callable[..., Value]) -> None:
    if name in BROADCAST_SINCE_7:
        op(name)(_aligned(function))
    op(name, since=7)(lambda node, a, b: function(a, b))


for _name in UNARY:
    _unary(_name)
for _name in BINARY:
    _binary(_name, _named(BINARY[_name]))
_binary("Div", divide)
_binary("Pow", power)


def _variadic(name: str) -> Callable[..., Value]:
    return lambda node, *values: reduce(_named(name), values)


op("Max")(_variadic("maximum"))
op("Min")(_variadic("minimum"))
op("Sum")(_variadic("add"))


@op("Mean")
def mean(node: Node, *values: Value) -> Value:
    total = reduce(_named("add"), values)
    return total / np.asarray(len(values), total.dtype)


@op("Mod", since=10)
def mod(node: Node, a: Value, b: Value, *, fmod: int = 0) -> Value:
    """The sign of the result is the divisor's, or the dividend's where `fmod` is 1."""
    xp = namespace(a, b)
    return (xp.fmod if fmod else xp.remainder)(a, b)


@op("BitShift", since=11)
def bit_shift(node: Node, x: Value, by: Value, *, direction: str) -> Value:
    """Towards the right the sign bit is kept. A shift by the width or more, or by less than nothing, empties x."""
    xp, bits = namespace(x, by), x.dtype.itemsize * 8
    outside, inside = (by < 0) | (by >= bits), xp.clip(by, 0, bits - 1).astype(x.dtype)
    if direction == "LEFT":
        return xp.where(outside, xp.zeros_like(x), xp.left_shift(x, inside))
    gone = xp.zeros_like(x) if jnp.issubdtype(x.dtype, jnp.unsignedinteger) else -(x < 0).astype(x.dtype)
    return xp.where(outside, gone, xp.right_shift(x, inside))


@op("Reciprocal")
def reciprocal(node: Node, x: Value) -> Value:
    return np.asarray(1, x.dtype) / x


@op("IsInf", since=10)
def is_inf(node: Node, x: Value, *, detect_negative: int = 1, detect_positive: int = 1) -> Value:
    xp = namespace(x)
    wanted = ((x > 0) & bool(detect_positive)) | ((x < 0) & bool(detect_negative))
    return xp.isinf(x) & wanted


@op("Where", since=9)
def where(node: Node, condition: Value, x: Value, y: Value) -> Value:
    return namespace(condition, x, y).where(condition, x, y)


def clip(x: Value, low: Value, high: Value) -> Value:
    if low is not None:
        x = namespace(x, low).maximum(x, cast(low, x.dtype))
    return x if high is None else namespace(x, high).minimum(x, cast(high, x.dtype))


@op("Clip", since=11)
def clip_by_inputs(node: Node, x: Value, low: Value = None, high: Value = None) -> Value:
    return clip(x, low, high)


@op("Clip")
def clip_by_attributes(node: Node, x: Value, *, min: float | None = None, max: float | None = None) -> Value:
    bound = lambda limit: None if limit is None else np.asarray(limit, x.dtype)
    return clip(x, bound(min), bound(max))


@op("Erf", since=9)
def erf(node: Node, x: Value) -> Value:
    return jax.scipy.special.erf(x)


@op("Identity")
def identity(node: Node, x: Value) -> Value:
    return x


@op("Det", since=11)
def det(node: Node, x: Value) -> Value:
    return cast(namespace(x).linalg.det(x), x.dtype)


def scalar(number: Any, like: Value) -> np.ndarray:
    """`number` as a concrete scalar in the dtype of `like`."""
    return np.asarray(number, like.dtype)
