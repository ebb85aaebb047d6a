"""Matmul with weights of any kind: an op for arrays, and one for each format of quantised weights.

An op's reference says what the weights stand for. `w8a8` rounds the activations too, to eight bits with a scale for
each token; `w8a16` keeps what that rounding left, in eight bits more. What they compute is exact in its integers, and
a token's result depends on nothing but the token. `gated` is two matmuls of the same activations, and what a gated
feed-forward layer does with them, and `project` a matmul whose result is added to a stream or attended to: of many
tokens, these results a GPU rounds to the weights' dtype.

Axes: T tokens, I inputs, O outputs, G groups of i inputs. Weights are [O, I], the result is float32 [T, O]: the
residual stream stays exact, and only the operands of a matmul are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.kernels.dense import split
from jaxinfer.kernels.op import Op, devices
from jaxinfer.kernels.quantised import FP8, INT4, INT8, Quantised

BATCH = 64  # tokens, up to which a GPU's matmul waits for the weights and not for its arithmetic
SLICE = 256  # outputs whose weights are unpacked at a time
LOW = 2 * INT8.most  # what is left of a number that was rounded is at most a half: 127 of these
LEAST = 1e-30  # the largest number of a token that is more than zeros: one over it is finite


def matmul(x_TI: jax.Array, w_OI: jax.Array | Quantised, *, how: str | None = None) -> jax.Array:
    """`x @ w.T` in float32, by the op for weights of this kind; `how` is one of its implementations."""
    if isinstance(w_OI, Quantised):
        return OPS[w_OI.format](x_TI, w_OI, how=how)
    return matmul_dense(x_TI, w_OI, how=how)


def _dot(x_TI: jax.Array, w_OI: jax.Array, out: Any = jnp.float32) -> jax.Array:
    return jax.lax.dot_general(x_TI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=out)


def _two_rows(x_TI: jax.Array) -> jax.Array:
    """With one row XLA's CPU backend converts a whole weight that is not float32 on every call (80 ms where two rows
    take 6)."""
    return x_TI if x_TI.shape[0] > 1 else jnp.concatenate([x_TI, jnp.zeros_like(x_TI)])


# Arrays.


def _dense(x_TI: jax.Array, w_OI: jax.Array) -> jax.Array:
    """x is rounded to the weight's dtype first."""
    return _dot(x_TI.astype(w_OI.dtype), w_OI)


def _dense_rows(x_TI: jax.Array, w_OI: jax.Array) -> jax.Array:
    return _dense(x_TI, w_OI) if w_OI.dtype == jnp.float32 else _dense(_two_rows(x_TI), w_OI)[: x_TI.shape[0]]


# A few tokens on a GPU.


def takes_few(x_TI: jax.Array, w_OI: jax.Array | Quantised) -> bool:
    """Whether our kernel is for such a matmul: on one device, of numbers of two bytes (or of eight or four bits in the
    place of such), and of whole blocks."""
    O, I = w_OI.shape
    return len(x_TI) <= BATCH and w_OI.dtype.itemsize == 2 and O % 64 == I % 128 == 0 and devices() == 1


def _few(x_TI: jax.Array, w_OI: jax.Array | Quantised, **gate: Any) -> jax.Array:
    from jaxinfer.kernels.matmul_gpu import few  # Pallas takes a while to import

    return few(x_TI, w_OI, **gate)


matmul_dense = Op("matmul", reference=_dense, fast={
    "few": (("gpu",), _few, takes_few), "two_rows": (("cpu",), _dense_rows)})


# A scale for each output: it is applied after the dot, so that XLA's GEMM on a GPU reads the small numbers.


def _weight_only(x_TI: jax.Array, w_OI: Quantised) -> jax.Array:
    """x is rounded to `w.dtype`, which holds the small numbers exactly."""
    return _dot(x_TI.astype(w_OI.dtype), w_OI.values.astype(w_OI.dtype)) * w_OI.scale[None]


