"""Which layers stay on the device, which wait on the host and which on the disk: decided before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer.errors import OutOfMemory
from jaxinfer.graph import Graph, Run
from jaxinfer.runtime.memory import Needs, held, mib
from jaxinfer.runtime.record import Record
from jaxinfer.scheduler import PageGroup

SLOTS = 3, 2  # of the ring: a layer computes, one is there, one is coming; or the last two
AHEAD = 4  # layers that may be dispatched and not computed yet: what they give is held
PAGES = 4  # one in so many bytes of the budget may be KV pages, and those of one full context in any case
STAGES = 2  # buffers on the host through which layers pass from the disk to a device with a memory of its own


@dataclass(frozen=True)
class Tiers:
    """Where a model's weights lie, in bytes: on the `device` what stays and the ring, on the `host`, and on the `disk`.

    `streamed` are the layers that pass through the ring's `slots`, `on_disk` those of them that are read each time,
    through `stages` buffers of the host's where the ring is not the host's own memory.
    """

    device: int
    host: int
    disk: int
    layers: int
    slots: int
    stages: int
    streamed: tuple[int, ...]
    on_disk: tuple[int, ...]
    records: Mapping[int, Record] = field(repr=False)

    @property
    def largest(self) -> int:
        """Bytes of one slot."""
        return max(record.size for record in self.records.values())

    @property
    def swept(self) -> int:
        """Bytes that pass through the ring in a step."""
        return sum(record.size for record in self.records.values())


class Streaming(NamedTuple):
    """Bytes that a streamed model needs on its device beside what stays of its layers: for what is `outer` to them,
    for a step's `temporaries`, for the pages of one full context (`row`) and for the smallest `ring`."""

    outer: int
    temporaries: int
    row: int
    ring: int


def streaming(graph: Graph, params: Any, need: Needs, tokens: int) -> Streaming:
    """What a model, whose `params` are shapes, needs if it is streamed. `tokens` are those of the largest step."""
    outer = {name: part for name, part in params.items() if name != "blocks"}
    outputs = (AHEAD + 2) * _stream(graph, outer, tokens)
    largest = max(Record.of(layer).size for layer in params["blocks"])
    return Streaming(held(outer), need.temporaries + outputs, need.row, SLOTS[-1] * largest)


def plan_tiers(graph: Graph, params: Any, need: Needs, *, max_rows: int, tokens: int, device_memory: int,
               host_memory: int, aliased: bool) -> tuple[Tiers, tuple[PageGroup, ...]]:
    """The tiers of a model that does not fit into `device_memory` bytes, and its pages.

    A sweep over the layers is cyclic, so that the least recently used one is always the next: a fixed set stays, as
    large as fits beside the ring, and the others are spread evenly between them, so that one comes while another
    computes. Where the device's memory is the host's (`aliased`), layers are read from the disk into the ring itself.

    Raises OutOfMemory, with the numbers, where not even two layers at a time fit.
    """
    least, layers = streaming(graph, params, need, tokens), [held(layer) for layer in params["blocks"]]
    records, n = {i: Record.of(layer) for i, layer in enumerate(params["blocks"])}, len(layers)
    for rows in (min(max_rows, max(1.0, device_memory / PAGES / need.row)), 1.0):
        groups = need.groups(graph, rows)
        pages = sum(need.page[group.name] * group.pages for group in groups)
        room = device_memory - least.outer - least.temporaries - pages
        for slots, count in ((m, k) for m in SLOTS for k in range(m + 1, n + 1)):
            streamed = _spread(range(n), count)
            ring = slots * max(records[i].size for i in streamed)
            stays = sum(layers) - sum(layers[i] for i in streamed)
            if ring + stays <= room:
                passing = {i: records[i] for i in streamed}
                return _tiers(passing, host_memory, aliased, n, slots, least.outer + stays), groups
    raise OutOfMemory(
        f"{graph.name} cannot stream through {mib(device_memory)}: it needs {mib(least.outer)} for what is no layer, "
        f"{mib(least.ring)} for {SLOTS[-1]} layers at a time, {mib(least.temporaries)} for temporaries and "
        f"{mib(least.row)} for the pages of one full context: {mib(sum(least))}; nothing was loaded. It would fit with "
        f"device_memory='{sum(least) / 2**20 + 1:.0f}MiB', a smaller max_context, fewer max_rows, or a smaller dtype, "
        "quantize or kv_cache_dtype."
    )


def _tiers(records: dict[int, Record], host_memory: int, aliased: bool, layers: int, slots: int, stays: int) -> Tiers:
    on_disk, largest = _on_disk(records, host_memory, aliased), max(record.size for record in records.values())
    read, stages = sum(records[i].size for i in on_disk), STAGES if on_disk and not aliased else 0
    on_host = sum(record.size for record in records.values()) - read + stages * largest
    return Tiers(stays + slots * largest, on_host, read, layers, slots, stages, tuple(records), on_disk, records)


def _on_disk(records: Mapping[int, Record], room: int, aliased: bool) -> tuple[int, ...]:
    """Of the layers that stream, as few as possible, so that the others fit on the host."""
    sizes = {i: record.size for i, record in records.items()}
    if sum(sizes.values()) <= room:
        return ()
    stages = 0 if aliased else STAGES * max(sizes.values())
    if stages > room:
        raise OutOfMemory(f"layers from the disk pass through {STAGES} buffers on the host, {mib(stages)}, but "
                          f"host_memory is {mib(room)}; nothing was loaded. Give at least "
                          f"host_memory='{stages / 2**20 + 1:.0f}MiB'.")
    for count in range(1, len(sizes)):
        chosen = _spread(tuple(sizes), count)
        if stages + sum(size for i, size in sizes.items() if i not in chosen) <= room:
            return chosen
    return tuple(sizes)


def _spread(items: Any, count: int) -> tuple[int, ...]:
    """So many of the items, evenly.

    >>> _spread(range(10), 4)
    (2, 4, 7, 9)
    """
    n = len(items)
    return tuple(item for i, item in enumerate(items) if (i + 1) * count // n > i * count // n)


def _stream(graph: Graph, outer: Any, tokens: int) -> int:
    """Bytes of the stream between two layers."""
    ints = lambda size: jax.ShapeDtypeStruct((size,), jnp.int32)
    return held(jax.eval_shape(graph.embed, outer, Run(ints(tokens), ints(2), ints(1), ints(1), {}, tokens)))
