"""Attention on TPUs: JAX's ragged paged attention kernel, which reads prompts and decode rows in one call, and the
layout of pages that it wants. Axes as in `kernels.attention`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.kernels.pages import write

KERNEL = "jax.experimental.pallas.ops.tpu.ragged_paged_attention"
LANES = 128
BLOCK_BYTES = 2**21  # of keys and values per block: the kernel holds two blocks in VMEM
BLOCK_TOKENS, BLOCK_QUERIES = 1024, 32  # what the kernel's own table has for most shapes of a v6e


class Interleaved(NamedTuple):
    """One layer's keys and values `[pages, S, 2K, H]`: a token's k of head 0, v of head 0, k of head 1, ... lie side
    by side, so that one copy brings all that a block of heads needs."""

    kv: jax.Array
    axes = None, None, "heads"
    slot_axis = 1

    @property
    def shape(self) -> tuple[int, ...]:
        num_pages, page_size, heads, head_width = self.kv.shape
        return num_pages, heads // 2, page_size, head_width

    @property
    def dtype(self):
        return self.kv.dtype

    @classmethod
    def entries(cls, k_TKH: jax.Array, v_TKH: jax.Array) -> Interleaved:
        T, K, H = k_TKH.shape
        return cls(jnp.stack([k_TKH, v_TKH], 2).reshape(T, 2 * K, H))

    def read(self, page: jax.Array) -> tuple[jax.Array, jax.Array]:
        both = jnp.moveaxis(self.kv.at[page].get(mode="promise_in_bounds"), -2, -3)
        return both[..., 0::2, :, :], both[..., 1::2, :, :]

    @classmethod
    def zeros(cls, num_pages: int, page_size: int, kv_heads: int, head_width: int, dtype) -> Interleaved:
        return cls(jnp.zeros((num_pages, page_size, 2 * kv_heads, head_width), dtype))

    @staticmethod
    def fits(kv_heads: int, head_width: int, dtype) -> bool:
        """Whether the kernel compiles for such pages: heads are 128 wide and tile without padding. A lone bf16 head,
        which is read without strides, may be wider."""
        dtype = jnp.dtype(dtype)
        half = dtype == jnp.bfloat16
        tiles = kv_heads in (1, 2, 4) or (kv_heads % 8 == 0 and half)
        wide = head_width == LANES or (head_width % LANES == 0 and kv_heads == 1 and half)
        return tiles and wide and (half or dtype == jnp.float32) and find_spec(KERNEL) is not None


def takes_ragged(q_TNH, k_TKH, v_TKH, pages, run, *, sinks_N=None, **_) -> bool:
    """The kernel knows no sinks, and no other layout."""
    return isinstance(pages, Interleaved) and sinks_N is None


def attend_ragged(q_TNH, k_TKH, v_TKH, pages, run, *, group, scale, window=None, softcap=None):
    """The kernel's walk would lose its way at a row of no tokens, so the real rows come first; and it reads every page
    of a row from its first on, so with a window a row begins at the first page that it can see."""
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    pages = write(pages, k_TKH, v_TKH, run, group)
    _, _, page_size, _ = pages.shape
    table_RP, kv_lens_R, lens_R = run.tables[group], run.kv_lens_R, run.cu_q_lens[1:] - run.cu_q_lens[:-1]
    P = table_RP.shape[1]
    if window is not None:
        first_R = jnp.maximum(kv_lens_R - lens_R - window + 1, 0) // page_size
        kv_lens_R = kv_lens_R - first_R * page_size
        table_RP = jnp.take_along_axis(table_RP, jnp.minimum(first_R[:, None] + jnp.arange(P)[None], P - 1), 1)
    order_R = jnp.argsort(lens_R == 0, stable=True)
    cu_q_lens = jnp.pad(jnp.cumsum(lens_R[order_R]), (1, 0))
    out_TNH = ragged_paged_attention(
        q_TNH.astype(pages.dtype), pages.kv, kv_lens_R[order_R], table_RP[order_R], cu_q_lens,
        (lens_R > 0).sum(dtype=jnp.int32)[None], sm_scale=scale, sliding_window=window, soft_cap=softcap,
        num_kv_pages_per_block=block_pages(pages, P), num_queries_per_block=min(q_TNH.shape[0], BLOCK_QUERIES))
    return jnp.where(run.valid_T[:, None, None], out_TNH.astype(jnp.float32), 0), pages


def block_pages(pages: Interleaved, most: int) -> int:
    """Pages per block: of a token's keys and values the kernel takes one tile at a time, 8 x 4 bytes high."""
    size = pages.dtype.itemsize
    _, K, page_size, H = pages.shape
    page_bytes = page_size * min(2 * K, 32 // size) * H * size
    return max(1, min(most, BLOCK_TOKENS // page_size, BLOCK_BYTES // page_bytes))
