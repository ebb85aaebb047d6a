"""Quantised numbers: real = (stored - zero point) * scale, per tensor, per axis or per block of an axis."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.ops.convert import to_type
from jaxinfer.frontend.onnx.ops.convolution import convolve, with_bias
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, aligned, cast, known, namespace, positive_axis


def spread(parameter: Value, x: Value, axis: int, block_size: int) -> Value:
    """A scale or zero point, to broadcast over x."""
    if parameter is None or parameter.ndim == 0 or (parameter.size == 1 and not block_size):
        return None if parameter is None else parameter.reshape(())
    axis = positive_axis(axis, x.ndim)
    if block_size:
        xp = namespace(parameter)
        repeated = xp.repeat(parameter, block_size, axis)
        return repeated[(slice(None),) * axis + (slice(0, x.shape[axis]),)]
    return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def whole(dtype: np.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.integer)


def quantised(x: Value, scale: Value, zero: Value, dtype: np.dtype, saturate: bool = True) -> Value:
    """x / scale to the nearest number of `dtype`, halves to the even one; integers stop at their limits."""
    xp, ratio = namespace(x, scale), x / scale
    if not whole(dtype):
        return to_type(ratio, dtype, saturate)
    info = jnp.iinfo(dtype)
    shifted = xp.round(ratio) + (0 if zero is None else cast(cast(zero, np.int32), ratio.dtype))
    return cast(cast(xp.clip(shifted, int(info.min), int(info.max)), np.int32), dtype)


@op("QuantizeLinear", since=10)
def quantize_linear(
    node: Node, x: Value, scale: Value, zero: Value = None, *,
    axis: int = 1, block_size: int = 0, output_dtype: int = 0, precision: int = 0, saturate: int = 1,
) -> Value:  # fmt: skip
    dtype = zero.dtype if zero is not None else element_type(output_dtype) if output_dtype else np.dtype(np.uint8)
    wide = element_type(precision) if precision else np.promote_types(np.float32, np.float32)
    scale, zero = spread(cast(scale, wide), x, axis, block_size), spread(zero, x, axis, block_size)
    return quantised(cast(x, wide), scale, zero, dtype, bool(saturate))


def offset(x: Value, zero: Value) -> Value:
    """x minus its zero point, as int32."""
    x = cast(x, np.int32)
    return x if zero is None else x - cast(zero, np.int32)


@op("DequantizeLinear", since=10)
def dequantize_linear(
    node: Node, x: Value, scale: Value, zero: Value = None, *,
    axis: int = 1, block_size: int = 0, output_dtype: int = 0,
) -> Value:  # fmt: skip
    dtype = element_type(output_dtype) if output_dtype else np.dtype(scale.dtype)
    factor, zero = spread(cast(scale, np.float32), x, axis, block_size), spread(zero, x, axis, block_size)
    number = cast(offset(x, zero), np.float32) if whole(x.dtype) else cast(x, np.float32)
    return cast(number * factor, known(dtype) if namespace(x, scale) is jnp else dtype)


def per_row(zero: Value, rank: int, axis: int) -> Value:
    """A vector of zero points along `axis` of a matrix, to broadcast."""
    return zero if zero is None else aligned(zero, axis, rank)


@op("MatMulInteger", since=10)
def matmul_integer(node: Node, a: Value, b: Value, a_zero: Value = None, b_zero: Value = None) -> Value:
    left = offset(a, per_row(a_zero, a.ndim, -2) if a.ndim > 1 else a_zero)
    right = offset(b, per_row(b_zero, b.ndim, -1))
    return namespace(left, right).matmul(left, right)


@op("QLinearMatMul", since=10)
def qlinear_matmul(
    node: Node, a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value, b_zero: Value,
    y_scale: Value, y_zero: Value,
) -> Value:  # fmt: skip
    product = matmul_integer(node, a, b, a_zero, b_zero)
    factor = cast(per_row(a_scale, a.ndim, -2), np.float32) * cast(per_row(b_scale, b.ndim, -1), np.float32)
    return quantised(cast(product, np.float32) * factor, cast(y_scale, np.float32), y_zero, y_zero.dtype)


def integer_conv(x: Value, w: Value, x_zero: Value, w_zero: Value, **how) -> Value:
    by_filter = w_zero if w_zero is None or w_zero.size == 1 else w_zero.reshape((-1,) + (1,) * (w.ndim - 1))
    by_filter = by_filter.reshape(()) if by_filter is not None and by_filter.size == 1 else by_filter
    return convolve(offset(x, x_zero), offset(w, by_filter), **how)


@op("ConvInteger", since=10)
def conv_integer(
    node: Node, x: Value, w: Value, x_zero: Value = None, w_zero: Value = None, *,
    auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    return integer_conv(x, w, x_zero, w_zero, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads,
                        strides=strides)


@op("QLinearConv", since=10)
def qlinear_conv(
    node: Node, x: Value, x_scale: Value, x_zero: Value, w: Value, w_scale: Value, w_zero: Value,
    y_scale: Value, y_zero: Value, bias: Value = None, *,
    auto_pad: str = "NOTSET", dilations: list[int] | None = None, group: int = 1,
    kernel_shape: list[int] | None = None, pads: list[int] | None = None, strides: list[int] | None = None,
) -> Value:  # fmt: skip
    """The bias is an int32 in units of x_scale * w_scale."""
    product = integer_conv(x, w, x_zero, w_zero, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads,
                           strides=strides)
    factor = x_scale * w_scale
    factor = factor.reshape((-1,) + (1,) * (x.ndim - 2)) if factor.size > 1 else factor.reshape(())
    return quantised(cast(with_bias(product, bias), np.float32) * factor, y_scale, y_zero, y_zero.dtype)
