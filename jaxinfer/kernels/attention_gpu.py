"""Ragged paged attention on NVIDIA GPUs, written in Pallas for Triton: one kernel for rows of one token, whose pages
are split among blocks where rows are few, and one for rows of many.

Axes: T tokens, R rows, P pages per row, S slots of a page, N query heads, K KV heads, G query heads per KV head,
H head width, C splits of a row's pages, X the queries of a block (tokens x G). Triton wants powers of two: G and H are
padded to one by masks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.graph import Run
from jaxinfer.kernels.attention import NEVER, TILE, soft_cap
from jaxinfer.kernels.quantised_pages import format_of, numbers, rounded
from jaxinfer.kernels.triton import call, dot, exp2, load, power, store
from jaxinfer.kernels.tuned import tuned

LOG2E = math.log2(math.e)
ONE = 4, 1  # warps, and stages of a loop that there is not


class Decode(NamedTuple):
    """Warps, stages of the loop over pages, and the programs that there should be at least, where there are pages
    enough: two for each of an H100's 132 multiprocessors."""

    warps: int = 4
    stages: int = 3
    programs: int = 264


class Prefill(NamedTuple):
    """Queries (tokens x heads) of a block, warps, and stages of the loop over pages."""

    queries: int = 64
    warps: int = 4
    stages: int = 3


