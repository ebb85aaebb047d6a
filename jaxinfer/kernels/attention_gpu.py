"""Ragged paged attention on NVIDIA GPUs, written in Pallas for Triton: one kernel for rows of one token, whose pages
are split among blocks where rows are few, and one for rows of many.

Axes: T tokens, R rows, P pages per row, S slots of a page, N query heads, K KV heads, G query heads per KV head,
H head width, C splits of a row's pages, X the queries of a block (tokens x G). Triton wants powers of two: G and H are
padded to one by masks.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.graph import Pages, Run
from jaxinfer.kernels.attention import NEVER, TILE, soft_cap
from jaxinfer.kernels.triton import call as _call
from jaxinfer.kernels.triton import dot as _dot
from jaxinfer.kernels.triton import load as _load
from jaxinfer.kernels.triton import power as _power
from jaxinfer.kernels.triton import store as _store

LOG2E = math.log2(math.e)
BLOCKS = 264  # of decode, at least, where there are pages enough: two for each of an H100's 132 multiprocessors
DECODE, PREFILL, ONE = (4, 3), (4, 2), (4, 1)  # warps, and stages of a kernel's loop
QUERIES = 64  # of a block of many tokens


def attend_triton(q_TNH, k_TKH, v_TKH, pages, run: Run, *, group, scale, window=None, softcap=None):
    """Where all rows have one token, they write its key and value while they read; else all are written first.

    The result is in the pages' dtype: the matmul after it would round to that anyway.
    """
    T, R, table_RP, how = len(q_TNH), len(run.kv_lens_R), run.tables[group], dict(scale=scale, softcap=softcap)
    # XLA makes one kernel of this, and of RoPE before it.
    x_TXH = jnp.concatenate([q_TNH, k_TKH, v_TKH], 1).astype(pages.k.dtype)
    if run.longest == 1 and T == R:  # token r is row r
        return _decode(x_TXH, pages, run.kv_lens_R, table_RP, window=window, **how)
    page_size, position_T = pages.k.shape[2], run.position_T
    page_T = jnp.where(run.valid_T, table_RP[run.row_T, position_T // page_size], -1)
    pages = _write(x_TXH, pages, page_T, position_T % page_size)
    return _prefill(x_TXH, pages, run, table_RP, window=window, **how), pages


def _scores(q_XH, k_SH, seen_XS, scale, softcap):
    """In units of log 2, since the exponential to base 2 is the one that the hardware has."""
    scores_XS = soft_cap(_dot(q_XH, k_SH, trans_b=True) * scale, softcap) * LOG2E
    return scores_XS if seen_XS is True else jnp.where(seen_XS, scores_XS, NEVER)


def _add(carry, scores_XS, seen_XS, v_SH):
    """One step of the online softmax (Milakov and Gimelshein, 2018)."""
    top_X, sum_X, out_XH = carry
    top_new = jnp.maximum(top_X, scores_XS.max(1))
    weights_XS = jnp.exp2(scores_XS - top_new[:, None])
    weights_XS = weights_XS if seen_XS is True else jnp.where(seen_XS, weights_XS, 0.0)
    decay_X = jnp.exp2(top_X - top_new)
    out_XH = out_XH * decay_X[:, None] + _dot(weights_XS.astype(v_SH.dtype), v_SH)
    return top_new, sum_X * decay_X + weights_XS.sum(1), out_XH


def _decode(x_TXH, pages: Pages, kv_lens_R, table_RP, *, scale, window, softcap):
    """Rows of one token each: `out_RNH`, and the pages with the tokens' keys and values in them.

    Where rows are few, a row's pages are split among C programs, and what they found is merged by their log-sum-exp.
    """
    (R, P), K, H, dtype = table_RP.shape, pages.k.shape[1], pages.k.shape[3], pages.k.dtype
    N = x_TXH.shape[1] - 2 * K
    C = min(_power(P), max(1, _power(-(-BLOCKS // (R * K)))))
    out = [jax.ShapeDtypeStruct((C, R, N, H), dtype if C == 1 else jnp.float32),
           jax.ShapeDtypeStruct((C, R, N), jnp.float32),
           *(jax.ShapeDtypeStruct(page.shape, page.dtype) for page in pages)]
    kernel = partial(_decode_kernel, scale=scale, window=window, softcap=softcap)
    call = _call(kernel, DECODE, grid=(K, R, C), out=out, aliases={3: 2, 4: 3})
    out_CRNH, size_CRN, *written = call(kv_lens_R, table_RP, x_TXH, *pages)
    if C == 1:
        return out_CRNH[0], Pages(*written)
    merged = [jax.ShapeDtypeStruct((R, N, H), dtype)]
    return _call(_merge_kernel, ONE, grid=(R, N), out=merged)(out_CRNH, size_CRN)[0], Pages(*written)


def _decode_kernel(kv_len_ref, table_ref, x_ref, _k, _v, out_ref, size_ref, k_pages_ref, v_pages_ref, *,
                   scale, window, softcap):
    """One KV head of one row, and one split of its pages. The last split begins with the new token, and writes it."""
    k, r, c = (pl.program_id(axis) for axis in range(3))
    (C, _, N, H), (K, S) = out_ref.shape, k_pages_ref.shape[1:3]
    G = N // K
    g_G1, s_S = jnp.arange(max(TILE, _power(G)))[:, None], jnp.arange(S)
    h_1H, n_G1 = jnp.arange(_power(H))[None], k * G + g_G1
    heads_G1, width_1H = g_G1 < G, h_1H < H
    here = kv_len_ref[r] - 1  # the new token's position; -1 in a padded row
    first = 0 if window is None else jnp.maximum(here - window + 1, 0) // S
    end = (here + S - 1) // S  # of the pages with what was read before
    each = (end - first + C - 1) // C
    from_page = first + c * each
    to_page = jnp.where(here < 0, 0, jnp.minimum(from_page + each, end))
    is_last = (here >= 0) & (c == C - 1)

    q_GH = _load(x_ref, r, n_G1, h_1H, mask=heads_G1 & width_1H)
    new = [_load(x_ref, r, head + k, h_1H, mask=width_1H & is_last) for head in (N, N + K)]
    page, slot = table_ref[r, jnp.maximum(here, 0) // S], jnp.maximum(here, 0) % S
    for ref, x_1H in zip((k_pages_ref, v_pages_ref), new, strict=True):
        _store(ref, x_1H, page, k, slot, h_1H, mask=width_1H & is_last)
    k_1H, v_1H = (x.astype(jnp.float32) for x in new)
    score_G = soft_cap((q_GH.astype(jnp.float32) * k_1H).sum(1) * scale, softcap) * LOG2E
    carry = (jnp.where(is_last, score_G, NEVER), jnp.where(is_last, jnp.ones_like(score_G), 0.0),
             jnp.where(is_last, jnp.broadcast_to(v_1H, q_GH.shape), 0.0))

    def read(p, carry):
        page, at_S = table_ref[r, p], p * S + s_S
        seen_S = at_S < here if window is None else (at_S < here) & (at_S > here - window)
        k_SH = _load(k_pages_ref, page, k, s_S[:, None], h_1H, mask=True if _power(H) == H else width_1H)
        v_SH = _load(v_pages_ref, page, k, s_S[:, None], h_1H, mask=width_1H & seen_S[:, None])
        return _add(carry, _scores(q_GH, k_SH, seen_S[None], scale, softcap), seen_S[None], v_SH)

    top_G, sum_G, out_GH = lax.fori_loop(from_page, to_page, read, carry)
    sum_G = jnp.where(sum_G > 0, sum_G, 1.0)
    _store(out_ref, out_GH / sum_G[:, None], c, r, n_G1, h_1H, mask=heads_G1 & width_1H)
    _store(size_ref, top_G + jnp.log2(sum_G), c, r, n_G1[:, 0], mask=heads_G1[:, 0])


def _merge_kernel(out_ref, size_ref, merged_ref):
    """What all splits found for one head of one row."""
    (r, n), (C, *_, H) = (pl.program_id(axis) for axis in range(2)), out_ref.shape
    c_C, h_H = jnp.arange(C), jnp.arange(_power(H))
    size_C = _load(size_ref, c_C, r, n, mask=c_C < C)
    weight_C = jnp.exp2(size_C - size_C.max())
    out_CH = _load(out_ref, c_C[:, None], r, n, h_H[None], mask=h_H[None] < H)
    _store(merged_ref, (out_CH * (weight_C / weight_C.sum())[:, None]).sum(0), r, n, h_H, mask=h_H < H)


def _write(x_TXH, pages: Pages, page_T, slot_T) -> Pages:
    """Each token's key and value at its slot of its page; nowhere for page -1."""
    out = [jax.ShapeDtypeStruct(page.shape, page.dtype) for page in pages]
    return Pages(*_call(_write_kernel, ONE, grid=page_T.shape, out=out, aliases={3: 0, 4: 1})(
        page_T, slot_T, x_TXH, *pages))


