"""Decode steps: how fast an engine takes them while all of its rows decode, and the run of tokens that is one."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

import jaxinfer as ji
from jaxinfer.graph import Run


class Answers(NamedTuple):
    """When each token of each answer came, in seconds since all were asked for, and the tokens."""

    times: list[list[float]]
    tokens: list[list[int]]

    @property
    def read(self) -> float:
        """Seconds until every prompt was read and every row decodes."""
        return max(at[0] for at in self.times)

    @property
    def rate(self) -> float:
        """Tokens per second from when all rows decode until the first one has all of its tokens; NaN where that is
        before the last one begins."""
        begun, ended = self.read, min(at[-1] for at in self.times)
        count = sum(begun < when <= ended for at in self.times for when in at)
        return count / (ended - begun) if ended > begun else math.nan


def answers(lm: ji.LanguageModel, prompts: list[list[int]], new: int) -> Answers:
    """`new` tokens for each prompt, greedily, all asked for at once."""
    times: list[list[float]] = [[] for _ in prompts]
    start, sampling = time.perf_counter(), ji.Sampling(max_tokens=new, ignore_eos=True)
    note = lambda at: lambda piece: at.extend([time.perf_counter() - start] * len(piece.tokens))
    asked = [lm.submit(p, sampling, reuse=False, on_piece=note(at)) for p, at in zip(prompts, times, strict=True)]
    return Answers(times, [list(answer.result().tokens) for answer in asked])


def decode_rate(lm: ji.LanguageModel, rows: int, prompt: int, new: int) -> float:
    """Tokens per second of `rows` requests of `prompt` random tokens, while all of them decode."""
    prompts = np.random.default_rng(rows).integers(10, lm.graph.vocab, (rows, prompt)).tolist()
    return answers(lm, prompts, new).rate


def scattered(state: Mapping[str, Any], widths: Mapping[str, int], rows: int, context: int) -> dict[str, np.ndarray]:
    """Tables of `rows` rows with `context` tokens each, in pages from all over the state's pools; `widths` are the
    pages that a row of each group's table has room for."""
    tables = {}
    for name, width in widths.items():
        pages, _, page_size, _ = state[name][0].shape
        used = -(-context // page_size)
        tables[name] = np.zeros((rows, width), np.int32)
        tables[name][:, :used] = np.random.default_rng(0).permutation(pages)[: rows * used].reshape(rows, used)
    return tables


def decode_run(tables: dict[str, Any], context: int, tokens_R: np.ndarray | None = None, padded: int = 0) -> Run:
    """A step of one token for each row of `tables`, the last of `context`: `tokens_R`, or what the row drew last. Rows
    are padded to so many."""
    real = len(next(iter(tables.values())))
    R, ints = max(real, padded), lambda n: np.arange(n, dtype=np.int32)
    tokens_R = np.full(real, -1, np.int32) if tokens_R is None else tokens_R
    tables = {name: np.pad(table, ((0, R - real), (0, 0))) for name, table in tables.items()}
    lens_R = np.where(ints(R) < real, np.int32(context), np.int32(0))
    return Run(np.pad(tokens_R, (0, R - real)), np.minimum(ints(R + 1), np.int32(real)), lens_R, ints(R), tables,
               longest=1, singles=R)
