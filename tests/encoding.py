"""Runs an Encoder by hand, without a queue: rows of tokens in, states, vectors or logits out; padding holds junk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Encoder, Params, Run
from jaxinfer.kernels.encode import first_R, normalise, pool


class Bucket(NamedTuple):
    """The padded shape of a run: T tokens in all, R rows, L tokens of the longest one."""

    tokens: int
    rows: int
    longest: int


def pack(rows: Sequence[Sequence[int]], bucket: Bucket, junk: int = 0) -> Run:
    """The run of whole `rows`, padded to `bucket` with tokens `junk`."""
    lens = np.array([len(row) for row in rows])
    assert lens.sum() <= bucket.tokens and len(rows) <= bucket.rows and lens.max(initial=0) <= bucket.longest
    tokens_T = np.full(bucket.tokens, junk, np.int32)
    tokens_T[: lens.sum()] = [token for row in rows for token in row]
    lens_R = np.zeros(bucket.rows, np.int32)
    lens_R[: len(rows)] = lens
    cu_q_lens = np.concatenate([[0], np.cumsum(lens_R)]).astype(np.int32)
    return Run(tokens_T, cu_q_lens, lens_R, np.zeros(bucket.rows, np.int32), {}, bucket.longest)


def states_run(encoder: Encoder, params: Params, rows, bucket: Bucket, junk: int = 0, segments=None):
    """The hidden states `[tokens, D]` of each row; `segments` are lists like `rows`."""
    run = pack(rows, bucket, junk)
    args = () if segments is None else (pack(segments, bucket).tokens_T,)
    x_TD = np.asarray(_jitted(encoder.hidden)(params, run, *args))
    return np.split(x_TD, run.cu_q_lens[1 : len(rows) + 1])[: len(rows)]


def encode_run(encoder: Encoder, params: Params, rows, bucket: Bucket, pooling=("mean",), unit=True) -> np.ndarray:
    """One vector for each row: `[rows, D]`, of length one if `unit`."""
    return np.asarray(_jitted(_vectors(encoder.hidden, tuple(pooling), unit))(params, pack(rows, bucket)))[: len(rows)]


def logits_run(encoder: Encoder, params: Params, rows, bucket: Bucket, segments=None) -> list[np.ndarray]:
    """The head's logits of each row, `[C]`, or of its tokens, `[tokens, C]`."""
    run = pack(rows, bucket)
    segment_T = pack(segments or [[0] * len(row) for row in rows], bucket).tokens_T
    logits = np.asarray(_jitted(_logits(encoder.hidden, encoder.head, encoder.head_per_token))(params, run, segment_T))
    if encoder.head_per_token:
        return np.split(logits, run.cu_q_lens[1 : len(rows) + 1])[: len(rows)]
    return list(logits[: len(rows)])


@cache
def _vectors(hidden: Callable, pooling: tuple[str, ...], unit: bool) -> Callable:
    def vectors(params, run):
        x_TD = hidden(params, run)
        x_RD = jnp.concatenate([pool(x_TD, run, how) for how in pooling], 1)
        return normalise(x_RD) if unit else x_RD

    return vectors


@cache
def _logits(hidden: Callable, head: Callable, per_token: bool) -> Callable:
    def logits(params, run, segment_T):
        x_TD = hidden(params, run, segment_T)
        return head(params, x_TD if per_token else x_TD[first_R(run)])

    return logits


_jitted = cache(jax.jit)
