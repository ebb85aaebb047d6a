"""From logits to tokens, on the device, each row by its own rules.

Axes: R rows, V vocabulary, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.op import LOGITS, Op, devices, whole

INFINITY = 0x7F800000  # its bits


class Draws(NamedTuple):
    """How each row draws. float32: `temperature` (0 is greedy), `top_p` (1 is off), `min_p` (0 is off); int32:
    `top_k` (0 is off), `count` (tokens the request has drawn before); uint32: `seed`.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    count: Any


def order(x: jax.Array) -> jax.Array:
    """float32 -> int32 of the same order, so that thresholds can be searched bit by bit."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # both zeros are 0


def number(key: jax.Array) -> jax.Array:
    """The float32 of that order; infinity where there is none so high or so low."""
    key = jnp.clip(key, -INFINITY, INFINITY)
    return lax.bitcast_convert_type(jnp.where(key < 0, -key | jnp.int32(-(2**31)), key), jnp.float32)


def _threshold(keys_RV: jax.Array, enough: Callable, asked_R: jax.Array) -> jax.Array:
    """Each row's largest key t for which `enough(keys_RV >= t)`, found in 32 passes over V instead of a sort; in none
    where nobody asks. Infinitely low in rows that do not."""
    def halve(_, bounds):
        low_R, high_R = bounds
        middle_R = (low_R >> 1) + (high_R >> 1) + ((low_R | high_R) & 1)  # rounds up and cannot overflow
        ok_R = enough(keys_RV >= middle_R[:, None])
        return jnp.where(ok_R, middle_R, low_R), jnp.where(ok_R, high_R, middle_R - 1)

    limits = (jnp.full(asked_R.shape, limit, jnp.int32) for limit in (-INFINITY, INFINITY))
    return jnp.where(asked_R, lax.fori_loop(0, jnp.where(asked_R.any(), 32, 0), halve, (*limits,))[0], -INFINITY)


def truncate_reference(scaled_RV: jax.Array, top_k_R: jax.Array, top_p_R: jax.Array) -> jax.Array:
    """The least of each row's `scaled_RV`, whose largest is 0, that top-k and after it top-p leave."""
    keys_RV = order(scaled_RV)
    of_k_R = _threshold(keys_RV, lambda above_RV: above_RV.sum(1, dtype=jnp.int32) >= top_k_R, top_k_R > 0)
    weight_RV = jnp.where(keys_RV >= of_k_R[:, None], jnp.exp(scaled_RV), 0)
    most_R = top_p_R * weight_RV.sum(1)
    of_p_R = _threshold(keys_RV, lambda above_RV: jnp.where(above_RV, weight_RV, 0).sum(1) >= most_R, top_p_R < 1)
    return number(jnp.minimum(jnp.maximum(of_k_R, of_p_R), 0))  # the likeliest token always stays


def truncate_triton(*args: jax.Array) -> jax.Array:
    from jaxinfer.kernels import sampling_gpu  # Pallas takes a while to import

    return sampling_gpu.truncate_triton(*args)


truncate = Op("truncate", reference=truncate_reference, fast={
    "triton": (("gpu",), truncate_triton, lambda *_: devices() == 1)})


def _draw(logits_RV: jax.Array, how: Draws) -> jax.Array:
    """Gumbel-max over the tokens that top-k, then top-p, then min-p leave. Ties at a threshold all stay."""
    logits_RV = jnp.minimum(logits_RV, jnp.finfo(jnp.float32).max)  # a certain token, plus infinity, can be subtracted
    peak_R = logits_RV.max(1)
    below_RV = logits_RV - peak_R[:, None]  # no temperature, however small, divides it to infinity minus infinity
    scaled_RV = below_RV / jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
    least_R = truncate(scaled_RV, how.top_k, how.top_p)
    keep_RV = (scaled_RV >= least_R[:, None]) & (jnp.exp(scaled_RV) >= how.min_p[:, None])
    # Not fused into the argmax, where XLA draws it slowly: 8 rows of 49152 take 17 ms of a CPU's time, and took 25.
    noise_RV = lax.optimization_barrier(jax.vmap(partial(_noise, logits_RV.shape[1]))(how.seed, how.count))
    drawn_R = jnp.argmax(jnp.where(keep_RV, scaled_RV + noise_RV, -jnp.inf), 1)
    drawn_R = jnp.where(how.temperature > 0, drawn_R, jnp.argmax(logits_RV, 1)).astype(jnp.int32)
    return jnp.where(peak_R > -jnp.inf, drawn_R, -1)


def _noise(size: int, seed: jax.Array, count: jax.Array) -> jax.Array:
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), (size,))


def _remember(last_S: jax.Array, slot_R: jax.Array, tokens_R: jax.Array) -> jax.Array:
    """A row that could not draw remembers token 0: its next step may be on its way, and must read some token."""
    return last_S.at[slot_R].set(jnp.maximum(tokens_R, 0), mode="drop")


def sample(logits_RV: jax.Array, last_S: jax.Array, slot_R: jax.Array, draws: Draws) -> tuple[jax.Array, jax.Array]:
    """Draw one token per row and remember it in the row's slot: `(last_S, tokens_R)`.

    A row whose slot is past the end of `last_S` is padding or still reading its prompt: nothing is remembered.
    A request's draw depends on its seed and its count alone, never on its neighbours. A row with a NaN, or with no
    token above minus infinity, draws -1; a token at plus infinity is certain.
    """
    return sample_whole(whole(logits_RV, LOGITS), last_S, slot_R, draws)


def sample_whole(logits_RV: jax.Array, last_S: jax.Array, slot_R: jax.Array, draws: Draws
                 ) -> tuple[jax.Array, jax.Array]:
    """`sample` from logits that every device has all of."""
    tokens_R = _draw(logits_RV, draws)
    return _remember(last_S, slot_R, tokens_R), tokens_R


def sample_greedy(logits_RV: jax.Array, last_S: jax.Array, slot_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sample` for a step whose rows are all greedy: an argmax and nothing else."""
    tokens_R = jnp.argmax(logits_RV, -1).astype(jnp.int32)  # of the first NaN, where there is one
    peak_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], -1)[:, 0]
    tokens_R = jnp.where(peak_R > -jnp.inf, tokens_R, -1)
    return _remember(last_S, slot_R, tokens_R), tokens_R