def _write_kernel(page_ref, slot_ref, x_ref, _k, _v, k_pages_ref, v_pages_ref):
    t, K, (X, H) = pl.program_id(0), k_pages_ref.shape[1], x_ref.shape[1:]
    k_K1, h_1H = jnp.arange(_power(K))[:, None], jnp.arange(_power(H))[None]
    mask = (k_K1 < K) & (h_1H < H)
    page, slot = page_ref[t], slot_ref[t]
    for head, pages_ref in ((X - 2 * K, k_pages_ref), (X - K, v_pages_ref)):
        _store(pages_ref, _load(x_ref, t, head + k_K1, h_1H, mask=mask), jnp.maximum(page, 0), k_K1, slot, h_1H,
               mask=mask & (page >= 0))


def _prefill(x_TXH, pages: Pages, run: Run, table_RP, *, scale, window, softcap):
    """Rows of any lengths, whose keys and values are in the pages already: out_TNH. A row's queries are cut into B
    blocks of QUERIES (tokens x heads). What belongs to no row is left as it was."""
    (T, X, H), K, R = x_TXH.shape, pages.k.shape[1], len(run.kv_lens_R)
    N = X - 2 * K
    tokens = min(max(TILE, QUERIES // _power(N // K)), _power(T))
    lens_R = run.cu_q_lens[1:] - run.cu_q_lens[:-1]
    ends_R = jnp.cumsum(-(-lens_R // tokens))
    b_B = jnp.arange(min(T, -(-T // tokens) + R))[::-1]  # the last blocks of a long row take the longest
    row_B = jnp.minimum((ends_R[None] <= b_B[:, None]).sum(1, dtype=jnp.int32), R - 1)
    nth_B = jnp.where(b_B < ends_R[-1], b_B - ends_R[row_B] - (-lens_R[row_B] // tokens), lens_R[row_B])
    kernel = partial(_prefill_kernel, tokens=tokens, scale=scale, window=window, softcap=softcap)
    out = [jax.ShapeDtypeStruct((T, N, H), pages.k.dtype)]
    call = _call(kernel, PREFILL, grid=(len(b_B), K), out=out)
    return call(row_B, nth_B, run.cu_q_lens, run.kv_lens_R, table_RP, x_TXH, *pages)[0]


def _prefill_kernel(row_ref, nth_ref, start_ref, kv_len_ref, table_ref, x_ref, k_pages_ref, v_pages_ref, out_ref, *,
                    tokens, scale, window, softcap):
    """One block of a row's tokens, and the query heads of one KV head."""
    b, k = pl.program_id(0), pl.program_id(1)
    r, first_token = row_ref[b], nth_ref[b] * tokens  # past the row's end in a block that is padding
    (N, H), (K, S) = out_ref.shape[1:], k_pages_ref.shape[1:3]
    G = N // K
    start, count, kv_len = start_ref[r], start_ref[r + 1] - start_ref[r], kv_len_ref[r]
    x_X1, s_S, h_1H = jnp.arange(tokens * _power(G))[:, None], jnp.arange(S), jnp.arange(_power(H))[None]
    nth_X1, g_X1 = first_token + x_X1 // _power(G), x_X1 % _power(G)
    real_XH = (nth_X1 < count) & (g_X1 < G) & (h_1H < H)
    t_X1, n_X1, here_X1 = start + nth_X1, k * G + g_X1, kv_len - count + nth_X1
    earliest, latest = kv_len - count + first_token, kv_len - count + jnp.minimum(first_token + tokens, count) - 1
    first = 0 if window is None else jnp.maximum(earliest - window + 1, 0) // S
    end = jnp.where(first_token < count, latest // S + 1, 0)
    q_XH = _load(x_ref, t_X1, n_X1, h_1H, mask=real_XH)
    whole = first if window is not None else jnp.minimum((earliest + 1) // S, end)  # pages that all queries see all of

    def read(p, carry, masked):
        page, at_S, width = table_ref[r, p], p * S + s_S, True if _power(H) == H else h_1H < H
        seen_XS, real_SH = True, width
        if masked:
            seen_XS, real_SH = at_S[None] <= here_X1, width & (at_S <= latest)[:, None]
        if window is not None:
            seen_XS &= at_S[None] > here_X1 - window
        k_SH = _load(k_pages_ref, page, k, s_S[:, None], h_1H, mask=width)
        v_SH = _load(v_pages_ref, page, k, s_S[:, None], h_1H, mask=real_SH)
        return _add(carry, _scores(q_XH, k_SH, seen_XS, scale, softcap), seen_XS, v_SH)

    X = q_XH.shape[0]
    carry = (jnp.full(X, NEVER, jnp.float32), jnp.zeros(X, jnp.float32), jnp.zeros(q_XH.shape, jnp.float32))
    carry = lax.fori_loop(first, whole, partial(read, masked=False), carry)
    _, sum_X, out_XH = lax.fori_loop(whole, end, partial(read, masked=True), carry)
    _store(out_ref, out_XH / jnp.where(sum_X > 0, sum_X, 1.0)[:, None], t_X1, n_X1, h_1H, mask=real_XH)
