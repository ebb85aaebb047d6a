"""Random inputs for the property tests, in one place. Shapes are few and fixed, since each one is a compile;
what hypothesis varies is data: lengths, page tables, junk, rules and histories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from jaxinfer.graph import Run

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
    a window of `window` tokens shows those from `first[r]` on. The rest of the padded shape is the tests' to poison.
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
        tables.append((*shared, *(free.pop() for _ in range(own))))
        first.append(0 if window is None else max(0, cached[-1] - window + 1) // shape.S)
    return RaggedRun(shape, tuple(cached), tuple(lens), tuple(tables), tuple(first), draw(SEEDS))


class Rules(NamedTuple):
    """How one row draws; see `kernels.sampling.Draws`."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float


def sampling_rules(vocab: int) -> st.SearchStrategy[Rules]:
    """Each filter off, sharp or loose, in any company."""
    return st.builds(
        Rules,
        temperature=st.sampled_from((0.0, 0.25, 1.0, 3.0)),
        top_k=st.one_of(st.just(0), st.integers(1, vocab + 3)),
        top_p=st.one_of(st.just(1.0), st.floats(2**-7, 1.0, width=32)),
        min_p=st.one_of(st.just(0.0), st.floats(2**-10, 1.0, width=32)),
    )


class EditRules(NamedTuple):
    """How one row's logits are edited; see `kernels.edits.Edits`. `biases` tokens are biased, and about a part
    `allowed` of all tokens is allowed."""

    repetition: float
    presence: float
    frequency: float
    biases: int
    allowed: float
    length: int
    prompt: int


@st.composite
def edit_rules(draw, most_biases: int, context: int) -> EditRules:
    """Each edit off, weak or strong, in any company, after a history that may be empty or full."""
    length = draw(st.integers(0, context))
    return EditRules(
        repetition=draw(st.sampled_from((1.0, 0.5, 1.25, 2.0))),
        presence=draw(st.sampled_from((0.0, -2.0, 0.5, 2.0))),
        frequency=draw(st.sampled_from((0.0, -1.5, 0.125, 2.0))),
        biases=draw(st.one_of(st.just(0), st.integers(1, most_biases))),
        allowed=draw(st.sampled_from((1.0, 0.5, 0.05))),
        length=length,
        prompt=draw(st.integers(0, length)),
    )
