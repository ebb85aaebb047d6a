"""What top-k and top-p leave, on NVIDIA GPUs, written in Pallas for Triton: one program searches a row's thresholds,
two bits at each pass, while the row stays in the second-level cache. A row that asks for neither takes no pass.

Axes: R rows, V vocabulary, B numbers that a program reads at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.kernels.sampling import number
from jaxinfer.kernels.triton import call, load, power, store

BLOCK = 8192
TUNED = 8, 2  # warps, and stages of the loop over a row


def truncate_triton(scaled_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array) -> jax.Array:
    R = len(scaled_RV)
    out = [jax.ShapeDtypeStruct((R,), jnp.float32)]
    return call(_truncate_kernel, TUNED, grid=(R,), out=out)(scaled_RV, top_k_R, top_p_R)[0]


def _truncate_kernel(scaled_ref, top_k_ref, top_p_ref, least_ref):
    r, V = pl.program_id(0), scaled_ref.shape[1]
    b_B = jnp.arange(min(BLOCK, power(V)))
    zero_B, whole = jnp.zeros(b_B.shape, jnp.float32), jnp.int32(-(-V // len(b_B)))

    def over_row(each: Callable, sums: tuple, blocks: jax.Array = whole) -> list[jax.Array]:
        """Sums over the row of what `each` makes of a block; what is past its end is infinitely low."""
        def block(i, sums):
            at_B = i * len(b_B) + b_B
            x_B = jnp.where(at_B < V, load(scaled_ref, r, at_B, mask=at_B < V), -jnp.inf)
            return tuple(total + new for total, new in zip(sums, each(x_B), strict=True))

        return [total.sum() for total in lax.fori_loop(jnp.int32(0), blocks, block, sums)]

    def search(asked, weigh: Callable, most) -> jax.Array:
        """The largest number above which, with it, there is a weight of `most`."""
        def two_bits(i, key):
            step = jnp.left_shift(jnp.int32(1), 30 - 2 * i)
            higher = [key + step * n for n in (1, 2, 3)]  # past infinity they are infinity
            least = [number(at) for at in higher]
            found = over_row(lambda x_B: [jnp.where(x_B >= at, weigh(x_B), 0.0) for at in least], (zero_B,) * 3)
            for at, weight in zip(higher, found, strict=True):
                key = jnp.where(weight >= most, at, key)
            return key

        key = lax.fori_loop(jnp.int32(0), jnp.where(asked, jnp.int32(16), 0), two_bits, jnp.int32(-(2**31)))
        return number(key)

    top_k, top_p = top_k_ref[r], top_p_ref[r]
    of_k = search(top_k > 0, jnp.ones_like, top_k.astype(jnp.float32))
    weigh = lambda x_B: jnp.where(x_B >= of_k, jnp.exp(x_B), 0.0)
    total, = over_row(lambda x_B: [weigh(x_B)], (zero_B,), jnp.where(top_p < 1, whole, 0))
    of_p = search(top_p < 1, weigh, top_p * total)
    store(least_ref, jnp.minimum(jnp.maximum(of_k, of_p), 0.0)[None], r + jnp.arange(1), mask=jnp.ones(1, bool))
