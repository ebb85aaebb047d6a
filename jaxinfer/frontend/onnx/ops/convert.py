"""Casts between element types, to the bit as ONNX defines them, and reinterpretation."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import onnx
from jax import lax

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.tensors import element_type
from jaxinfer.frontend.onnx.values import Value, cast, floating, is_concrete, known, namespace

FLOAT8 = {np.dtype(t) for t in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2,
                                ml_dtypes.float8_e5m2fnuz)}
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
HALF = 0x400000  # of a float32's fraction
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
SMALL_INTEGERS = {"int2": (2, True), "uint2": (2, False), "int4": (4, True), "uint4": (4, False)}  # bits, signed


def to_type(x: Value, dtype: np.dtype, saturate: bool = True, round_mode: str = "up") -> Value:
    """`x` in `dtype`. Floats lose their fraction on the way to integers; float8 saturates at its largest number."""
    if object in (dtype, x.dtype):
        return _text(x, dtype)
    if dtype == E8M0:
        return _exponent(x, saturate, round_mode)
    if dtype in FLOAT8 or dtype == E2M1:
        return _narrow(x, dtype, saturate or dtype == E2M1)
    if dtype.name in SMALL_INTEGERS:
        return _few_bits(x, dtype)
    return cast(x, dtype)


def _text(x: Value, dtype: np.dtype) -> np.ndarray:
    if dtype.kind != "O":
        return x.astype(str).astype(dtype)
    spell = lambda number: number if isinstance(number, str) else str(number)
    return np.array([spell(number) for number in np.asarray(x).reshape(-1)], object).reshape(x.shape)


def _narrow(x: Value, dtype: np.dtype, saturate: bool) -> Value:
    """To float8 or float4: beyond the largest number is that number, or (without `saturate`) infinity or NaN."""
    x = cast(x, np.float32) if x.dtype != np.float64 else x
    if saturate:
        top = float(ml_dtypes.finfo(dtype).max)
        x = namespace(x).clip(x, -top, top)
    return cast(x, dtype)


def _exponent(x: Value, saturate: bool, round_mode: str) -> Value:
    """To float8e8m0, a power of two: rounded up (the default), down, or to the nearest."""
    xp = namespace(x)
    x = cast(x, np.float32)
    bits = x.view(np.uint32) if xp is np else lax.bitcast_convert_type(x, np.uint32)
    exponent, fraction = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    more = {"up": fraction > 0, "down": fraction < 0,
            "nearest": (fraction > HALF) | ((fraction == HALF) & (exponent > 0))}[round_mode]
    raised = xp.minimum(exponent + more, 0xFE if saturate else 0xFF)
    raised = xp.where(exponent == 0xFF, 0xFF, raised).astype(np.uint8)  # NaN stays NaN, infinity becomes it
    return raised.view(E8M0) if is_concrete(raised) else lax.bitcast_convert_type(raised, E8M0)


def _few_bits(x: Value, dtype: np.dtype) -> Value:
    """To an integer of 2 or 4 bits: the low bits of the number without its fraction."""
    bits, signed = SMALL_INTEGERS[dtype.name]
    if floating(x):
        x = namespace(x).trunc(cast(x, np.float32))
    whole = cast(x, np.int32)
    low = whole & (2**bits - 1)
    low = low - ((low >> (bits - 1)) << bits) if signed else low
    return cast(cast(low, np.int8), dtype)


@op("Cast")
def cast_to(node: Node, x: Value, *, to: int | str, saturate: int = 1, round_mode: str = "up") -> Value:
    """Opsets 1 to 5 name the type in words."""
    number = getattr(onnx.TensorProto, to) if isinstance(to, str) else to
    return to_type(x, element_type(number), bool(saturate), round_mode)


@op("CastLike", since=15)
def cast_like(node: Node, x: Value, like: Value, *, saturate: int = 1, round_mode: str = "up") -> Value:
    return to_type(x, np.dtype(like.dtype), bool(saturate), round_mode)


@op("BitCast", since=26)
def bit_cast(node: Node, x: Value, *, to: int) -> Value:
    dtype: Any = element_type(to)
    if is_concrete(x):
        return np.ascontiguousarray(x).view(dtype).reshape(x.shape)
    if bool in (dtype, x.dtype):
        return x.astype(dtype) if x.dtype == bool else x != 0
    return jax.lax.bitcast_convert_type(x, known(dtype))