def _scaled(x_TI: jax.Array, most: float) -> tuple[jax.Array, jax.Array]:
    """Tokens divided by a scale of their own, so that the largest number of each is `most`; and the scales. A token
    with a NaN or an infinity has a scale that spoils all that becomes of it; one of hardly more than zeros is zeros."""
    x_TI = x_TI.astype(jnp.float32)
    largest_T1 = jnp.max(jnp.abs(x_TI), 1, keepdims=True)
    return x_TI * jnp.where(largest_T1 < LEAST, 0, most / largest_T1), largest_T1 / most


def _w8a16(x_TI: jax.Array, w_OI: Quantised) -> jax.Array:
    """Each token is two rows of int8, and one token the two that XLA's CPU backend wants anyway."""
    x_TI, scale_T1 = _scaled(x_TI, INT8.most)
    high_TI = jnp.round(x_TI)
    low_TI = jnp.round((x_TI - high_TI) * LOW)
    y_TO = _dot(jnp.concatenate([high_TI, low_TI]).astype(jnp.int8), w_OI.values, jnp.int32).astype(jnp.float32)
    high_TO, low_TO = jnp.split(y_TO, 2)
    return (high_TO + low_TO / LOW) * scale_T1 * w_OI.scale[None]


def _w8a8_int8(x_TI: jax.Array, w_OI: Quantised) -> jax.Array:
    x_TI, scale_T1 = _scaled(x_TI, INT8.most)
    y_TO = _dot(_two_rows(jnp.round(x_TI).astype(jnp.int8)), w_OI.values, jnp.int32)[: len(x_TI)]
    return y_TO.astype(jnp.float32) * scale_T1 * w_OI.scale[None]


def _w8a8_fp8(x_TI: jax.Array, w_OI: Quantised, out: Any = jnp.float32) -> jax.Array:
    x_TI, scale_T1 = _scaled(x_TI, FP8.most)
    return _dot(x_TI.astype(w_OI.values.dtype), w_OI.values, out) * scale_T1 * w_OI.scale[None]


# Scales for groups of inputs.


def _grouped(x_TI: jax.Array, w_OI: Quantised) -> jax.Array:
    """x and the weight are rounded to `w.dtype`: for many tokens on a GPU, which unpacks the weight once, then reads it
    as it would another. It waits for x: XLA would unpack all layers' weights at the start of a step."""
    x_TI, w_OI = jax.lax.optimization_barrier((x_TI, w_OI))
    return _dot(x_TI.astype(w_OI.dtype), w_OI.dequantised().astype(w_OI.dtype))


# What XLA's CPU backend would convert whole on every call.


def piece(weight: Any, i: jax.Array, take: Callable[[jax.Array], jax.Array]) -> Any:
    """What `take` gives of each part of a weight in turn `i` of a loop. A piece of fp8 XLA would take of the whole
    weight, converted: bytes are taken, in each turn anew, since XLA would carry their copy out of the loop."""
    def one(part: jax.Array) -> jax.Array:
        if part.dtype != FP8.values:
            return take(part)
        part, _ = jax.lax.optimization_barrier((part, i))
        return jax.lax.bitcast_convert_type(take(jax.lax.bitcast_convert_type(part, jnp.int8)), part.dtype)

    return jax.tree.map(one, weight)


