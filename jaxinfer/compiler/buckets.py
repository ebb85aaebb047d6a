"""Buckets: the padded shapes that are compiled, and the ladders they come from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

MOST_BUCKETS = 16
STEPS = 8  # decode steps that may go in one call
# Tokens whose arithmetic takes as long as reading the weights once. An H200 reads bfloat16 at 4.3 TB/s and does 750
# TFLOP/s (174 tokens), an H100 2.9 and 700 (241); two AVX2 cores read float32 at 20 GB/s and do 100 GFLOP/s (10).
AGAIN_GPU, AGAIN = 192, 8


@dataclass(frozen=True, order=True)
class Bucket:
    """A step's padded shape: `tokens` in all, `rows`, and the `longest` row; the first `singles` rows have at most
    one token each. Decode is `longest == 1`, and `steps` > 1 draws so many tokens for each row in one call."""

    longest: int
    rows: int
    tokens: int
    singles: int = 0
    steps: int = 1

    def __str__(self) -> str:
        return f"T={self.tokens},R={self.rows}" + (f",N={self.steps}" if self.steps > 1 else "")

    def holds(self, other: Bucket) -> bool:
        """Whether a step of shape `other` can run padded to this bucket: its single rows come first, and its prompt
        chunks after the rows that are kept for single ones."""
        chunks = other.rows - other.singles
        return (self.steps == other.steps and self.longest >= other.longest and self.tokens >= other.tokens
                and self.rows >= other.rows and self.rows - max(self.singles, other.singles) >= chunks)


def decode(rows: int, steps: int = 1) -> Bucket:
    return Bucket(1, rows, rows, rows, steps)


def prompt(tokens: int) -> Bucket:
    return Bucket(tokens, 1, tokens)


def mixed(rows: int, tokens: int) -> Bucket:
    """`rows` decode rows, and one prompt chunk of `tokens`."""
    return Bucket(tokens, rows + 1, rows + tokens, rows)


@dataclass(frozen=True)
class Ladder:
    """The `buckets` of a model, the `chunk` of a prompt that one step reads at most, and the buckets of `prompts` that
    are scored or embedded, which need programs of their own. One more step takes about as long as `again` tokens."""

    buckets: tuple[Bucket, ...]
    chunk: int
    prompts: tuple[Bucket, ...]
    again: int = 0

    def holding(self, shape: Bucket) -> list[Bucket]:
        """The buckets that a step of this shape can run in, the smallest first."""
        return sorted((b for b in self.buckets if b.holds(shape)), key=lambda b: (b.tokens, b.rows, b.longest))

    @property
    def rungs(self) -> dict[int, Bucket]:
        """The buckets of steps that read prompts, by the tokens that a step's longest row may have."""
        return {b.longest: b for b in self.buckets if b.longest > 1}

    @property
    def budget(self) -> int:
        """The most tokens that a step can have."""
        return max(b.tokens for b in self.buckets)

    @property
    def together(self) -> tuple[int, ...]:
        """The row counts for which several decode steps can go in one call."""
        return tuple(b.rows for b in self.buckets if b.steps > 1)


def powers(most: int, *, least: int = 1, factor: int = 2) -> tuple[int, ...]:
    """least, least x factor, ... up to `most`, which is the last rung.

    >>> powers(24, least=4)
    (4, 8, 16, 24)
    """
    n, rungs = least, []
    while n < most:
        rungs.append(n)
        n *= factor
    return (*rungs, most)


