"""Norms and rotary embedding: with matmuls, the ops between attention and attention.

Axes: T tokens, N heads, H head width, D model width. They return float32: the residual stream stays exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.op import Op, shards


def split(x_TO: jax.Array, parts: Sequence[int], axis: str) -> list[jax.Array]:
    """Take apart what a matmul with a leaf of these `parts` gave. Where devices share its logical `axis`, each has its
    own piece of the first part, then of the second: taking them apart moves nothing."""
    T, n = x_TO.shape[0], shards(axis)
    ends = np.cumsum(parts)[:-1] // n
    return [part.reshape(T, -1) for part in jnp.split(x_TO.reshape(T, n, -1), ends, axis=2)]


def _along(x: jax.Array, vector_D: jax.Array) -> jax.Array:
    """A vector in float32, to be applied along the last axis of `x`."""
    return jnp.expand_dims(vector_D.astype(jnp.float32), tuple(range(x.ndim - 1)))


def rms_norm_reference(x: jax.Array, weight: jax.Array, eps: float, offset: float = 0.0) -> jax.Array:
    """Root-mean-square norm over the last axis, times `offset + weight` (Zhang and Sennrich, 2019)."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * (offset + _along(x, weight))


def layer_norm_reference(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Layer norm over the last axis (Ba et al., 2016)."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
    return x * _along(x, weight) + _along(x, bias)


def rope_reference(x_TNH: jax.Array, cos_TH: jax.Array, sin_TH: jax.Array) -> jax.Array:
    """Rotary embedding (Su et al., 2021) of the first `cos_TH.shape[-1]` channels, halves paired as in GPT-NeoX."""
    width = cos_TH.shape[-1]
    turned, rest = x_TNH[..., :width], x_TNH[..., width:]
    first, second = jnp.split(turned, 2, axis=-1)
    turned = turned * cos_TH[:, None] + jnp.concatenate([-second, first], -1) * sin_TH[:, None]
    return jnp.concatenate([turned, rest], -1) if rest.shape[-1] else turned


rms_norm = Op("rms_norm", reference=rms_norm_reference)
layer_norm = Op("layer_norm", reference=layer_norm_reference)
rope = Op("rope", reference=rope_reference)
