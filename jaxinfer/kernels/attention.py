"""Ragged paged attention: write a run's keys and values into its rows' pages, then attend to all that is there.

Axes: T tokens, R rows, Q queries per row, C visits per chunk, P pages per row, S slots of a page, N query heads,
K KV heads, G query heads per KV head, H head width. A page is `[K, S, H]`: decode then needs no transpose. Another
layout (see `graph.Pages`) belongs to the implementation that wants it, and all others can read it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.graph import Pages
from jaxinfer.kernels.attention_tpu import Interleaved, attend_ragged, takes_ragged
from jaxinfer.kernels.op import Cut, Op
from jaxinfer.kernels.pages import write
from jaxinfer.kernels.quantised_pages import FORMATS, QuantisedPages

NEVER = -1e30  # finite: a row that sees nothing yet keeps exp(NEVER - NEVER) away from NaN
TILE = 16  # the least that Triton multiplies


def init_pages(num_pages: int, page_size: int, kv_heads: int, head_width: int, dtype,
               kv_cache_dtype: str | None = None) -> Any:
    """Empty pages for keys and values, in the layout of the implementation that `attend` takes here (see `tracing`):
    two arrays `[num_pages, K, S, H]`, unless it has a better one for these heads. They are in `dtype`, the model's,
    unless `kv_cache_dtype` is another one, or "int8" or "fp8"."""
    shape = (num_pages, kv_heads, page_size, head_width)
    if kv_cache_dtype in FORMATS:
        return QuantisedPages.zeros(shape, FORMATS[kv_cache_dtype], dtype)
    own, dtype = LAYOUTS.get(attend.choice()), kv_cache_dtype or dtype
    if own and own.fits(kv_heads, head_width, dtype):
        return own.zeros(num_pages, page_size, kv_heads, head_width, dtype)
    return Pages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def soft_cap(scores, cap):
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attend_reference(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None, sinks_N=None):
    """Gathers every page of a token's row for that token, and masks. A head's sink is one more score that each of its
    softmaxes sees, of nothing: it takes weight and gives no value (Xiao et al., 2023; learned, as in gpt-oss)."""
    pages = write(pages, k_TKH, v_TKH, run, group)
    T, N, H = q_TNH.shape
    num_pages, K, page_size, _ = pages.shape
    table_TP = jnp.clip(run.tables[group][run.row_T], 0, num_pages - 1)
    flat = lambda x: jnp.moveaxis(x, 2, 1).reshape(T, K, -1, H).astype(jnp.float32)
    k_TKSH, v_TKSH = map(flat, pages.read(table_TP))
    at_TS, here_T = jnp.arange(table_TP.shape[1] * page_size)[None], run.position_T[:, None]
    seen_TS = (at_TS <= here_T) & run.valid_T[:, None]
    if window is not None:
        seen_TS &= at_TS > here_T - window
    k_TKSH, v_TKSH = (jnp.where(seen_TS[:, None, :, None], x_TKSH, 0) for x_TKSH in (k_TKSH, v_TKSH))
    q_TKGH = q_TNH.reshape(T, K, N // K, H).astype(pages.dtype).astype(jnp.float32)
    scores_TKGS = soft_cap(jnp.einsum("TKGH,TKSH->TKGS", q_TKGH, k_TKSH) * scale, softcap)
    scores_TKGS = jnp.where(seen_TS[:, None, None], scores_TKGS, NEVER)
    if sinks_N is not None:
        sinks = jnp.broadcast_to(sinks_N.astype(jnp.float32).reshape(1, K, N // K, 1), (T, K, N // K, 1))
        scores_TKGS = jnp.concatenate([scores_TKGS, sinks], -1)
    weights = jax.nn.softmax(scores_TKGS, -1)[..., :at_TS.shape[1]]
    return jnp.einsum("TKGS,TKSH->TKGH", weights, v_TKSH).reshape(T, N, H), pages


def sum_by_row_reference(x, row_C, owns_RC):
    """Each row's sum of its own visits' x: [C, ...] -> [R, ...]. What is not finite in a visit makes all of its row
    NaN and no other: a plain product with the 0/1 matrix `owns_RC` would put 0 x NaN into every row."""
    beside = lambda mask: jnp.expand_dims(mask, tuple(range(1, x.ndim)))
    broken_C = ~jnp.isfinite(x).all(tuple(range(1, x.ndim)))
    sums = jnp.tensordot(owns_RC.astype(jnp.float32), jnp.where(beside(broken_C), 0, x), 1,
                         precision=lax.Precision.HIGHEST)
    return jnp.where(beside((owns_RC & broken_C[None]).any(1)), jnp.nan, sums)


def sum_by_row_scatter(x, row_C, owns_RC):
    """On the CPU a scatter is a loop, so the order of a sum is fixed, and faster than the product by a tenth at 32
    rows; a GPU would add in any order."""
    R = owns_RC.shape[0]
    return jax.ops.segment_sum(x, jnp.where(owns_RC.any(0), row_C, R), R, indices_are_sorted=True)


sum_by_row = Op("sum_by_row", reference=sum_by_row_reference, fast={"scatter": (("cpu",), sum_by_row_scatter)})


def attend_visits(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None, sinks_N=None):
    """Flash attention over a flat list of visits, one for each (row, page it must read).

    The list is walked C visits at a time, as often as the rows' real lengths ask: the context is no part of the
    bucket, a long row costs its neighbours nothing, and no more than a chunk of KV is ever copied. A chunk of 32
    pages of 64 tokens at 8 rows and context 512 takes 1.5 x the time of contiguous KV on two AVX512 cores; gathering
    whole rows takes 5 x (SmolLM2's shape, float32). The rows of one token have a walk of their own: in the others'
    each would have `longest` queries.
    """
    pages = write(pages, k_TKH, v_TKH, run, group)
    T, R = q_TNH.shape[0], run.kv_lens_R.shape[0]
    aligned = run.longest == 1 and T == R  # token r is row r
    out_TNH = None
    for rows, Q in ((slice(0, run.singles), 1), (slice(run.singles, R), run.longest)):
        if rows.start == rows.stop:
            continue
        start_R, kv_lens_R = run.cu_q_lens[:-1][rows], run.kv_lens_R[rows]
        lens_R = run.cu_q_lens[1:][rows] - start_R
        q_RQNH = q_TNH[rows, None] if aligned else q_TNH[jnp.minimum(start_R[:, None] + jnp.arange(Q)[None], T - 1)]
        out_RQNH = _walk(q_RQNH, pages, run.tables[group][rows], lens_R, kv_lens_R, scale, window, softcap, sinks_N)
        if aligned and len(lens_R) == R:
            return out_RQNH[:, 0], pages
        row_T, nth_T = run.row_T - rows.start, jnp.arange(T) - run.cu_q_lens[run.row_T]
        mine_TNH = out_RQNH[jnp.clip(row_T, 0, len(lens_R) - 1), jnp.clip(nth_T, 0, Q - 1)]
        out_TNH = mine_TNH if out_TNH is None else jnp.where((row_T >= 0)[:, None, None], mine_TNH, out_TNH)
    return out_TNH, pages


def _walk(q_RQNH, pages, table_RP, lens_R, kv_lens_R, scale, window, softcap, sinks_N):
    """The visits of rows that have `lens_R` of Q queries each, the last one at position `kv_lens_R - 1`: out_RQNH."""
    R, Q, N, H = q_RQNH.shape
    _, K, page_size, _ = pages.shape
    G, P, dtype = N // K, table_RP.shape[1], pages.dtype
    nth_RQ = jnp.arange(Q)[None]
    here_RQ = jnp.where(nth_RQ < lens_R[:, None], (kv_lens_R - lens_R)[:, None] + nth_RQ, -1)
    q_RKXH = q_RQNH.astype(dtype).reshape(R, Q, K, G, H).transpose(0, 2, 3, 1, 4).reshape(R, K, G * Q, H)

    first_R = jnp.zeros_like(lens_R)
    if window is not None:
        first_R = jnp.maximum(kv_lens_R - lens_R - window + 1, 0) // page_size
    visits_R = jnp.where(lens_R > 0, -(-kv_lens_R // page_size) - first_R, 0)
    ends_R = jnp.cumsum(visits_R)
    C = min(R * P, chunk_visits(R, Q))

    def walk(i, carry):
        top_RKX, sum_RKX, out_RKXH = carry
        visit_C = i * C + jnp.arange(C)
        row_C = jnp.minimum((ends_R[None] <= visit_C[:, None]).sum(1), R - 1)
        nth_C = jnp.clip(first_R[row_C] + visit_C - (ends_R - visits_R)[row_C], 0, P - 1)
        at_CS = nth_C[:, None] * page_size + jnp.arange(page_size)[None]
        real_CS = (at_CS < kv_lens_R[row_C][:, None]) & (visit_C < ends_R[-1])[:, None]
        seen_CQS = real_CS[:, None] & (at_CS[:, None] <= here_RQ[row_C][:, :, None])
        if window is not None:
            seen_CQS &= at_CS[:, None] > here_RQ[row_C][:, :, None] - window
        k_CKSH, v_CKSH = pages.read(jnp.where(visit_C < ends_R[-1], table_RP[row_C, nth_C], 0))
        scores = _product("CKXH,CKSH->CKXS", q_RKXH[row_C], k_CKSH)
        scores = soft_cap(scores * scale, softcap).reshape(C, K, G, Q, page_size)
        scores = jnp.where(seen_CQS[:, None, None], scores, NEVER).reshape(C, K, G * Q, page_size)
        owns_RC = (row_C[None] == jnp.arange(R)[:, None]) & (visit_C < ends_R[-1])[None]
        top_new = jnp.maximum(top_RKX, jnp.where(owns_RC[:, :, None, None], scores.max(-1)[None], NEVER).max(1))
        weights = jnp.where(scores > NEVER, jnp.exp(scores - top_new[row_C][..., None]), 0)
        v_CKSH = jnp.where(real_CS[:, None, :, None], v_CKSH, 0)
        out_CKXH = _product("CKXS,CKSH->CKXH", weights.astype(dtype), v_CKSH)
        add = lambda x: sum_by_row(x, row_C, owns_RC)
        decay = jnp.exp(top_RKX - top_new)
        return top_new, sum_RKX * decay + add(weights.sum(-1)), out_RKXH * decay[..., None] + add(out_CKXH)

    start = (jnp.full((R, K, G * Q), NEVER), jnp.zeros((R, K, G * Q)), jnp.zeros((R, K, G * Q, H)))
    sinks_KX = None if sinks_N is None else jnp.repeat(sinks_N.reshape(K, G), Q, 1)
    top_RKX, sum_RKX, out_RKXH = lax.fori_loop(0, -(-ends_R[-1] // C), walk, start)
    out_RKXH = _normalise(top_RKX, sum_RKX, out_RKXH, sinks_KX)
    return out_RKXH.reshape(R, K, G, Q, H).transpose(0, 3, 1, 2, 4).reshape(R, Q, N, H)


def _product(axes, x, kv):
    """Queries or softmax weights times keys or values as they were read: quantised ones come in float32."""
    return jnp.einsum(axes, x.astype(kv.dtype), kv, preferred_element_type=jnp.float32)


def _normalise(top, total, out, sinks):
    """Flash attention's last step: `out`, the sum of values weighed by exp(score - top), over `total`, the sum of these
    weights. A sink joins the denominator. What saw nothing is 0."""
    if sinks is not None:
        sinks = sinks.astype(jnp.float32)[None]
        highest = jnp.maximum(top, sinks)
        decay = jnp.exp(top - highest)
        total, out = total * decay + jnp.exp(sinks - highest), out * decay[..., None]
    return out / jnp.where(total > 0, total, 1)[..., None]


def chunk_visits(rows: int, queries: int) -> int:
    """Visits per chunk: enough to keep a matmul busy, few enough that a chunk's KV and scores stay in L2."""
    return max(4, min(32, 4 * rows)) if queries == 1 else 4


def attend_by_page(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None, sinks_N=None):
    """Batch-invariant flash attention: every token reads its own row's pages, one after the other, by itself.

    A token's result depends, to the bit, on its query and its row's pages alone: pages begin where they begin in the
    sequence, and those that a token does not see leave it as it is. The price is KV traffic by the token, not by the
    row: it is taken only where it is forced.
    """
    pages = write(pages, k_TKH, v_TKH, run, group)
    T, N, H = q_TNH.shape
    _, K, page_size, _ = pages.shape
    dtype = pages.dtype
    table_TP, here_T = run.tables[group][run.row_T], run.position_T
    first_T = jnp.zeros_like(here_T) if window is None else jnp.maximum(here_T - window + 1, 0) // page_size
    q_TKGH = q_TNH.astype(dtype).reshape(T, K, N // K, H)

    def read(p, carry):
        top_TKG, sum_TKG, out_TKGH = carry
        open_T = (first_T <= p) & (p <= here_T // page_size) & run.valid_T
        at_TS = p * page_size + jnp.arange(page_size)[None]
        seen_TS = open_T[:, None] & (at_TS <= here_T[:, None])
        if window is not None:
            seen_TS &= at_TS > here_T[:, None] - window
        k_TKSH, v_TKSH = pages.read(jnp.where(open_T, table_TP[:, p], 0))
        scores = _product("TKGH,TKSH->TKGS", q_TKGH, k_TKSH)
        scores = jnp.where(seen_TS[:, None, None], soft_cap(scores * scale, softcap), NEVER)
        top_new = jnp.maximum(top_TKG, scores.max(-1))
        weights = jnp.where(seen_TS[:, None, None], jnp.exp(scores - top_new[..., None]), 0)
        v_TKSH = jnp.where(seen_TS[:, None, :, None], v_TKSH, 0)
        new = _product("TKGS,TKSH->TKGH", weights.astype(dtype), v_TKSH)
        decay = jnp.exp(top_TKG - top_new)
        new = top_new, sum_TKG * decay + weights.sum(-1), out_TKGH * decay[..., None] + new
        keep = lambda new, old: jnp.where(jnp.expand_dims(open_T, tuple(range(1, old.ndim))), new, old)
        return tuple(map(keep, new, carry))

    start = (jnp.full(q_TKGH.shape[:3], NEVER), jnp.zeros(q_TKGH.shape[:3]), jnp.zeros(q_TKGH.shape))
    pages_to = jnp.where(run.valid_T, here_T // page_size + 1, 0).max()
    pages_from = jnp.where(run.valid_T, first_T, pages_to).min()
    sinks_KG = None if sinks_N is None else sinks_N.reshape(K, N // K)
    top_TKG, sum_TKG, out_TKGH = lax.fori_loop(pages_from, pages_to, read, start)
    return _normalise(top_TKG, sum_TKG, out_TKGH, sinks_KG).reshape(T, N, H), pages


def takes_triton(q_TNH, k_TKH, v_TKH, pages, run, **_) -> bool:
    """Pages of the usual layout whose slots and heads fill a tile of Triton's; it wants a power of two of the slots."""
    if not isinstance(pages, Pages | QuantisedPages):
        return False
    slots, width = pages.shape[2:]
    return min(slots, width) >= TILE and slots & (slots - 1) == 0


def attend_triton(*args, **options):
    from jaxinfer.kernels import attention_gpu  # Pallas takes a while to import

    return attention_gpu.attend_triton(*args, **options)


def cut_heads(q_TNH, k_TKH, v_TKH, pages, run) -> Cut:
    """A KV head and its query heads know nothing of the others."""
    heads = None, "heads"
    return Cut((heads, heads, heads, pages.axes, ()), (heads, pages.axes), {"sinks_N": ("heads",)})


EVERYWHERE = ("cpu", "gpu", "tpu")
attend = Op("attend", reference=attend_reference,
            fast={"triton": (("gpu",), attend_triton, takes_triton), "ragged": (("tpu",), attend_ragged, takes_ragged),
                  "visits": (EVERYWHERE, attend_visits), "by_page": (EVERYWHERE, attend_by_page)},
            cut=cut_heads)
LAYOUTS = {"ragged": Interleaved}
CHUNKS = {("visits", "cpu"): 0, ("visits", "gpu"): 1, ("visits", "tpu"): 1, ("triton", "gpu"): None,
          ("ragged", "tpu"): 1}


def chunks(platform: str) -> int | None:
    """Prompt chunks that a step may carry beside its decode rows; 0 keeps prompt and decode steps apart, None is any
    number. It is what the implementation that `attend` would take there can do without padding every row to the
    longest; the CPU, where a step waits for arithmetic and not for weights, gains nothing from sharing one."""
    how = attend.choice(platform)
    return None if how in ("by_page", "reference") else CHUNKS.get((how, platform), CHUNKS["visits", platform])
