"""What an encoder needs: attention of each token to the whole of its row, and one vector for each row.

Axes: T tokens, R rows, L tokens of the longest row, N heads, H head width, D model width; Q and S are T or L, of
queries and of what they see. Whatever padding holds, NaN included, reaches no real token and no row's vector.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxinfer.graph import Run
from jaxinfer.kernels.attention import NEVER, sum_by_row
from jaxinfer.kernels.op import Op


def _softmax_attention(q_QNH, k_SNH, v_SNH, seen_QS, bias_NQS, scale):
    """Attention to what is seen, softmax in float32. `v_SNH` is finite where nobody looks."""
    scores_NQS = jnp.einsum("QNH,SNH->NQS", q_QNH, k_SNH, preferred_element_type=jnp.float32) * scale
    if bias_NQS is not None:
        scores_NQS = scores_NQS + bias_NQS
    weights_NQS = jax.nn.softmax(jnp.where(seen_QS[None], scores_NQS, NEVER), -1)
    return jnp.einsum("NQS,SNH->QNH", weights_NQS.astype(v_SNH.dtype), v_SNH, preferred_element_type=jnp.float32)


def attend_rows_reference(q_TNH, k_TNH, v_TNH, run: Run, *, scale: float, bias_NLL=None):
    """Each token attends to the tokens of its own row, before and after it: y_TNH, float32.

    `bias_NLL[:, i, j]` is added to the score of a row's token i for its token j. Every token sees all T tokens through
    a mask.
    """
    row_T, nth_T = run.row_T, run.position_T
    seen_TT = (row_T[:, None] == row_T[None]) & run.valid_T[:, None] & run.valid_T[None]

    def attend_one(q_NH, nth, seen_S):
        bias_NQS = None if bias_NLL is None else bias_NLL[:, nth][:, None, nth_T]
        v_SNH = jnp.where(seen_S[:, None, None], v_TNH, 0)
        return _softmax_attention(q_NH[None], k_TNH, v_SNH, seen_S[None], bias_NQS, scale)[0]

    return jax.vmap(attend_one)(q_TNH, nth_T, seen_TT)


def attend_rows_blocks(q_TNH, k_TNH, v_TNH, run: Run, *, scale: float, bias_NLL=None):
    """Rows stand apart as `[R, L]` blocks for as long as they attend; all else of a model stays flat."""
    T, L = q_TNH.shape[0], run.longest
    start_R, lens_R = run.cu_q_lens[:-1], run.cu_q_lens[1:] - run.cu_q_lens[:-1]
    here_RL = jnp.arange(L)[None] < lens_R[:, None]
    at_RL = jnp.minimum(start_R[:, None] + jnp.arange(L)[None], T - 1)
    block = lambda x_TNH: x_TNH.at[at_RL].get(mode="promise_in_bounds")
    v_RLNH = jnp.where(here_RL[:, :, None, None], block(v_TNH), 0)
    bias_NQS = None if bias_NLL is None else bias_NLL[:, :L, :L]
    attend = lambda q, k, v, here_L: _softmax_attention(q, k, v, here_L[None], bias_NQS, scale)
    y_RLNH = jax.vmap(attend)(block(q_TNH), block(k_TNH), v_RLNH, here_RL)
    return y_RLNH[run.row_T, jnp.minimum(run.position_T, L - 1)]


EVERYWHERE = ("cpu", "gpu", "tpu")
attend_rows = Op("attend_rows", reference=attend_rows_reference, fast={"blocks": (EVERYWHERE, attend_rows_blocks)})


def pool(x_TD: jax.Array, run: Run, how: str = "mean") -> jax.Array:
    """One vector for each row out of its tokens': x_RD, float32; a padded row's is finite.

    `how` is a key of POOLS, in the words of sentence-transformers (Reimers and Gurevych, 2019).
    """
    return POOLS[how](x_TD.astype(jnp.float32), run)


def _lens_R1(run: Run) -> jax.Array:
    return jnp.maximum(run.cu_q_lens[1:] - run.cu_q_lens[:-1], 1).astype(jnp.float32)[:, None]


def _owns_RT(run: Run) -> jax.Array:
    return (run.row_T[None] == jnp.arange(run.kv_lens_R.shape[0])[:, None]) & run.valid_T[None]


def _sum(x_TD: jax.Array, run: Run) -> jax.Array:
    return sum_by_row(jnp.where(run.valid_T[:, None], x_TD, 0), run.row_T, _owns_RT(run))


def _max(x_TD: jax.Array, run: Run) -> jax.Array:
    top_RD = jnp.where(_owns_RT(run)[:, :, None], x_TD[None], NEVER).max(1)
    return jnp.where((run.kv_lens_R > 0)[:, None], top_RD, 0)


def _weighted(x_TD: jax.Array, run: Run) -> jax.Array:
    """Token n of a row, from 1, weighs n (Muennighoff, 2022)."""
    lens_R1 = _lens_R1(run)
    return _sum(x_TD * (run.position_T[:, None] + 1).astype(jnp.float32), run) * 2 / (lens_R1 * (lens_R1 + 1))


def _first(x_TD: jax.Array, run: Run) -> jax.Array:
    return jnp.where((run.kv_lens_R > 0)[:, None], x_TD[first_R(run)], 0)


def _last(x_TD: jax.Array, run: Run) -> jax.Array:
    return jnp.where((run.kv_lens_R > 0)[:, None], x_TD[run.last_R], 0)


POOLS = {
    "mean": lambda x_TD, run: _sum(x_TD, run) / _lens_R1(run),
    "mean_sqrt_len_tokens": lambda x_TD, run: _sum(x_TD, run) * jax.lax.rsqrt(_lens_R1(run)),
    "max": _max,
    "cls": _first,
    "weightedmean": _weighted,
    "lasttoken": _last,
}


def first_R(run: Run) -> jax.Array:
    """The flat index of each row's first token; some token for a padded row."""
    return jnp.minimum(run.cu_q_lens[:-1], run.tokens_T.shape[0] - 1)


def normalise(x_RD: jax.Array) -> jax.Array:
    """Each vector divided by its Euclidean length; a vector of zeros stays one."""
    x_RD = x_RD.astype(jnp.float32)
    return x_RD / jnp.maximum(jnp.linalg.norm(x_RD, axis=-1, keepdims=True), 1e-12)
