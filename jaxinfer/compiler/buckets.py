"""Buckets: the padded shapes that are compiled, and the ladders they come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """A step's padded shape: `tokens` in all, `rows`, and the `longest` row. Decode is `longest == 1`."""

    longest: int
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"T={self.tokens},R={self.rows}"

    def holds(self, other: Bucket) -> bool:
        """Whether a step of shape `other` can run padded to this bucket. Decode steps stay decode steps: with
        `longest == 1` token r is row r."""
        same_kind = (self.longest == 1) == (other.longest == 1)
        return same_kind and self.rows >= other.rows and self.tokens >= other.tokens and self.longest >= other.longest


@dataclass(frozen=True)
class Ladder:
    """The buckets of a model: `prompt` sizes for a step that reads one row's prompt, `rows` for decode steps."""

    prompt: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return (*(Bucket(n, 1, n) for n in self.prompt), *(Bucket(1, n, n) for n in self.rows))

    def fit(self, tokens: int, rows: int) -> Bucket:
        """The smallest bucket for a step of `tokens` tokens in `rows` rows, which is one prompt or all decode."""
        if tokens > rows:
            n = min(n for n in self.prompt if n >= tokens)
            return Bucket(n, 1, n)
        n = min(n for n in self.rows if n >= rows)
        return Bucket(1, n, n)


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


def default_ladder(max_rows: int, max_context: int) -> Ladder:
    """Powers of two from 32 to 512 for prompts (of four, from 1,025 rows on) and for rows: at most 16 buckets."""
    chunk = min(512, max_context)
    return Ladder(powers(chunk, least=min(32, chunk), factor=2 if max_rows <= 1024 else 4), powers(max_rows))
