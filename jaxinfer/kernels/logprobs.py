"""How likely the model held tokens to be, and which it held likelier: what the OpenAI API calls logprobs.

Axes: R rows, V vocabulary, K likeliest tokens, T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.kernels.op import LOGITS, Op, whole
from jaxinfer.request import MOST_LOGPROBS

TOP = MOST_LOGPROBS  # as many as the OpenAI API gives
SLICE = 32  # positions of a prompt whose logits are made at a time
_BLOCK = 128


class Logprobs(NamedTuple):
    """`chosen` f32[R]: each row's log-probability of its token, and `rank` int32[R]: the token's place, 1 the
    likeliest. `top_tokens` int32[R, K] and `top` f32[R, K]: the likeliest tokens, in order. Of equals the lowest
    token is first. A vocabulary smaller than K leaves tokens past its end at minus infinity.
    """

    chosen: Any
    rank: Any
    top_tokens: Any
    top: Any


def _top(logits_V: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The TOP largest and their indices. `lax.top_k` over the whole of V is a full sort on some backends: here it
    sees only the maxima of blocks, and then the blocks with the TOP largest maxima. Nothing in another block can be
    among the TOP, not even by a tie: each of those blocks has something that comes before it."""
    V = logits_V.size
    blocks = -(-V // _BLOCK)
    padded = jnp.pad(logits_V, (0, blocks * _BLOCK - V), constant_values=-jnp.inf).reshape(blocks, _BLOCK)
    chosen = jnp.sort(lax.top_k(padded.max(1), min(TOP, blocks))[1])  # in order, so that ties go to the lowest index
    top_K, place_K = lax.top_k(padded[chosen].reshape(-1), TOP)
    return top_K, chosen[place_K // _BLOCK] * _BLOCK + place_K % _BLOCK


def _logprobs(logits_V: jax.Array, token: jax.Array) -> Logprobs:
    top_K, tokens_K = _top(logits_V)
    peak, chosen = logits_V.max(), logits_V[token]  # not top_K[0]: XLA then takes four times as long on the CPU
    scale = jnp.log(jnp.exp(logits_V - peak).sum())
    earlier_V = jnp.arange(logits_V.size, dtype=jnp.int32) < token
    before_V = (logits_V > chosen) | ((logits_V == chosen) & earlier_V)
    return Logprobs(chosen - peak - scale, before_V.sum(dtype=jnp.int32) + 1, tokens_K, top_K - peak - scale)


def logprobs_reference(logits_RV: jax.Array, tokens_R: jax.Array) -> Logprobs:
    """The log-softmax of each row's float32 logits, at its token and at the likeliest ones."""
    return jax.vmap(_logprobs)(whole(logits_RV, LOGITS).astype(jnp.float32), tokens_R)


logprobs = Op("logprobs", reference=logprobs_reference)


def prompt_logprobs(logits_of: Callable[[jax.Array], jax.Array], x_TD: jax.Array, targets_T: jax.Array,
                    slice: int = SLICE) -> Logprobs:
    """`logprobs` of `targets_T` after each of T positions. `logits_of(x_RD) -> logits_RV` sees `slice` positions at
    a time, so that `[T, V]`, which may be larger than the model, is never held."""
    T = targets_T.size
    cut = lambda x: jnp.pad(x, ((0, -T % slice), *[(0, 0)] * (x.ndim - 1))).reshape(-1, slice, *x.shape[1:])
    found = lax.map(lambda piece: logprobs(logits_of(piece[0]), piece[1]), (cut(x_TD), cut(targets_T)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:T], found)
