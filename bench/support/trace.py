"""A mixed trace of requests, always the same one; and what an engine made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

PROMPT, NEW, USUAL = (16, 512), (16, 192), 64  # fewest and most tokens; the mean of new ones before they are cut


@dataclass(frozen=True)
class Request:
    """`new` tokens are to follow `prompt`, whatever they are. `at`: seconds since the trace began."""

    at: float
    prompt: list[int]
    new: int


def mixed(text: list[int], count: int, *, cut: int = 0) -> list[Request]:
    """`count` requests whose prompts are cut out of `text` (token ids), no two from the same place. Prompts' lengths
    are log-uniform, answers' exponential with a long tail; arrivals are a Poisson process of one a second. Another
    `cut` has the same lengths and arrivals and other places, so that no cache knows its prompts."""
    rng = np.random.default_rng(0)
    at = np.cumsum(rng.exponential(size=count))
    lengths = np.exp(rng.uniform(*np.log(PROMPT), size=count)).round().astype(int)
    new = (NEW[0] + rng.exponential(USUAL - NEW[0], size=count)).astype(int).clip(*NEW)
    starts = rng.permutation(len(text) - PROMPT[1])[cut * count : (cut + 1) * count]
    return [Request(float(t - at[0]), text[start : start + length], int(n))
            for t, start, length, n in zip(at, starts, lengths, new, strict=True)]


def arriving(trace: Sequence[Request], rate: float) -> list[Request]:
    """The same requests, on average `rate` of them a second."""
    return [replace(request, at=request.at / rate) for request in trace]


@dataclass(frozen=True)
class Served:
    """`tokens` are what each request got, `times` when it got them, in seconds since the trace began. The engine
    computed `slots` token positions, `padding` of them for nobody."""

    times: list[list[float]]
    tokens: list[list[int]]
    slots: int
    padding: int

    def check(self, trace: Sequence[Request]) -> Served:
        """This, if every request got what it asked for."""
        for request, times, tokens in zip(trace, self.times, self.tokens, strict=True):
            assert len(times) == len(tokens) == request.new, f"{len(tokens)} tokens came, {request.new} were asked"
        return self

    @property
    def seconds(self) -> float:
        return max(times[-1] for times in self.times)

    def first(self, trace: Sequence[Request]) -> list[float]:
        """Seconds from each arrival to the first token."""
        return [times[0] - request.at for request, times in zip(trace, self.times, strict=True)]

    def each(self) -> list[float]:
        """Seconds for each token after a request's first, its mean."""
        return [(times[-1] - times[0]) / (len(times) - 1) for times in self.times]