def default_ladder(max_rows: int, max_context: int, chunks: int | None = 0) -> Ladder:
    """Powers of two from 32 to 512 for prompts (of four, from 1,025 rows on) and for rows; then, as far as sixteen
    programs go, every other row count again for several steps in a call. Where attention can mix a few rows (`chunks`
    of `kernels.chunks`), a prompt chunk shares its step with up to `max_rows` decode rows; where it cannot (0), with
    none. Where it can mix any (None), see `_mixing_ladder`."""
    if chunks is None:
        return _mixing_ladder(max_rows, max_context)
    rows, chunk = tuple(decode(n) for n in powers(max_rows)), min(512, max_context)
    sizes = powers(chunk, least=min(32, chunk), factor=2 if max_rows <= 1024 else 4)
    first = tuple(prompt(n) if chunks == 0 else mixed(max_rows, n) for n in sizes)
    left = MOST_BUCKETS - len(first) - len(rows)
    together = tuple(decode(b.rows, STEPS) for b in rows[::-2][: left // 2])  # each greedy, and not
    return Ladder((*first, *rows, *together[::-1]), chunk, tuple(map(prompt, sizes)), first[0].rows - 1 + AGAIN)


def _mixing_ladder(max_rows: int, max_context: int) -> Ladder:
    """The ladder of a GPU, which waits for weights until some sixty tokens are there: one row takes as long as eight,
    sixteen hardly less than 32, and a prompt of 64 tokens no longer than one of a few. Steps of up to 2,048 tokens
    hold whatever comes. Row counts, every other one if not all fit, come again for several steps in a call, the fewest
    first: they wait for the host most."""
    chunk = min(2048, max_context)
    rows = [n for n in powers(max_rows, least=min(8, max_rows)) if n != 16 or n == max_rows]
    sizes = powers(max(chunk, max_rows), least=min(64, chunk))[len(rows) - MOST_BUCKETS:]
    left = (MOST_BUCKETS - len(rows) - len(sizes)) // 2  # each greedy, and not
    again = rows if left >= len(rows) else rows[::2][:left]
    return Ladder((*(Bucket(n, min(max_rows, n), n) for n in sizes), *map(decode, rows),
                   *(decode(n, STEPS) for n in again)), chunk, tuple(map(prompt, sizes)), AGAIN_GPU)


def invariant_ladder(max_rows: int, max_context: int) -> Ladder:
    """One bucket for every step: whatever shares it with a token, the token's own arithmetic stays the same. Beside a
    full house of decode rows there is room for 16 tokens of a prompt at least."""
    tokens = -(-max_rows // 16) * 16 + 16
    bucket = Bucket(tokens, max_rows, tokens)
    return Ladder((bucket,), min(tokens, max_context), (bucket,))


def fit_rungs(sizes: Mapping[int, int], most: int, rungs: int, least_gain: float) -> tuple[int, ...]:
    """The ladder up to `most` that pads requests of these sizes (size -> how many came) the least: at most `rungs`
    rungs, the last of them `most`, and as few as leave no more than the share `least_gain` of the least cost unsaved
    by one more.

    By dynamic programming over the sizes: cost[j] is that of all sizes up to the j-th, padded to its rung.

    >>> fit_rungs({3: 10, 4: 90, 50: 1}, 64, 3, 0.0)
    (4, 50, 64)
    >>> fit_rungs({3: 10, 4: 90, 50: 1}, 64, 3, 0.1)
    (4, 64)
    """
    ends = sorted({size for size, count in sizes.items() if count} | {most})
    counts = [sizes.get(end, 0) for end in ends]
    before = [0, *itertools.accumulate(counts)]
    cost = [end * before[j + 1] for j, end in enumerate(ends)]  # with one rung
    best, path = [(cost[-1], (most,))], [((end,)) for end in ends]
    for _ in range(min(rungs, len(ends)) - 1):
        longer, longer_path = [], []
        for j, end in enumerate(ends):
            choices = [(cost[i] + end * (before[j + 1] - before[i + 1]), i) for i in range(j)]
            value, i = min(choices, default=(cost[j], -1))
            longer.append(min(value, cost[j]))
            longer_path.append((*path[i], end) if value < cost[j] else path[j])
        cost, path = longer, longer_path
        best.append((cost[-1], path[-1]))
    least = best[-1][0]
    return next(path for value, path in best if value <= least * (1 + least_gain))
