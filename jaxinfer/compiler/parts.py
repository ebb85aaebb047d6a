"""The parts of a step, each compiled once: a block of each kind, and the head that ends the step.

A step of many layers is as many calls of a few blocks, so that its cost is known from them in a fraction of the time
that all of it takes to compile. What XLA does across layers is not seen: it fuses the end of a block with the beginning
of the next, and lays out the memory of all at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxinfer import kernels
from jaxinfer.compiler import hlo
from jaxinfer.compiler.buckets import Bucket
from jaxinfer.compiler.executables import Executables, Key
from jaxinfer.compiler.placement import held
from jaxinfer.graph import Graph, Run

HEAD = "head"
# Implementations that the TPU's cost model counts as nothing (Pallas), or once for all turns of a loop.
NOT_COUNTED = {"attend": ("ragged", "visits", "by_page"), "routed_ffn": ("grouped", "blocks")}


class Compiled(NamedTuple):
    """What the compiler says of a part: `seconds` by its cost model (None: it has none), without the ops that are
    `not_counted`; bytes of `temporaries`, with the stream; and the `kernels` that a GPU launches."""

    seconds: float | None
    not_counted: frozenset[str]
    temporaries: int
    kernels: int


class Parts(Executables):
    """`lower` takes Key("head" | a block's kind, bucket)."""

    def stream(self, bucket: Bucket) -> jax.ShapeDtypeStruct:
        """What goes from block to block."""
        x_TD = jax.eval_shape(partial(self.graph.embed), self.params, self._run(bucket))
        return jax.ShapeDtypeStruct(x_TD.shape, x_TD.dtype, sharding=self.place.whole)

    def lower(self, key: Key) -> jax.stages.Lowered:
        bucket: Any = key.shape
        run, x_TD = self._run(bucket), self.stream(bucket)
        if key.kind == HEAD:
            return self._lower(partial(_head, self.graph), self.params, x_TD, run, self._array(self.max_rows))
        n = next(n for n, block in enumerate(self.graph.blocks) if block.kind == key.kind)
        block = self.graph.blocks[n]
        pages = self.state[block.group][0]
        return self._lower(partial(_block, block.apply), self.params["blocks"][n], pages, x_TD, run, donate="pages",
                           out=(self.place.whole, jax.tree.map(lambda x: x.sharding, pages)))

    def compile_parts(self, keys: Iterable[Key], within: Callable[[], AbstractContextManager]) -> dict[Key, Compiled]:
        """What the compiler says of each, `within` what it must know of the devices, two at a time."""
        keys = tuple(dict.fromkeys(keys))
        with ThreadPoolExecutor(2, thread_name_prefix="jaxinfer-plan") as pool:
            return dict(zip(keys, pool.map(partial(self._compile_part, within=within), keys), strict=True))

    def _compile_part(self, key: Key, within: Callable[[], AbstractContextManager]) -> Compiled:
        where = self.place.mesh, self.place.axes, self.place.device.device_kind
        with kernels.tracing(self.platform, self.forced, *where) as trace, within():
            compiled, stream = self.lower(key).compile(), held(self.stream(key.shape))  # type: ignore[arg-type]
        costs: Any = compiled.cost_analysis() or {}
        costs = costs[0] if isinstance(costs, list) else costs
        seconds = costs.get("optimal_seconds")
        if seconds is not None:
            seconds -= math.floor(min(seconds, 0.0))  # each call that the model cannot estimate is -1 s in it
        missing = frozenset(op for op, ways in NOT_COUNTED.items() if trace.chosen.get(op) in ways)
        temporaries = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0) + 2 * stream  # it goes in and out
        launched = hlo.parse(compiled.as_text() or "").kernels.total() if self.platform == "gpu" else 0
        return Compiled(seconds, missing, temporaries, launched)


def _head(graph: Graph, params: Any, x_TD: jax.Array, run: Run, last_S: jax.Array) -> Any:
    """Of each row's last token the logits, and the likeliest token."""
    return kernels.sample_greedy(graph.head(params, graph.final(params, x_TD[run.last_R])), last_S, run.slot_R)


def _block(apply: Callable, layer: Any, pages: Any, x_TD: jax.Array, run: Run) -> Any:
    """`apply` by names that say which argument is donated."""
    return apply(layer, pages, x_TD, run)
