"""Random runs of tokens. Shapes are few and fixed, since each is a compile; what hypothesis varies is data: lengths,
contexts, page tables, and junk wherever nobody may look.

Axes: T tokens, R rows, P pages per row, S slots of a page, N query heads, K KV heads, H head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxinfer.graph import Pages, Run
from jaxinfer.kernels.quantised_pages import FORMATS, QuantisedPages

GROUP = "kv"  # the one state group of a random run
SEEDS = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class RunShape:
    """The padded shape of a run, and of the pages it reads: P pages of S slots a row, out of `pages` in all."""

    tokens: int
    rows: int
    longest: int
    S: int = 4
    P: int = 8
    pages: int = 40
    singles: int = 0  # rows, the first ones, of one token or none


DECODE = RunShape(tokens=6, rows=6, longest=1)
PROMPT = RunShape(tokens=16, rows=1, longest=16)
MIXED = RunShape(tokens=24, rows=4, longest=11)
MIXED_SINGLES = RunShape(tokens=16, rows=5, longest=11, singles=3)


@dataclass(frozen=True)
class RaggedRun:
    """R real rows: row r has read `cached[r]` tokens and reads `lens[r]` more. Its pages are `tables[r]`, of which
    a window of `window` tokens shows those from `first[r]` on. The rest of the padded shape may hold anything.
    """

    shape: RunShape
    cached: tuple[int, ...]
    lens: tuple[int, ...]
    tables: tuple[tuple[int, ...], ...]
    first: tuple[int, ...]
    seed: int

    @property
    def ends(self) -> list[int]:
        return np.cumsum(self.lens).tolist()

    @property
    def tokens(self) -> list[tuple[tuple[int, ...], int]]:
        """The page table and the position of each real token."""
        rows = zip(self.tables, self.cached, self.lens, strict=True)
        return [(table, at) for table, cached, n in rows for at in range(cached, cached + n)]

    def mine(self, r: int) -> slice:
        """The tokens of row r."""
        return slice(self.ends[r] - self.lens[r], self.ends[r])

    def alone(self, r: int) -> RaggedRun:
        """The same shape with row r alone in it."""
        before = self.shape.singles if r >= self.shape.singles else 0
        only = lambda values, nothing: (*[nothing] * before, values[r])
        return replace(self, cached=only(self.cached, 0), lens=only(self.lens, 0), tables=only(self.tables, ()),
                       first=only(self.first, 0))

    def run(self, junk: int) -> Run:
        """The Run, with `junk` in all of its tables that no row may look at."""
        shape, real = self.shape, len(self.lens)
        tables = np.full((shape.rows, shape.P), junk, np.int32)
        for r, (first, pages) in enumerate(zip(self.first, self.tables, strict=True)):
            tables[r, first:len(pages)] = pages[first:]
        pad = lambda values, filler: np.array([*values, *[filler] * (shape.rows - real)], np.int32)
        kv_lens_R = pad([a + b for a, b in zip(self.cached, self.lens, strict=True)], 0)
        cu_q_lens = np.array([0, *pad(self.ends, self.ends[-1])], np.int32)
        return Run(np.zeros(shape.tokens, np.int32), cu_q_lens, kv_lens_R, pad(range(real), 0), {GROUP: tables},
                   shape.longest, shape.singles)


@st.composite
def ragged_runs(draw, shape: RunShape, window: int | None = None) -> RaggedRun:
    """Rows of any length that the shape holds, on pages in any order; rows of no tokens stand for padded decode rows.
    A row may read another's full pages as its own beginning, as rows with a common prefix do."""
    context = shape.S * shape.P
    free = list(draw(st.permutations(range(shape.pages))))
    cached, lens, tables, first = [], [], [], []
    for r in range(draw(st.integers(1, shape.rows))):
        single = r < shape.singles
        room = min(1 if single else shape.longest, shape.tokens - sum(lens))
        if room == 0:
            break
        lens.append(draw(st.integers(0 if single else 1, room)))
        cached.append(draw(st.integers(0, context - lens[-1])) if lens[-1] else 0)
        donor = draw(st.integers(0, len(tables))) - 1
        full = min(cached[donor], cached[-1]) // shape.S if donor >= 0 else 0
        shared = tables[donor][:draw(st.integers(0, full))] if donor >= 0 else ()
        own = -(-(cached[-1] + lens[-1]) // shape.S) - len(shared)
        table = [*shared, *(free.pop() for _ in range(own))]
        if (read := cached[-1] // shape.S) > 1 and draw(st.booleans()):  # a page that is there twice
            table[draw(st.integers(1, read - 1))] = table[0]
        tables.append(tuple(table))
        first.append(0 if window is None else max(0, cached[-1] - window + 1) // shape.S)
    return RaggedRun(shape, tuple(cached), tuple(lens), tuple(tables), tuple(first), draw(SEEDS))


@dataclass(frozen=True)
class Numbers:
    """Random operands of a run, rounded to `dtype`: q, k and v of its real tokens, and what its rows have read before,
    in pages [pages, K, S, H] with NaN in every slot that nobody has written. The op's pages hold them in
    `kv_cache_dtype` ("int8", "fp8") if there is one."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pages: tuple[np.ndarray, ...]
    dtype: str
    kv_cache_dtype: str | None = None

    @classmethod
    def of(cls, ragged: RaggedRun, heads: tuple[int, int], dtype: str, width: int = 8, q_size: float = 2.0,
           v_size: float = 2.0, kv_cache_dtype: str | None = None) -> Numbers:
        """Normal numbers, for N query heads on K KV heads: `q_size` and `v_size` are deviations of queries and values,
        and keys' is 2."""
        rng, shape, (N, K), T = np.random.default_rng(ragged.seed), ragged.shape, heads, ragged.ends[-1]
        draw = lambda size, *of: np.asarray(jnp.asarray(rng.normal(size=of) * size, dtype), np.float32)
        written = np.zeros((shape.pages, shape.S), bool)
        for cached, first, table in zip(ragged.cached, ragged.first, ragged.tables, strict=True):
            for at in range(first * shape.S, cached):
                written[table[at // shape.S], at % shape.S] = True
        pages = (np.where(written[:, None, :, None], draw(size, shape.pages, K, shape.S, width), np.nan)
                 for size in (2.0, v_size))
        return cls(draw(q_size, T, N, width), draw(2.0, T, K, width), draw(v_size, T, K, width), tuple(pages), dtype,
                   kv_cache_dtype)

    def part(self, mine: slice) -> Numbers:
        """Of some tokens alone, beside the same pages."""
        return replace(self, q=self.q[mine], k=self.k[mine], v=self.v[mine])

    def padded(self, shape: RunShape, poison: float) -> tuple:
        """q, k, v and pages for the op, with `poison` in padded tokens and in unwritten slots."""
        pad = lambda x: np.concatenate([x, np.full((shape.tokens - len(x), *x.shape[1:]), poison, np.float32)])
        pages = self._paged(np.where(np.isnan(page), poison, page) for page in self.pages)
        return (*(jnp.asarray(pad(x)) for x in (self.q, self.k, self.v)), pages)

    def written(self, ragged: RaggedRun) -> list[np.ndarray]:
        """The pages after the run, keys and values as they are read."""
        pages = [page.copy() for page in self.pages]
        for t, (table, at) in enumerate(ragged.tokens):
            for page, new in zip(pages, (self.k, self.v), strict=True):
                page[table[at // ragged.shape.S], :, at % ragged.shape.S] = new[t]
        return [np.asarray(x, np.float32) for x in _read(self._paged(pages))]

    def _paged(self, k_v: Iterable[np.ndarray]) -> Any:
        return _pages(*k_v, self.dtype, self.kv_cache_dtype)


@partial(jax.jit, static_argnums=(2, 3))
def _pages(k: jax.Array, v: jax.Array, dtype: str, kv_cache_dtype: str | None) -> Any:
    if kv_cache_dtype is None:
        return Pages(k.astype(dtype), v.astype(dtype))
    return QuantisedPages.rounded(k, v, FORMATS[kv_cache_dtype], dtype)


@jax.jit
def _read(pages: Any) -> tuple[jax.Array, jax.Array]:
    return pages.read(jnp.arange(pages.shape[0]))
