"""How much memory a model gets, decided before anything is loaded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxinfer.compiler.placement import Placement, held
from jaxinfer.errors import InvalidOption, OutOfMemory
from jaxinfer.graph import Encoder, Graph, Leaf, State, StateGroup
from jaxinfer.kernels import init_pages
from jaxinfer.kernels.logprobs import SLICE
from jaxinfer.kernels.op import platform
from jaxinfer.kernels.quantised import blank, format_of
from jaxinfer.scheduler import PageGroup

PAGE_SIZE = 64
UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(size: int | str, name: str = "memory") -> int:
    """A number of bytes from an integer or a text such as "8GiB", "500 MB".

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    number = size if type(size) is int else 0
    match = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([KMGT]i?)?B?\s*", size) if isinstance(size, str) else None
    if match:
        number = int(float(match[1]) * UNITS[match[2] or ""])
    if number <= 0:
        raise InvalidOption(f"{name} is {size!r}; it must be a number of bytes > 0, or a text such as '8GiB'")
    return number


def available(device: jax.Device) -> int:
    """Bytes that are free for us now: the device's own, or the host's for the CPU."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return host_memory()


def host_memory() -> int:
    """Bytes of the host's memory that are free for us now."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip() if (group / "memory.max").exists() else "max"
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])  # the page cache is free
            free = min(free, int(limit) - used)
        return free
    except (OSError, StopIteration):
        return 4 * 2**30  # no /proc here: stay small


def sharing(places: Sequence[Placement]) -> int:
    """How many devices share one memory: all of a CPU's, which are made up."""
    devices = [device for place in places for device in place.devices]
    return len(devices) if devices[0].platform == "cpu" else 1


def free(places: Sequence[Placement]) -> int:
    """Bytes that are free on each device: the least there is on any of them, whichever process it is in."""
    here = jax.process_index()
    least = min(available(device) for place in places for device in place.devices if device.process_index == here)
    least //= sharing(places)
    if not places[0].is_local:  # in MiB, since JAX's integers have 32 bits
        least = int(np.min(multihost_utils.process_allgather(np.int32(least >> 20)))) << 20
    return least


def nbytes(spec: Any, dtype: Any, quantize: str | None = None, place: Placement | None = None) -> int:
    """Bytes of the weights of a spec, in `dtype` but for the exact leaves and the quantised ones; those that each
    device of `place` holds."""
    shapes = _abstract(spec, dtype, quantize)
    return held(place.abstract(spec, shapes) if place else shapes)


def temporaries(graph: Graph, chunk: int, max_rows: int, quantize: str | None = None) -> int:
    """An upper estimate of a step's temporaries, of which `memory_analysis` tells the truth once it is compiled: a
    chunk's widest activations, the page that each token looks at where no kernel of ours attends, logits while they
    are sampled or a slice of a prompt is scored, and a matrix of int4 that a GPU has unpacked for a prompt."""
    leaves = jax.tree.leaves(graph.spec["blocks"], is_leaf=lambda x: isinstance(x, Leaf))
    token, copies = 4 * max(max(leaf.shape) for leaf in leaves), 4
    if platform() == "cpu":
        token += 2 * PAGE_SIZE * max(group.kv_heads * group.head_width for group in graph.groups)
        copies = 8
    unpacked = max((math.prod(leaf.shape) for leaf in leaves if len(leaf.shape) == 2 and platform() == "gpu"
                    and (format := format_of(leaf, quantize)) and format.group), default=0)
    return 2 * unpacked + 4 * (chunk * token + max(copies * max_rows, 2 * SLICE + max_rows) * graph.vocab)


@dataclass(frozen=True)
class Needs:
    """Bytes that a model takes on each device: its `weights`, a step's `temporaries`, and those of a page of each
    state group (`page`), of which one full context needs so many (`pages`). `told` says where the temporaries are
    from."""

    weights: int
    temporaries: int
    page: dict[str, int]
    pages: dict[str, int]
    told: str = "an upper estimate"

    @property
    def row(self) -> int:
        """Bytes of the pages of one full context."""
        return sum(count * self.page[name] for name, count in self.pages.items())

    @property
    def least(self) -> int:
        """Bytes without which not even one sequence can run."""
        return self.weights + self.temporaries + self.row

    def groups(self, graph: Graph, rows: float) -> tuple[PageGroup, ...]:
        """Pages for so many full contexts."""
        return tuple(PageGroup(g.name, PAGE_SIZE, int(rows * self.pages[g.name]), g.window) for g in graph.groups)


