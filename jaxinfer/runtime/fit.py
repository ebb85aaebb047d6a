"""What would fit, where something does not: other options of `load`, each put through the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from jaxinfer.compiler import Ladder
from jaxinfer.compiler.placement import Placement
from jaxinfer.graph import Graph
from jaxinfer.runtime.memory import abstract_params, needs
from jaxinfer.runtime.tiers import streaming

MOST = 3  # suggestions
LEAST_CONTEXT = 128  # tokens that are worth suggesting
Change = dict[str, Any]  # options of `load` and their values


def would_fit(graph: Graph, sizes: Change, budget: int, ladder: Callable[[int, int], Ladder]) -> list[str]:
    """Up to three changes of options with which a model needs no more than `budget` bytes on each device, as they are
    written. `sizes` is what `needs` was asked with; `ladder(max_rows, max_context)` are the buckets of other ones."""
    found: list[Change] = []
    for change in _changes(sizes, budget):
        if len(found) < MOST and not any(change.keys() <= other.keys() for other in found):
            asked = {**sizes, **change}
            streams, buckets = asked.pop("device_memory", None), ladder(asked["max_rows"], asked["max_context"])
            need = needs(graph, **{**asked, "chunk": buckets.chunk})
            params = abstract_params(graph, asked["dtype"], asked["quantize"])
            least = sum(streaming(graph, params, need, buckets.budget)) if streams else need.least
            if least <= budget:
                found.append(change)
    return [", ".join(f"{name}={value!r}" for name, value in change.items()) for change in found]


def _changes(sizes: Change, budget: int) -> Iterator[Change]:
    """What may be changed, the least felt first: one option, then two, then three."""
    place: Placement | None = sizes["place"]
    halves = lambda name, least: [{name: sizes[name] >> i} for i in range(1, 13) if sizes[name] >> i >= least]
    each = [[{"quantize": scheme} for scheme in ("int8", "int4") if sizes["quantize"] is None],
            halves("max_context", LEAST_CONTEXT), halves("max_rows", 1),
            [] if sizes["kv_cache_dtype"] else [{"kv_cache_dtype": "int8"}],
            [{"device_memory": budget}] if place is None or place.mesh is None else []]
    for count in (1, 2, 3):
        for chosen in combinations(each, count):
            yield from _joined(chosen)


def _joined(chosen: tuple[list[Change], ...]) -> Iterator[Change]:
    """Every way to take one change of each."""
    if not chosen:
        yield {}
        return
    for first in chosen[0]:
        yield from ({**first, **others} for others in _joined(chosen[1:]))
