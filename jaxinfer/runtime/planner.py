"""What a model needs and takes on a device, by arithmetic on shapes and, where its compiler is here, by that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from jaxinfer import kernels
from jaxinfer.compiler import Key, default_ladder
from jaxinfer.compiler.buckets import Bucket, Ladder, decode, prompt
from jaxinfer.compiler.hardware import Hardware
from jaxinfer.compiler.parts import HEAD, Compiled, Parts
from jaxinfer.compiler.placement import Placement, held
from jaxinfer.compiler.roofline import Roofline
from jaxinfer.errors import OutOfMemory
from jaxinfer.graph import Graph
from jaxinfer.runtime import memory as planning
from jaxinfer.scheduler import PageGroup

MOST_ROWS = 4096
ENDLESS = 1 << 62  # bytes: a budget that holds anything


@dataclass(frozen=True)
class Step:
    """A step of `tokens` tokens of `rows` rows, the longest of which has `context` tokens after it: what it should
    take in `seconds`, by the roofline or by the `compiler`'s cost model (None: not asked), whichever is longer.
    `memory` are the seconds until all bytes are moved, `arithmetic` those until all is computed, op after op."""

    name: str
    rows: int
    tokens: int
    context: int
    memory: float
    arithmetic: float
    roofline: float
    compiler: float | None

    @property
    def seconds(self) -> float:
        return max(self.roofline, self.compiler or 0.0)

    @property
    def bound(self) -> str:
        """What it waits for most: "memory", "arithmetic", "overhead" (of kernels, of sums over devices, or of ops far
        from both limits) or what the "compiler's model" sees beyond all that."""
        if self.compiler is not None and self.compiler > 1.1 * self.roofline:
            return "compiler's model"
        if max(self.memory, self.arithmetic) < 0.5 * self.roofline:
            return "overhead"
        return "memory" if self.memory >= self.arithmetic else "arithmetic"


@dataclass(frozen=True, eq=False)
class Planner:
    """One model on one kind of device: `place` is where a shard of it lies. `budget` and `most` are bytes of each
    device: all of it, and what its pages may take of that. `within` is what a compiler must know of the devices; None:
    it is not asked."""

    graph: Graph
    hardware: Hardware
    place: Placement
    dtype: Any
    quantize: str | None
    kv_cache_dtype: str | None
    max_context: int
    max_rows: int
    budget: int
    most: int | None
    forced: Mapping[str, str]
    experts: int = 0
    within: Callable[[], AbstractContextManager] | None = None
    compiled: dict[Key, Compiled] = field(default_factory=dict)

    def tracing(self) -> AbstractContextManager:
        """In which ops choose as they would on the device."""
        return kernels.tracing(self.hardware.platform, self.forced, self.place.mesh, self.place.axes,
                               self.hardware.kind)

    # Memory.

    @cached_property
    def ladder(self) -> Ladder:
        return self._ladder(self.max_rows, self.max_context)

    @cached_property
    def weights(self) -> int:
        return held(self.params)

    @cached_property
    def params(self) -> Any:
        """The shapes of the weights as they are placed."""
        return self.place.abstract(self.graph.spec, planning.abstract_params(self.graph, self.dtype, self.quantize))

    @cached_property
    def groups(self) -> tuple[PageGroup, ...]:
        """The pages that `load` would make, or those of one context where it would refuse to."""
        try:
            return self._groups(self.max_rows, self.max_context, self.budget, self.most)
        except OutOfMemory:
            return self._groups(1, self.max_context, ENDLESS, None)

    @cached_property
    def pages(self) -> int:
        """Bytes of these on each device."""
        return sum(group.pages * self.page_bytes[group.name] for group in self.groups)

    @cached_property
    def scratch(self) -> int:
        """The largest temporaries of a step, as the compiler says where it was asked, or an upper estimate."""
        found = [part.temporaries for part in self.compiled.values()]
        return max(found) if found else self._scratch(self.max_rows, self.max_context)

    @cached_property
    def full_rows(self) -> float:
        """Full contexts that have pages."""
        return self.pages / self.row_bytes(self.max_context)

    @property
    def fits(self) -> bool:
        return self.needed(1, self.max_context, self.max_rows) <= self.budget

    @cached_property
    def page_bytes(self) -> dict[str, int]:
        with self.tracing():
            return planning.bytes_of_page(self.graph, self.dtype, self.kv_cache_dtype, self.place)

    def row_bytes(self, context: int) -> int:
        """Bytes of one row's pages on each device."""
        chunk = self._ladder(self.max_rows, context).chunk
        return sum(count * self.page_bytes[name]
                   for name, count in planning.pages_of_row(self.graph, context, chunk).items())

    def needed(self, rows: int, context: int, max_rows: int | None = None) -> int:
        """Bytes on each device of so many rows with pages for `context` tokens each, as `load` counts them."""
        return self.weights + self._scratch(max_rows or rows, context) + rows * self.row_bytes(context)

    def largest_batch(self, context: int) -> int:
        """The most rows of `context` tokens that fit at once; 0 if not one does."""
        return largest(lambda rows: self.needed(rows, context) <= self.budget, MOST_ROWS)

    def largest_context(self, rows: int, limit: int) -> int:
        """The longest context that fits for each of so many rows; 0 if not one token does."""
        return largest(lambda context: self.needed(rows, context) <= self.budget, limit)

    def _scratch(self, rows: int, context: int) -> int:
        chunk = self._ladder(rows, context).chunk
        with self.tracing():
            return planning.temporaries(self.graph, chunk, rows, self.quantize)

    @lru_cache(4096)  # noqa: B019  # a planner lives as long as its plan
    def _ladder(self, rows: int, context: int) -> Ladder:
        with self.tracing():
            return default_ladder(rows, context, kernels.chunks(self.hardware.platform))

    def _groups(self, rows: int, context: int, budget: int, most: int | None) -> tuple[PageGroup, ...]:
        chunk = self._ladder(rows, context).chunk
        with self.tracing():
            return planning.page_groups(
                self.graph, dtype=self.dtype, max_context=context, max_rows=rows, chunk=chunk, budget=budget, most=most,
                why="the budget", quantize=self.quantize, kv_cache_dtype=self.kv_cache_dtype, place=self.place)

    def _state(self, groups: tuple[PageGroup, ...]) -> Any:
        with self.tracing():
            return planning.abstract_state(self.graph, groups, self.dtype, self.kv_cache_dtype)

    # Time.

    @cached_property
    def parts(self) -> Parts:
        width = {group.name: -(-self.max_context // group.page_size) for group in self.groups}
        return Parts(self.graph, self.ladder, params=self.params, state=self._state(self.groups),
                     max_rows=self.max_rows, max_context=self.max_context, table_width=width, device=self.place,
                     platform=self.hardware.platform, forced=self.forced)

    @cached_property
    def roofline(self) -> Roofline:
        return Roofline(self.graph, self.params, self.parts.state, self.place, self.experts)

    @cached_property
    def kinds(self) -> dict[str, list[int]]:
        """The layers of each kind of block."""
        found: dict[str, list[int]] = {}
        for n, block in enumerate(self.graph.blocks):
            found.setdefault(block.kind, []).append(n)
        return found

    def compile(self, buckets: Iterable[Bucket]) -> None:
        """Ask the compiler about these, if there is one."""
        if self.within is not None:
            keys = [Key(kind, bucket) for bucket in buckets for kind in (*self.kinds, HEAD)]
            self.compiled.update(self.parts.compile_parts(keys, self.within))
            self._step.cache_clear()

    def decoding(self, rows: int) -> Bucket:
        """The bucket in which so many rows decode."""
        return self.ladder.holding(decode(rows))[0]

    def reading(self, tokens: int) -> Bucket:
        """The bucket in which so many tokens of a prompt are read."""
        return self.ladder.holding(prompt(tokens))[0]

    def decode(self, rows: int, context: int) -> Step:
        """A step that draws one token for each of `rows` rows of `context` tokens."""
        return self._step(f"decode, {rows} row{'s' * (rows > 1)}", self.decoding(rows), rows, rows, context)

    def read(self, tokens: int, context: int) -> Step:
        """A step that reads the last `tokens` of a row of `context` tokens."""
        return self._step(f"prompt, {tokens:,} tokens", self.reading(tokens), 1, tokens, context)

    def prompt_seconds(self, tokens: int) -> float:
        """What it takes to read a prompt, chunk after chunk."""
        chunk = self.ladder.chunk
        ends = [*range(chunk, tokens, chunk), tokens]
        return sum(self.read(end - begin, end).seconds for begin, end in zip([0, *ends], ends, strict=False))

    @lru_cache(4096)  # noqa: B019
    def _step(self, name: str, bucket: Bucket, rows: int, tokens: int, context: int) -> Step:
        with self.tracing():
            parts = [(None, 1, self.roofline.embed(bucket)),
                     *((kind, len(layers), self.roofline.block(layers[0], bucket, rows, context))
                       for kind, layers in self.kinds.items()),
                     (HEAD, 1, self.roofline.head(bucket))]
        memory = arithmetic = roofline = 0.0
        predicted: float | None = 0.0
        for kind, count, works in parts:
            each = [self.hardware.seconds(work) for work in works]
            found = self.compiled.get(Key(kind, bucket)) if kind else None
            memory += count * sum(one.memory for one in each)
            arithmetic += count * sum(one.arithmetic for one in each)
            roofline += count * (sum(one.all for one in each) + self._launches(works, found))
            if kind is None:
                continue
            if found is None or found.seconds is None or predicted is None:
                predicted = None
            else:
                left = sum(one.all for work, one in zip(works, each, strict=True) if work.op in found.not_counted)
                predicted += count * (found.seconds + left)
        return Step(name, rows, tokens, context, memory, arithmetic, roofline, predicted)

    def _launches(self, works: Any, found: Compiled | None) -> float:
        """Seconds of the kernels that the compiler made beyond those that were counted."""
        counted = sum(work.kernels for work in works if work.op != "sum")
        return (found.kernels - counted) * self.hardware.start if found and found.kernels else 0.0


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, if every smaller one does; 0 if not even 1 does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