def needs(graph: Graph, *, dtype: Any, max_context: int, max_rows: int, chunk: int, quantize: str | None = None,
          kv_cache_dtype: str | None = None, place: Placement | None = None) -> Needs:
    """What a model takes on each device of `place`, by arithmetic alone: nothing is read or compiled."""
    return Needs(nbytes(graph.spec, dtype, quantize, place), temporaries(graph, chunk, max_rows, quantize),
                 bytes_of_page(graph, dtype, kv_cache_dtype, place), pages_of_row(graph, max_context, chunk))


def page_groups(graph: Graph, *, dtype: Any, max_context: int, max_rows: int, chunk: int, budget: int,
                why: str, most: int | None = None, quantize: str | None = None, kv_cache_dtype: str | None = None,
                place: Placement | None = None, fits: Callable[[], Sequence[str]] = list,
                need: Needs | None = None) -> tuple[PageGroup, ...]:
    """The pages per state group: enough for `max_rows` full contexts, or what `budget` bytes leave after the weights,
    or what `most` bytes hold (but one full context at least). All bytes are those of each device of `place`.

    Raises OutOfMemory, with the numbers and what `fits` instead, when not even one sequence of `max_context` tokens
    does. `why` says where the budget came from, and `need` what `needs` said of the same, if it was asked.
    """
    need = need or needs(graph, dtype=dtype, max_context=max_context, max_rows=max_rows, chunk=chunk, quantize=quantize,
                         kv_cache_dtype=kv_cache_dtype, place=place)
    if need.least > budget:
        raise OutOfMemory(
            f"{graph.name} needs {mib(need.weights)} for weights, {mib(need.temporaries)} for temporaries "
            f"({need.told}) and {mib(need.row)} for the pages of one context of {max_context} tokens: "
            f"{mib(need.least)}, but {why} is {mib(budget)}; nothing was loaded. It would fit with "
            + "; or with ".join([f"memory='{need.least / 2**20 + 1:.0f}MiB'", *fits()]))
    rows = min(max_rows, (budget - need.weights - need.temporaries) / need.row)
    if most is not None:
        rows = min(rows, max(1.0, most / need.row))
    return need.groups(graph, rows)


def mib(count: int) -> str:
    """Bytes as a message says them.

    >>> mib(2**20 // 8), mib(5000 * 2**20)
    ('0.125 MiB', '5,000 MiB')
    """
    number = count / 2**20
    return f"{number:,.0f} MiB" if number >= 100 else f"{number:.3g} MiB"


def bytes_of_page(graph: Graph, dtype: Any, kv_cache_dtype: str | None, place: Placement | None) -> dict[str, int]:
    """Bytes of a page in all layers of each state group, on each device of `place`."""
    shards = place.shards("heads") if place else 1
    return {g.name: g.layers * held(_pages(g, 1, dtype, kv_cache_dtype)) // shards for g in graph.groups}


def pages_of_row(graph: Graph, max_context: int, chunk: int) -> dict[str, int]:
    """The pages of each state group that a row needs for a full context."""
    one = {}
    for group in graph.groups:
        full = PageGroup(group.name, PAGE_SIZE, 0, group.window)
        start = max(0, max_context - chunk)
        slack = group.window is not None
        one[group.name] = max(full.need(start, max_context), full.need(0, min(chunk, max_context))) + slack + 1
    return one


def abstract_params(graph: Graph | Encoder, dtype: Any, quantize: str | None = None) -> Any:
    """The shapes of the weights in `dtype`, but for the exact leaves and the quantised ones."""
    return _abstract(graph.spec, dtype, quantize)


def _abstract(spec: Any, dtype: Any, quantize: str | None = None) -> Any:
    def weight(leaf: Leaf) -> Any:
        format = format_of(leaf, quantize)
        if format is not None:
            return blank(format, leaf.shape, dtype)
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32 if leaf.exact else dtype)

    return jax.tree.map(weight, spec, is_leaf=lambda x: isinstance(x, Leaf))


def abstract_state(graph: Graph, groups: tuple[PageGroup, ...], dtype: Any, kv_cache_dtype: str | None = None
                   ) -> State:
    """The shapes of the device's pages, in the layout of what attends where this is `tracing`."""
    return {g.name: [_pages(g, p.pages, dtype, kv_cache_dtype)] * g.layers
            for g, p in zip(graph.groups, groups, strict=True)}


def _pages(group: StateGroup, pages: int, dtype: Any, kv_cache_dtype: str | None) -> Any:
    """The shapes of so many pages of one layer."""
    return jax.eval_shape(
        lambda: init_pages(pages, PAGE_SIZE, group.kv_heads, group.head_width, dtype, kv_cache_dtype))
