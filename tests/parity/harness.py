"""Runs a Graph by hand, without an engine: rows of tokens in, logits out, and the memory as hostile as it may be.

Pages start as NaN and are dealt out at random; table entries that no token may need, padded tokens and padded rows
hold junk; of a group with a window, the table forgets pages as soon as they are out of sight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.graph import Graph, Pages, Params, Run, forward, hidden
from jaxinfer.kernels import init_pages

JUNK = 2**30
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
BUCKETS = ((4, 1), (48, 16), (160, 96))  # T, longest: decode, chunks, a whole prompt


class Rows:
    """Up to `count` rows that are read and continued together. `step` may be given any share of each row's tokens."""

    def __init__(self, graph: Graph, params: Params, count: int, max_context: int, page_size: int = 16):
        self.graph, self.params, self.page_size = graph, params, page_size
        self.random = np.random.default_rng(0)
        self.lens = np.zeros(count, int)
        self.R = count + 1  # one row is always padding
        self.P = -(-max_context // page_size)
        self.state, self.tables = {}, {}
        for group in graph.groups:
            pages = init_pages(self.R * self.P + 3, page_size, group.kv_heads, group.head_width, jnp.float32)
            nan = Pages(*(jnp.full_like(page, jnp.nan) for page in pages))
            self.state[group.name] = [jax.tree.map(jnp.copy, nan) for _ in range(group.layers)]
            deal = self.random.permutation(self.R * self.P + 3)[: count * self.P]
            self.tables[group.name] = deal.reshape(count, self.P)

    def step(self, tokens: list[list[int]]) -> np.ndarray:
        """Read the next `tokens` of each row (none for some); logits `[count, V]` of each row's last token."""
        return self._read(forward, tokens)[: len(tokens)]

    def hidden(self, tokens: list[list[int]]) -> list[np.ndarray]:
        """The same step; the hidden states `[tokens, D]` of what was read of each row."""
        return np.split(self._read(hidden, tokens), np.cumsum([len(row) for row in tokens]))[: len(tokens)]

    def _read(self, what: Callable, tokens: list[list[int]]) -> np.ndarray:
        lens = np.array([len(row) for row in tokens])
        decode = (lens == 1).all()  # the decode bucket wants every row: its token r is row r
        fits = lambda T, longest: lens.sum() <= T and lens.max() <= longest
        T, longest = next(bucket for bucket in BUCKETS[not decode :] if fits(*bucket))
        self.lens += lens
        cu = np.concatenate([[0], np.cumsum(lens), [lens.sum()]])
        flat = np.concatenate([np.concatenate([row for row in tokens if row]),
                               self.random.integers(0, self.graph.vocab, T - lens.sum())])
        run = Run(flat.astype(np.int32), cu.astype(np.int32), np.append(self.lens * (lens > 0), 0).astype(np.int32),
                  np.arange(self.R, dtype=np.int32), {g.name: self._table(g, lens) for g in self.graph.groups}, longest)
        last_S = np.zeros(self.R, np.int32)
        self.state, found = _compile(what, self.graph)(self.params, self.state, last_S, run)
        return np.asarray(found)

    def _table(self, group, lens: np.ndarray) -> np.ndarray:
        first = np.zeros_like(self.lens) if group.window is None else self.lens - lens - group.window + 1
        page = np.arange(self.P) * self.page_size
        needed = (page < self.lens[:, None]) & (page + self.page_size > first[:, None])
        table = np.where(needed, self.tables[group.name], JUNK)
        return np.concatenate([table, np.full((1, self.P), JUNK)]).astype(np.int32)


_compiled: dict[tuple[int, Callable], tuple[Graph, Callable]] = {}


def _compile(what: Callable, graph: Graph) -> Callable:
    """`forward` or `hidden` of this graph, compiled once for each bucket."""
    if (id(graph), what) not in _compiled:
        _compiled[id(graph), what] = graph, jax.jit(partial(what, graph), donate_argnums=1, compiler_options=QUICK)
    return _compiled[id(graph), what][1]


def read_whole(rows: Rows, prompts: list[list[int]]) -> np.ndarray:
    """Read all prompts in one step."""
    return rows.step(prompts)


def read_in_chunks(rows: Rows, prompts: list[list[int]], chunks: tuple[int, ...] = (16, 5, 11)) -> np.ndarray:
    """Read the prompts in uneven chunks, side by side; a short row waits at its end while longer ones go on."""
    result, left, i = np.zeros((len(prompts), rows.graph.vocab), np.float32), list(prompts), 0
    while any(left):
        sizes = [chunks[(i + r) % len(chunks)] for r in range(len(left))]
        out = rows.step([row[:size] for row, size in zip(left, sizes, strict=True)])
        for r, row in enumerate(left):
            if row and len(row) <= sizes[r]:
                result[r] = out[r]
        left, i = [row[size:] for row, size in zip(left, sizes, strict=True)], i + 1
    return result


def continue_greedily(rows: Rows, logits: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` greedy tokens of every row after `logits`: tokens `[count, rows]`, logits `[count, rows, V]`."""
    all_tokens, all_logits = [], []
    for _ in range(count):
        tokens = logits.argmax(1)
        all_tokens.append(tokens)
        all_logits.append(logits)
        logits = rows.step([[int(token)] for token in tokens])
    return np.array(all_tokens), np.array(all_logits)