def _in_slices(x_TI: jax.Array, w_OI: Quantised) -> jax.Array:
    """A slice of the outputs at a time, unpacked to float32 in the cache: five to seven times as fast as all at once
    (16.8 M weights and 8 tokens, AVX2: 6 ms for 45 in int4, 8 for 44 in fp8)."""
    O, rows_TI = w_OI.shape[0], _two_rows(x_TI.astype(w_OI.dtype).astype(jnp.float32))
    size = min(SLICE, O)

    def one(i: jax.Array, y_OT: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, O - size)  # the last slice may begin within the one before
        part = piece(w_OI, i, lambda x: jax.lax.dynamic_slice_in_dim(x, start, size))
        y_oT = _dot(part.dequantised(), rows_TI)
        return jax.lax.dynamic_update_slice_in_dim(y_OT, y_oT, start, 0)

    y_OT = jax.lax.fori_loop(0, -(-O // size), one, jnp.zeros((O, len(rows_TI)), jnp.float32))
    return y_OT.T[: len(x_TI)]


matmul_int8 = Op("matmul_int8", reference=_weight_only, fast={
    "few": (("gpu",), _few, takes_few), "w8a16": (("cpu", "tpu"), _w8a16), "weight_only": (("gpu",), _weight_only),
    "w8a8": (("cpu", "gpu", "tpu"), _w8a8_int8)})
matmul_fp8 = Op("matmul_fp8", reference=_weight_only, fast={
    "w8a8": (("gpu",), _w8a8_fp8), "in_slices": (("cpu",), _in_slices)})
matmul_int4 = Op("matmul_int4", reference=_grouped, fast={
    "few": (("gpu",), _few, takes_few), "in_slices": (("cpu",), _in_slices)})
OPS = {INT8.name: matmul_int8, FP8.name: matmul_fp8, INT4.name: matmul_int4}


# Gated.


def _gated(x_TI: jax.Array, w_OI: jax.Array | Quantised, activation: Callable, bias_O: jax.Array | None = None
           ) -> jax.Array:
    return _gate(matmul(x_TI, w_OI), activation, bias_O)


def _gate(y_TO: jax.Array, activation: Callable, bias_O: jax.Array | None) -> jax.Array:
    y_TO = y_TO.astype(jnp.float32) if bias_O is None else y_TO + bias_O.astype(jnp.float32)[None]
    gate_TF, up_TF = split(y_TO, [y_TO.shape[1] // 2] * 2, "ffn")
    return activation(gate_TF) * up_TF


def _gated_rounded(x_TI: jax.Array, w_OI: jax.Array | Quantised, activation: Callable,
                   bias_O: jax.Array | None = None) -> jax.Array:
    return _gate(_rounded(x_TI, w_OI), activation, bias_O)


def _project(x_TI: jax.Array, w_OI: jax.Array | Quantised) -> jax.Array:
    return matmul(x_TI, w_OI)


def _rounded(x_TI: jax.Array, w_OI: jax.Array | Quantised) -> jax.Array:
    """What the matmul gives is rounded to the weight's dtype: what prompts make would otherwise be written and read in
    twice as many bytes (an eighth of a layer's time beside its matmuls, an 8B on an H200)."""
    if isinstance(w_OI, Quantised):
        return _w8a8_fp8(x_TI, w_OI, w_OI.dtype)
    return _dot(x_TI.astype(w_OI.dtype), w_OI, w_OI.dtype).astype(jnp.float32)


def _gated_few(x_TI: jax.Array, w_OI: jax.Array | Quantised, activation: Callable, bias_O: None = None) -> jax.Array:
    return _few(x_TI, w_OI, activation=activation)


def takes_rounded(x_TI: jax.Array, w_OI: jax.Array | Quantised, *_: Any, **__: Any) -> bool:
    """Arrays, and fp8 where its matmul is to round activations too."""
    return not isinstance(w_OI, Quantised) or (w_OI.format == FP8.name and matmul_fp8.choice() == "w8a8")


def in_triton(activation: Callable) -> bool:
    """Whether Pallas has an activation in Triton, where there is no error function."""
    return "erf" not in str(jax.make_jaxpr(activation)(0.0))


def takes_gated_few(x_TI: jax.Array, w_OI: jax.Array | Quantised, activation: Callable,
                    bias_O: jax.Array | None = None) -> bool:
    """What `few` takes, with an activation that Pallas has in Triton."""
    if bias_O is not None or w_OI.shape[0] % 128 or (isinstance(w_OI, Quantised) and w_OI.format == FP8.name):
        return False
    return takes_few(x_TI, w_OI) and in_triton(activation)


def takes_many_rounded(x_TI: jax.Array, w_OI: jax.Array | Quantised) -> bool:
    """A few tokens' results are hardly read: they stay as they are."""
    return len(x_TI) > BATCH and takes_rounded(x_TI, w_OI)


project = Op("project", reference=_project, fast={"rounded": (("gpu",), _rounded, takes_many_rounded)})
gated = Op("gated", reference=_gated, fast={
    "few": (("gpu",), _gated_few, takes_gated_few), "rounded": (("gpu",), _gated_rounded, takes_rounded)})
