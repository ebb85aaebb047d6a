"""Ragged paged attention: write a run's keys and values into its rows' pages, then attend to all that is there.

Axes: T tokens, R rows, Q queries per row, C visits per chunk, P pages per row, S slots of a page, N query heads,
K KV heads, G query heads per KV head, H head width. A page is `[K, S, H]`: decode then needs no transpose.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.graph import Pages, Run
from jaxinfer.kernels.attention_gpu import NEVER, attend_triton
from jaxinfer.kernels.op import Cut, Op


def init_pages(num_pages: int, page_size: int, kv_heads: int, head_width: int, dtype) -> Pages:
    """Empty pages `[num_pages, K, S, H]` for keys and for values."""
    shape = (num_pages, kv_heads, page_size, head_width)
    return Pages(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write_reference(pages: Pages, k_TKH: jax.Array, v_TKH: jax.Array, run: Run, group: str) -> Pages:
    """Put each token's key and value at its position; padding goes to a page past the end, which drops it."""
    num_pages, _, page_size, _ = pages.k.shape
    position_T = run.position_T
    page_T = run.tables[group][run.row_T, position_T // page_size]
    page_T = jnp.where(run.valid_T, page_T, num_pages)
    put = lambda page, new: page.at[page_T, :, position_T % page_size].set(new.astype(page.dtype), mode="drop")
    return Pages(put(pages.k, k_TKH), put(pages.v, v_TKH))


def write_loop(pages: Pages, k_TKH: jax.Array, v_TKH: jax.Array, run: Run, group: str) -> Pages:
    """Token by token, real ones only. XLA's CPU backend makes a loop of a scatter anyway, and up to JAX 0.10 it
    converts the whole pool to float32 around it: a step of 8 rows took 1.1 s over a pool of 3 GB."""
    page_size = pages.k.shape[2]
    position_T = run.position_T
    page_T = run.tables[group][run.row_T, position_T // page_size]

    def put(t, pages):
        at = (page_T[t], 0, position_T[t] % page_size, 0)
        new = lambda x_TKH, page: x_TKH[t][None, :, None].astype(page.dtype)
        return Pages(lax.dynamic_update_slice(pages.k, new(k_TKH, pages.k), at),
                     lax.dynamic_update_slice(pages.v, new(v_TKH, pages.v), at))

    return lax.fori_loop(0, run.cu_q_lens[-1], put, pages)


write = Op("write", reference=write_reference, fast={"loop": (("cpu",), write_loop)})


def copy_reference(pages: Pages, from_C: jax.Array, to_C: jax.Array) -> Pages:
    """Page `to_C[i]` becomes what page `from_C[i]` was; a pair whose `to_C[i]` is past the end is padding. No page may
    be written twice, nor read by a pair after the one that writes it."""
    put = lambda page: page.at[to_C].set(page[from_C], mode="drop")
    return Pages(put(pages.k), put(pages.v))


def copy_loop(pages: Pages, from_C: jax.Array, to_C: jax.Array) -> Pages:
    """Pair by pair, real ones only and in order, for the reasons of `write_loop`."""
    padding_C = to_C >= pages.k.shape[0]
    order_C = jnp.argsort(padding_C, stable=True)

    def put(i, pages):
        old, new = from_C[order_C[i]], to_C[order_C[i]]
        move = lambda page: lax.dynamic_update_index_in_dim(page, lax.dynamic_index_in_dim(page, old, 0), new, 0)
        return Pages(move(pages.k), move(pages.v))

    return lax.fori_loop(0, (~padding_C).sum(), put, pages)


copy = Op("copy", reference=copy_reference, fast={"loop": (("cpu",), copy_loop)},
          cut=lambda pages, from_C, to_C: Cut((pages.axes, (), ()), (pages.axes,)))


def _soft_cap(scores, cap):
    return scores if cap is None else cap * jnp.tanh(scores / cap)


def attend_reference(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None):
    """Gathers every page of a token's row for that token, and masks."""
    pages = write(pages, k_TKH, v_TKH, run, group)
    T, N, H = q_TNH.shape
    K, page_size = pages.k.shape[1:3]
    table_TP = run.tables[group][run.row_T]
    gather = lambda page: jnp.moveaxis(page[table_TP], 2, 1).reshape(T, K, -1, H).astype(jnp.float32)
    at_TS, here_T = jnp.arange(table_TP.shape[1] * page_size)[None], run.position_T[:, None]
    seen_TS = (at_TS <= here_T) & run.valid_T[:, None]
    if window is not None:
        seen_TS &= at_TS > here_T - window
    k_TKSH = jnp.where(seen_TS[:, None, :, None], gather(pages.k), 0)
    v_TKSH = jnp.where(seen_TS[:, None, :, None], gather(pages.v), 0)
    q_TKGH = q_TNH.reshape(T, K, N // K, H).astype(pages.k.dtype).astype(jnp.float32)
    scores_TKGS = _soft_cap(jnp.einsum("TKGH,TKSH->TKGS", q_TKGH, k_TKSH) * scale, softcap)
    weights = jax.nn.softmax(jnp.where(seen_TS[:, None, None], scores_TKGS, NEVER), -1)
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


def attend_visits(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None):
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
        out_RQNH = _walk(q_RQNH, pages, run.tables[group][rows], lens_R, kv_lens_R, scale, window, softcap)
        if aligned and len(lens_R) == R:
            return out_RQNH[:, 0], pages
        row_T, nth_T = run.row_T - rows.start, jnp.arange(T) - run.cu_q_lens[run.row_T]
        mine_TNH = out_RQNH[jnp.clip(row_T, 0, len(lens_R) - 1), jnp.clip(nth_T, 0, Q - 1)]
        out_TNH = mine_TNH if out_TNH is None else jnp.where((row_T >= 0)[:, None, None], mine_TNH, out_TNH)
    return out_TNH, pages


def _walk(q_RQNH, pages, table_RP, lens_R, kv_lens_R, scale, window, softcap):
    """The visits of rows that have `lens_R` of Q queries each, the last one at position `kv_lens_R - 1`: out_RQNH."""
    R, Q, N, H = q_RQNH.shape
    _, K, page_size, _ = pages.k.shape
    G, P, dtype = N // K, table_RP.shape[1], pages.k.dtype
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
        page_C = jnp.where(visit_C < ends_R[-1], table_RP[row_C, nth_C], 0)

        take = lambda page: page.at[page_C].get(mode="promise_in_bounds")
        scores = jnp.einsum("CKXH,CKSH->CKXS", q_RKXH[row_C], take(pages.k), preferred_element_type=jnp.float32)
        scores = _soft_cap(scores * scale, softcap).reshape(C, K, G, Q, page_size)
        scores = jnp.where(seen_CQS[:, None, None], scores, NEVER).reshape(C, K, G * Q, page_size)
        owns_RC = (row_C[None] == jnp.arange(R)[:, None]) & (visit_C < ends_R[-1])[None]
        top_new = jnp.maximum(top_RKX, jnp.where(owns_RC[:, :, None, None], scores.max(-1)[None], NEVER).max(1))
        weights = jnp.where(scores > NEVER, jnp.exp(scores - top_new[row_C][..., None]), 0)
        v_CKSH = jnp.where(real_CS[:, None, :, None], take(pages.v), 0)
        out_CKXH = jnp.einsum("CKXS,CKSH->CKXH", weights.astype(dtype), v_CKSH, preferred_element_type=jnp.float32)
        add = lambda x: sum_by_row(x, row_C, owns_RC)
        decay = jnp.exp(top_RKX - top_new)
        return top_new, sum_RKX * decay + add(weights.sum(-1)), out_RKXH * decay[..., None] + add(out_CKXH)

    start = (jnp.full((R, K, G * Q), NEVER), jnp.zeros((R, K, G * Q)), jnp.zeros((R, K, G * Q, H)))
    _, sum_RKX, out_RKXH = lax.fori_loop(0, -(-ends_R[-1] // C), walk, start)
    out_RKXH = out_RKXH / jnp.where(sum_RKX > 0, sum_RKX, 1)[..., None]
    return out_RKXH.reshape(R, K, G, Q, H).transpose(0, 3, 1, 2, 4).reshape(R, Q, N, H)


def chunk_visits(rows: int, queries: int) -> int:
    """Visits per chunk: enough to keep a matmul busy, few enough that a chunk's KV and scores stay in L2."""
    return max(4, min(32, 4 * rows)) if queries == 1 else 4


def attend_by_page(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None):
    """Batch-invariant flash attention: every token reads its own row's pages, one after the other, by itself.

    A token's result depends, to the bit, on its query and its row's pages alone: pages begin where they begin in the
    sequence, and those that a token does not see leave it as it is. The price is KV traffic by the token, not by the
    row: it is taken only where it is forced.
    """
    pages = write(pages, k_TKH, v_TKH, run, group)
    T, N, H = q_TNH.shape
    _, K, page_size, _ = pages.k.shape
    dtype = pages.k.dtype
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
        page_T = jnp.where(open_T, table_TP[:, p], 0)
        take = lambda page: page.at[page_T].get(mode="promise_in_bounds")
        scores = jnp.einsum("TKGH,TKSH->TKGS", q_TKGH, take(pages.k), preferred_element_type=jnp.float32)
        scores = jnp.where(seen_TS[:, None, None], _soft_cap(scores * scale, softcap), NEVER)
        top_new = jnp.maximum(top_TKG, scores.max(-1))
        weights = jnp.where(seen_TS[:, None, None], jnp.exp(scores - top_new[..., None]), 0)
        v_TKSH = jnp.where(seen_TS[:, None, :, None], take(pages.v), 0)
        new = jnp.einsum("TKGS,TKSH->TKGH", weights.astype(dtype), v_TKSH, preferred_element_type=jnp.float32)
        decay = jnp.exp(top_TKG - top_new)
        new = top_new, sum_TKG * decay + weights.sum(-1), out_TKGH * decay[..., None] + new
        keep = lambda new, old: jnp.where(jnp.expand_dims(open_T, tuple(range(1, old.ndim))), new, old)
        return tuple(map(keep, new, carry))

    start = (jnp.full(q_TKGH.shape[:3], NEVER), jnp.zeros(q_TKGH.shape[:3]), jnp.zeros(q_TKGH.shape))
    pages_to = jnp.where(run.valid_T, here_T // page_size + 1, 0).max()
    pages_from = jnp.where(run.valid_T, first_T, pages_to).min()
    _, sum_TKG, out_TKGH = lax.fori_loop(pages_from, pages_to, read, start)
    return (out_TKGH / jnp.where(sum_TKG > 0, sum_TKG, 1)[..., None]).reshape(T, N, H), pages


def cut_heads(q_TNH, k_TKH, v_TKH, pages, run) -> Cut:
    """A KV head and its query heads know nothing of the others."""
    heads = None, "heads"
    return Cut((heads, heads, heads, pages.axes, ()), (heads, pages.axes))


EVERYWHERE = ("cpu", "gpu", "tpu")
attend = Op("attend", reference=attend_reference,
            fast={"triton": (("gpu",), attend_triton), "visits": (EVERYWHERE, attend_visits),
                  "by_page": (EVERYWHERE, attend_by_page)},
            cut=cut_heads)
CHUNKS = {("visits", "cpu"): 0, ("visits", "gpu"): 1, ("visits", "tpu"): 1, ("triton", "gpu"): None}


def chunks(platform: str) -> int | None:
    """Prompt chunks that a step may carry beside its decode rows; 0 keeps prompt and decode steps apart, None is any
    number. It is what the implementation that `attend` would take there can do without padding every row to the
    longest; the CPU, where a step waits for arithmetic and not for weights, gains nothing from sharing one."""
    return CHUNKS.get((attend.choice(platform), platform))
