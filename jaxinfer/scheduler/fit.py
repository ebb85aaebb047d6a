"""How many tokens a step should read, given that it is padded to the next rung of a ladder."""

from __future__ import annotations

from collections.abc import Sequence


def fit(tokens: int, rungs: Sequence[int], again: int) -> int:
    """Of `tokens` that could be read now, how many the next step reads: all of them, padded; or as many as fill the
    largest rung below, where that step and one more for the rest compute less. One step more costs as much as `again`
    tokens: the weights are read once more. `rungs` ascend, and the last holds all tokens.

    >>> fit(1100, (64, 256, 1024, 2048), again=192)
    1024
    >>> fit(1900, (64, 256, 1024, 2048), again=192)
    1900
    """
    return _cheapest(tokens, rungs, again)[1]


def _cheapest(tokens: int, rungs: Sequence[int], again: int) -> tuple[int, int]:
    """What it costs to read so many tokens, and how many of them come first."""
    whole = next(size for size in rungs if size >= tokens) + again, tokens
    below = max((size for size in rungs if size < tokens), default=0)
    if not below:
        return whole
    return min(whole, (below + again + _cheapest(tokens - below, rungs, again)[0], below))
