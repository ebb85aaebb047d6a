"""From logits to tokens, on the device, each row by its own rules.

Axes: R rows, V vocabulary, S slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.op import LOGITS, whole


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


def _order(x: jax.Array) -> jax.Array:
    """float32 -> int32 of the same order, so that thresholds can be searched bit by bit."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, -(bits & 0x7FFFFFFF), bits)  # both zeros are 0


def _threshold(keys_V: jax.Array, enough) -> jax.Array:
    """The largest key t for which `enough(keys_V >= t)`; found in 32 passes over V instead of a sort."""
    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)  # rounds up and cannot overflow
        ok = enough(keys_V >= middle)
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    return lax.fori_loop(0, 32, halve, (jnp.int32(limits.min), jnp.int32(limits.max)))[0]


def _draw(logits_V: jax.Array, how: Draws) -> jax.Array:
    """Gumbel-max over the tokens that top-k, then top-p, then min-p leave. Ties at a threshold all stay."""
    logits_V = jnp.minimum(logits_V, jnp.finfo(jnp.float32).max)  # plus infinity, a certain token, can be subtracted
    peak = logits_V.max()
    below_V = logits_V - peak  # so that no temperature, however small, divides to infinity minus infinity
    scaled_V = below_V / jnp.where(how.temperature > 0, how.temperature, 1)
    keys_V = _order(scaled_V)
    k = jnp.where(how.top_k > 0, how.top_k, logits_V.size)
    keep_V = keys_V >= _threshold(keys_V, lambda above_V: above_V.sum(dtype=jnp.int32) >= k)
    probs_V = jax.nn.softmax(jnp.where(keep_V, scaled_V, -jnp.inf))
    mass = _threshold(keys_V, lambda above_V: jnp.where(above_V, probs_V, 0).sum() >= how.top_p)
    keep_V &= (keys_V >= jnp.minimum(mass, keys_V.max())) | (how.top_p >= 1)  # the likeliest token always stays
    keep_V &= probs_V >= how.min_p * probs_V.max()
    key = jax.random.fold_in(jax.random.key(how.seed), how.count)
    # Not fused into the argmax, where XLA draws it slowly: 8 rows of 49152 take 17 ms of a CPU's time, and took 25.
    noise_V = lax.optimization_barrier(jax.random.gumbel(key, scaled_V.shape))
    drawn = jnp.argmax(jnp.where(keep_V, scaled_V + noise_V, -jnp.inf))
    drawn = jnp.where(how.temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)
    return jnp.where(peak > -jnp.inf, drawn, -1)


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
    tokens_R = jax.vmap(_draw)(logits_RV, draws)
    return _remember(last_S, slot_R, tokens_R), tokens_R


def sample_greedy(logits_RV: jax.Array, last_S: jax.Array, slot_R: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`sample` for a step whose rows are all greedy: an argmax and nothing else."""
    tokens_R = jnp.argmax(logits_RV, -1).astype(jnp.int32)  # of the first NaN, where there is one
    peak_R = jnp.take_along_axis(logits_RV, tokens_R[:, None], -1)[:, 0]
    tokens_R = jnp.where(peak_R > -jnp.inf, tokens_R, -1)
    return _remember(last_S, slot_R, tokens_R), tokens_R