def attend_triton(q_TNH, k_TKH, v_TKH, pages, run: Run, *, group, scale, window=None, softcap=None, sinks_N=None):
    """Where all rows have one token, they write its key and value while they read; else all are written first.

    The result is in the pages' dtype, to which the matmul after it rounds anyway where weights are in it too. Scales of
    quantised keys multiply scores, and those of values softmax weights: there are fewer of these than of keys and
    values. Sinks are an argument of the kernels only where there are any: else it is None in them too.
    """
    T, R, table_RP = len(q_TNH), len(run.kv_lens_R), run.tables[group]
    how = dict(scale=scale, window=window, softcap=softcap)
    # XLA makes one kernel of this, and of RoPE before it.
    x_TXH = jnp.concatenate([q_TNH, k_TKH, v_TKH], 1).astype(pages.dtype)
    if run.longest == 1 and T == R:  # token r is row r
        return _decode(x_TXH, pages, run.kv_lens_R, table_RP, sinks_N, **how)
    page_size, position_T = pages.shape[2], run.position_T
    page_T = jnp.where(run.valid_T, table_RP[run.row_T, position_T // page_size], -1)
    pages = _write(x_TXH, pages, page_T, position_T % page_size)
    return _prefill(x_TXH, pages, run, table_RP, sinks_N, **how), pages


def _halves(pages):
    """The array of keys and that of values, each with its scales if there are any."""
    k, v, *scales = pages
    return zip((k, v), scales or (None, None), strict=True)


def _read(half, page, k, seen_S, dtype):
    """The keys or values of one head in a page: x_SH, and its scales; both are zero where the mask is false."""
    ref, scale_ref = half
    (S, H), h_1H = ref.shape[2:], jnp.arange(power(ref.shape[3]))[None]
    s_S, width = jnp.arange(S), True if power(H) == H else h_1H < H
    x_SH = load(ref, page, k, s_S[:, None], h_1H, mask=width if seen_S is True else width & seen_S[:, None])
    if scale_ref is None:
        return x_SH, None
    return numbers(x_SH, dtype), load(scale_ref, page, k, s_S, mask=seen_S).astype(jnp.float32)


def _put(half, x_XH, page, k_X1, slot, real_X1):
    """Write keys or values of X heads into a slot. Returns them as they will be read."""
    (ref, scale_ref), h_1H = half, jnp.arange(x_XH.shape[1])[None]
    put = partial(store, ref, mask=real_X1 & (h_1H < ref.shape[3]))
    if scale_ref is None:
        put(x_XH, page, k_X1, slot, h_1H)
        return x_XH.astype(jnp.float32)
    bits_XH, scale_X = rounded(x_XH, format_of(ref), scale_ref.dtype)
    put(bits_XH, page, k_X1, slot, h_1H)
    store(scale_ref, scale_X, page, k_X1[:, 0], slot, mask=real_X1[:, 0])
    return numbers(bits_XH, jnp.float32) * scale_X.astype(jnp.float32)[:, None]


def _scaled(x_XS, scale_S):
    return x_XS if scale_S is None else x_XS * scale_S[None]


def _unit(scale, softcap):
    """What scores are multiplied by to be in units of log 2: the hardware's exponential is to base 2. They are not as
    they are made, but where it takes a difference of them: two operations for each are one then."""
    return LOG2E if softcap else scale * LOG2E


def _capped(scores, scale, softcap):
    return soft_cap(scores * scale, softcap) if softcap else scores


def _scores(q_XH, k, seen_XS, scale, softcap):
    k_SH, scale_S = k
    scores_XS = _capped(_scaled(dot(q_XH, k_SH, trans_b=True), scale_S), scale, softcap)
    return scores_XS if seen_XS is True else jnp.where(seen_XS, scores_XS, NEVER)


def _add(carry, scores_XS, seen_XS, v, unit):
    """One step of the online softmax (Milakov and Gimelshein, 2018)."""
    v_SH, scale_S = v
    top_X, sum_X, out_XH = carry
    top_new = jnp.maximum(top_X, scores_XS.max(1))
    weights_XS = exp2(scores_XS * unit - (top_new * unit)[:, None])
    weights_XS = weights_XS if seen_XS is True else jnp.where(seen_XS, weights_XS, 0.0)
    decay_X = exp2((top_X - top_new) * unit)
    out_XH = out_XH * decay_X[:, None] + dot(_scaled(weights_XS, scale_S).astype(v_SH.dtype), v_SH)
    return top_new, sum_X * decay_X + weights_XS.sum(1), out_XH


def _with_sink(carry, sink_ref, n_X1, real_X1, unit):
    """The same softmax, which has seen each head's sink too, if there are any: a score that nothing scales or caps, of
    a value of zeros."""
    if sink_ref is None:
        return carry
    top_X, sum_X, out_XH = carry
    sink_X = load(sink_ref, n_X1[:, 0], mask=real_X1[:, 0]).astype(jnp.float32) * (LOG2E / unit)
    top_new = jnp.maximum(top_X, sink_X)
    decay_X = exp2((top_X - top_new) * unit)
    return top_new, sum_X * decay_X + exp2((sink_X - top_new) * unit), out_XH * decay_X[:, None]


def _decode(x_TXH, pages, kv_lens_R, table_RP, sinks_N, *, scale, window, softcap):
    """Rows of one token each: `out_RNH`, and the pages with the tokens' keys and values in them.

    Where rows are few, a row's pages are split among C programs, and what they found is merged by their log-sum-exp.
    """
    (R, P), (_, K, _, H), dtype = table_RP.shape, pages.shape, pages.dtype
    N = x_TXH.shape[1] - 2 * K
    how = tuned(f"decode/2/{H}", Decode())
    C = min(power(P), max(1, power(-(-how.programs // (R * K)))))
    out = [jax.ShapeDtypeStruct((C, R, N, H), dtype if C == 1 else jnp.float32),
           jax.ShapeDtypeStruct((C, R, N), jnp.float32),
           *(jax.ShapeDtypeStruct(page.shape, page.dtype) for page in pages)]
    kernel = partial(_decode_kernel, scale=scale, window=window, softcap=softcap)
    launch = call(kernel, how[:2], grid=(K, R, C), out=out, aliases={3 + i: 2 + i for i in range(len(pages))})
    out_CRNH, size_CRN, *written = launch(kv_lens_R, table_RP, x_TXH, *pages, sinks_N)
    if C == 1:
        return out_CRNH[0], type(pages)(*written)
    merged = [jax.ShapeDtypeStruct((R, N, H), dtype)]
    return call(_merge_kernel, ONE, grid=(R, N), out=merged)(out_CRNH, size_CRN)[0], type(pages)(*written)


def _decode_kernel(kv_len_ref, table_ref, x_ref, *refs, scale, window, softcap):
    """One KV head of one row, and one split of its pages. The last split begins with the new token, which it writes,
    and with the sinks, which count once."""
    k, r, c = (pl.program_id(axis) for axis in range(3))
    sink_ref, out_ref, size_ref, *pages = refs[len(refs) // 2 - 1:]
    (C, _, N, H), (K, S), halves = out_ref.shape, pages[0].shape[1:3], tuple(_halves(pages))
    G = N // K
    g_G1, s_S = jnp.arange(max(TILE, power(G)))[:, None], jnp.arange(S)
    h_1H, n_G1 = jnp.arange(power(H))[None], k * G + g_G1
    heads_G1, width_1H = g_G1 < G, h_1H < H
    here = kv_len_ref[r] - 1  # the new token's position; -1 in a padded row
    first = 0 if window is None else jnp.maximum(here - window + 1, 0) // S
    end = (here + S - 1) // S  # of the pages with what was read before
    each = (end - first + C - 1) // C
    from_page = first + c * each
    to_page = jnp.where(here < 0, 0, jnp.minimum(from_page + each, end))
    is_last = (here >= 0) & (c == C - 1)

    q_GH = load(x_ref, r, n_G1, h_1H, mask=heads_G1 & width_1H)
    new = [load(x_ref, r, head + k, h_1H, mask=width_1H & is_last) for head in (N, N + K)]
    page, slot = table_ref[r, jnp.maximum(here, 0) // S], jnp.maximum(here, 0) % S
    one = lambda value: jnp.broadcast_to(value, (1, 1))
    k_1H, v_1H = (_put(half, x_1H, page, one(k), slot, one(is_last)) for half, x_1H in zip(halves, new, strict=True))
    score_G, unit = _capped((q_GH.astype(jnp.float32) * k_1H).sum(1), scale, softcap), _unit(scale, softcap)
    begin = score_G, jnp.ones_like(score_G), jnp.broadcast_to(v_1H, q_GH.shape)
    begin = _with_sink(begin, sink_ref, n_G1, heads_G1, unit)
    carry = tuple(jnp.where(is_last, x, other) for x, other in zip(begin, (NEVER, 0.0, 0.0), strict=True))

    def read(p, carry):
        page, at_S = table_ref[r, p], p * S + s_S
        seen_S = at_S < here if window is None else (at_S < here) & (at_S > here - window)
        masks = True, seen_S  # a key's score is masked, but NaN times a value's weight of zero is none
        keys, values = (_read(half, page, k, mask, q_GH.dtype) for half, mask in zip(halves, masks, strict=True))
        return _add(carry, _scores(q_GH, keys, seen_S[None], scale, softcap), seen_S[None], values, unit)

    top_G, sum_G, out_GH = lax.fori_loop(from_page, to_page, read, carry)
    sum_G = jnp.where(sum_G > 0, sum_G, 1.0)
    store(out_ref, out_GH / sum_G[:, None], c, r, n_G1, h_1H, mask=heads_G1 & width_1H)
    store(size_ref, top_G * unit + jnp.log2(sum_G), c, r, n_G1[:, 0], mask=heads_G1[:, 0])


def _merge_kernel(out_ref, size_ref, merged_ref):
    """What all splits found for one head of one row."""
    (r, n), (C, *_, H) = (pl.program_id(axis) for axis in range(2)), out_ref.shape
    c_C, h_H = jnp.arange(C), jnp.arange(power(H))
    size_C = load(size_ref, c_C, r, n, mask=c_C < C)
    weight_C = jnp.exp2(size_C - size_C.max())
    out_CH = load(out_ref, c_C[:, None], r, n, h_H[None], mask=h_H[None] < H)
    store(merged_ref, (out_CH * (weight_C / weight_C.sum())[:, None]).sum(0), r, n, h_H, mask=h_H < H)


def _write(x_TXH, pages, page_T, slot_T):
    """Each token's key and value at its slot of its page; nowhere for page -1."""
    out = [jax.ShapeDtypeStruct(page.shape, page.dtype) for page in pages]
    launch = call(_write_kernel, ONE, grid=page_T.shape, out=out, aliases={3 + i: i for i in range(len(pages))})
    return type(pages)(*launch(page_T, slot_T, x_TXH, *pages))


def _write_kernel(page_ref, slot_ref, x_ref, *refs):
    t, pages, (X, H) = pl.program_id(0), refs[len(refs) // 2:], x_ref.shape[1:]
    K = pages[0].shape[1]
    k_K1, h_1H = jnp.arange(power(K))[:, None], jnp.arange(power(H))[None]
    page, slot, real_K1 = page_ref[t], slot_ref[t], k_K1 < K
    for half, head in zip(_halves(pages), (X - 2 * K, X - K), strict=True):
        x_KH = load(x_ref, t, head + k_K1, h_1H, mask=real_K1 & (h_1H < H))
        _put(half, x_KH, jnp.maximum(page, 0), k_K1, slot, real_K1 & (page >= 0))


def _prefill(x_TXH, pages, run: Run, table_RP, sinks_N, *, scale, window, softcap):
    """Rows of any lengths, whose keys and values are in the pages already: out_TNH. A row's queries are cut into B
    blocks of equal size. What belongs to no row is left as it was."""
    (T, X, H), K, R = x_TXH.shape, pages.shape[1], len(run.kv_lens_R)
    N, how = X - 2 * K, tuned(f"prefill/2/{H}", Prefill())
    tokens = max(TILE, min(how.queries // power(N // K), power(T)))
    lens_R = run.cu_q_lens[1:] - run.cu_q_lens[:-1]
    ends_R = jnp.cumsum(-(-lens_R // tokens))
    b_B = jnp.arange(min(T, -(-T // tokens) + R))[::-1]  # the last blocks of a long row take the longest
    row_B = jnp.minimum((ends_R[None] <= b_B[:, None]).sum(1, dtype=jnp.int32), R - 1)
    nth_B = jnp.where(b_B < ends_R[-1], b_B - ends_R[row_B] - (-lens_R[row_B] // tokens), lens_R[row_B])
    kernel = partial(_prefill_kernel, tokens=tokens, scale=scale, window=window, softcap=softcap)
    out = [jax.ShapeDtypeStruct((T, N, H), pages.dtype)]
    launch = call(kernel, how[1:], grid=(len(b_B), K), out=out)
    return launch(row_B, nth_B, run.cu_q_lens, run.kv_lens_R, table_RP, x_TXH, *pages, sinks_N)[0]


def _prefill_kernel(row_ref, nth_ref, start_ref, kv_len_ref, table_ref, x_ref, *refs, tokens, scale, window, softcap):
    """One block of a row's tokens, and the query heads of one KV head."""
    (b, k), (*pages, sink_ref, out_ref) = (pl.program_id(axis) for axis in range(2)), refs
    r, first_token = row_ref[b], nth_ref[b] * tokens  # past the row's end in a block that is padding
    (N, H), (K, S), halves = out_ref.shape[1:], pages[0].shape[1:3], tuple(_halves(pages))
    G = N // K
    start, count, kv_len = start_ref[r], start_ref[r + 1] - start_ref[r], kv_len_ref[r]
    x_X1, s_S, h_1H = jnp.arange(tokens * power(G))[:, None], jnp.arange(S), jnp.arange(power(H))[None]
    nth_X1, g_X1 = first_token + x_X1 // power(G), x_X1 % power(G)
    real_XH = (nth_X1 < count) & (g_X1 < G) & (h_1H < H)
    t_X1, n_X1, here_X1 = start + nth_X1, k * G + g_X1, kv_len - count + nth_X1
    earliest, latest = kv_len - count + first_token, kv_len - count + jnp.minimum(first_token + tokens, count) - 1
    first = 0 if window is None else jnp.maximum(earliest - window + 1, 0) // S
    end = jnp.where(first_token < count, latest // S + 1, 0)
    q_XH = load(x_ref, t_X1, n_X1, h_1H, mask=real_XH)
    whole = first if window is not None else jnp.minimum((earliest + 1) // S, end)  # pages that all queries see all of

    def read(p, carry, masked):
        page, *carry = carry
        at_S = p * S + s_S
        seen_XS, real_S = (at_S[None] <= here_X1, at_S <= latest) if masked else (True, True)
        if window is not None:
            seen_XS &= at_S[None] > here_X1 - window
        masks = True, real_S
        keys, values = (_read(half, page, k, mask, q_XH.dtype) for half, mask in zip(halves, masks, strict=True))
        scores_XS = _scores(q_XH, keys, seen_XS, scale, softcap)
        return page_at(p + 1), *_add(carry, scores_XS, seen_XS, values, _unit(scale, softcap))

    # In the carry comes the page's number, read a turn ahead: Triton would wait for it, at every turn (165 us for 145,
    # a prompt of 2,048 on an H200). Rows of one token wait for their pages anyway.
    page_at = lambda p: table_ref[r, jnp.minimum(p, table_ref.shape[1] - 1)]
    X = q_XH.shape[0]
    carry = (jnp.full(X, NEVER, jnp.float32), jnp.zeros(X, jnp.float32), jnp.zeros(q_XH.shape, jnp.float32))
    carry = _with_sink(carry, sink_ref, n_X1, g_X1 < G, _unit(scale, softcap))
    carry = lax.fori_loop(first, whole, partial(read, masked=False), (page_at(first), *carry))
    _, _, sum_X, out_XH = lax.fori_loop(whole, end, partial(read, masked=True), carry)
    store(out_ref, out_XH / jnp.where(sum_X > 0, sum_X, 1.0)[:, None], t_X1, n_X1, h_1H, mask=real_XH)
