"""Keys and values in eight bits: each head of each token has a scale of its own, so that nothing is calibrated and no
token changes another's numbers. Axes as in `kernels.attention`; X is any number of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.quantised import FP8, INT8, Format

FORMATS = {"int8": INT8, "fp8": FP8}  # of what `ji.load` calls `kv_cache_dtype`
BITS = {INT8: jnp.int8, FP8: jnp.uint8}  # XLA's CPU backend converts a pool of fp8 as a whole to write a slot of it


class QuantisedPages(NamedTuple):
    """One layer's keys and values `[pages, K, S, H]`, int8 or the bits of fp8, and their scales `[pages, K, S]`, which
    are in the dtype of queries and softmax weights."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    axes = None, "heads"
    slot_axis = 2

    @property
    def shape(self) -> tuple[int, ...]:
        return self.k.shape

    @property
    def dtype(self) -> Any:
        return self.k_scale.dtype

    @classmethod
    def rounded(cls, k_XH: jax.Array, v_XH: jax.Array, format: Format, dtype: Any) -> QuantisedPages:
        """Any keys and values, with scales in `dtype`."""
        (k_XH, k_scale_X), (v_XH, v_scale_X) = (rounded(x_XH, format, dtype) for x_XH in (k_XH, v_XH))
        return cls(k_XH, v_XH, k_scale_X, v_scale_X)

    def entries(self, k_TKH: jax.Array, v_TKH: jax.Array) -> QuantisedPages:
        return self.rounded(k_TKH, v_TKH, format_of(self.k), self.dtype)

    def read(self, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        """In float32, which holds them exactly, but for a last bit where scales are in it too."""
        take = lambda pages: pages.at[page].get(mode="promise_in_bounds")
        read = lambda bits, scale: numbers(take(bits), jnp.float32) * take(scale)[..., None].astype(jnp.float32)
        return read(self.k, self.k_scale), read(self.v, self.v_scale)

    @classmethod
    def zeros(cls, shape: tuple[int, ...], format: Format, dtype: Any) -> QuantisedPages:
        bits, scales = (lambda: jnp.zeros(shape, BITS[format])), (lambda: jnp.zeros(shape[:-1], dtype))
        return cls(bits(), bits(), scales(), scales())


def format_of(bits: Any) -> Format:
    return INT8 if bits.dtype == jnp.int8 else FP8


def numbers(bits: jax.Array, dtype: Any) -> jax.Array:
    """What the bits say, without the scale; float32 and bfloat16 hold it exactly."""
    return (bits if bits.dtype == jnp.int8 else lax.bitcast_convert_type(bits, FP8.values)).astype(dtype)


def rounded(x_XH: jax.Array, format: Format, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The bits of the numbers nearest to x over a scale for each H, and that scale in `dtype`. What is not finite makes
    a scale that is not, and so do all of its numbers.

    >>> bits, scale = rounded(jnp.array([[0.5, -1.27], [0.0, 0.0]]), INT8, jnp.float32)
    >>> bits.tolist(), (bits * scale[:, None]).astype(float).round(2).tolist()[1]
    ([[50, -127], [0, 0]], [0.0, 0.0])
    """
    x_XH = x_XH.astype(jnp.float32)
    scale_X = (jnp.abs(x_XH).max(-1) / format.most).astype(dtype)
    held_X = scale_X.astype(jnp.float32)
    inverse_X = jnp.where(held_X >= jnp.finfo(jnp.float32).tiny, 1 / held_X, 0.0)
    ratio_XH = jnp.clip(x_XH * inverse_X[..., None], -format.most, format.most)  # the scale was rounded as well
    if format is INT8:
        return jnp.floor(ratio_XH + 0.5).astype(jnp.int8), scale_X  # Triton knows no other rounding
    return lax.bitcast_convert_type(ratio_XH.astype(FP8.values), jnp.uint8), scale_X
