"""Executables of a model whose layers come one by one: what embeds, one program for each kind of block, what ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import jax

from jaxinfer.compiler.buckets import Bucket, Ladder
from jaxinfer.compiler.executables import Executables, Key, pooled, scored
from jaxinfer.graph import Graph, Run, State, begin

TASKS = ("forward", "score", "embed")


class Layers(Protocol):
    """Where a layer's weights come from: `take(i)`, and `give(i, x_TD)` back with what was computed from them. They
    are asked for in order, again and again; a sweep may break off, and the next one begins with the first."""

    def take(self, i: int) -> Any: ...
    def give(self, i: int, x_TD: jax.Array) -> None: ...
    def close(self) -> None: ...


class Streamed(Executables):
    """The same programs as `Executables`, but those that go through the layers are made of parts: "begin", a "block"
    for each kind, which runs for all layers of it, and an "end" for each task. Their `params` lack the blocks. There
    are no several steps in a call: each one needs the host.

    A step holds the host until its last layer has come, so that none is dispatched ahead: a request that ends would
    otherwise cost one more sweep.
    """

    runs_ahead, gives_logits, restarts = False, "end forward", False

    def __init__(self, layers: Layers, graph: Graph, ladder: Ladder, **how: Any):
        self.layers = layers
        single = replace(ladder, buckets=tuple(bucket for bucket in ladder.buckets if bucket.steps == 1))
        super().__init__(graph, single, **how)

    def parts(self, key: Key) -> tuple[Key, ...]:
        if key.kind not in TASKS:
            return (key,)
        kinds = dict.fromkeys(f"block {block.kind}" for block in self.graph.blocks)
        return tuple(Key(kind, key.shape) for kind in ("begin", *kinds, f"end {key.kind}"))

    def prepare(self, *keys: Key) -> list:
        return super().prepare(*(part for key in keys for part in self.parts(key)))

    def fetch(self, *keys: Key) -> Future:
        return super().fetch(*(part for key in keys for part in self.parts(key)))

    def is_ready(self, key: Key) -> bool:
        return all(map(super().is_ready, self.parts(key)))

    def get(self, key: Key, real: int = 1, padded: int = 1) -> Callable:
        parts, find = self.parts(key), super().get
        programs = [find(part, real, padded) for part in parts]
        if parts == (key,):
            return programs[0]
        blocks = {part.kind: program for part, program in zip(parts[1:-1], programs[1:-1], strict=True)}
        return partial(self._sweep, programs[0], [blocks[f"block {block.kind}"] for block in self.graph.blocks],
                       programs[-1])

    def _sweep(self, begins: Callable, blocks: Iterable[Callable], ends: Callable, params: Any, state: State,
               last_S: Any, run: Run, *more: Any) -> tuple:
        run, x_TD = begins(params, last_S, run)
        pages = {name: iter(layers) for name, layers in state.items()}
        written: State = {name: [] for name in state}
        for i, (block, program) in enumerate(zip(self.graph.blocks, blocks, strict=True)):
            x_TD, new = program(self.layers.take(i), next(pages[block.group]), x_TD, run)
            self.layers.give(i, x_TD)
            written[block.group].append(new)
        return written, *ends(params, x_TD, run, *more)

    def lower(self, key: Key) -> jax.stages.Lowered:
        kind, _, which = key.kind.partition(" ")
        if kind not in ("begin", "block", "end"):
            return super().lower(key)
        assert isinstance(key.shape, Bucket)
        outer = {name: part for name, part in self.params.items() if name != "blocks"}
        first = outer, self._array(self.max_rows), self._run(key.shape)
        if kind == "begin":
            return self._lower(partial(begin, self.graph), *first)
        run, x_TD = jax.tree.map(self._like, jax.eval_shape(partial(begin, self.graph), *first))
        if kind == "block":
            i = next(i for i, block in enumerate(self.graph.blocks) if block.kind == which)
            block = self.graph.blocks[i]
            pages = self.state[block.group][sum(b.group == block.group for b in self.graph.blocks[:i])]
            return self._lower(partial(_block, block.apply), self.params["blocks"][i], pages, x_TD, run, donate="pages")
        more = (self._array(key.shape.tokens),) if which == "score" else ()
        return self._lower(partial(ENDS[which], self.graph), outer, x_TD, run, *more)

    def close(self) -> None:
        super().close()
        self.layers.close()


def _block(apply: Callable, params: Any, pages: Any, x_TD: jax.Array, run: Run):
    return apply(params, pages, x_TD, run)


def _forward(graph: Graph, params: Any, x_TD: jax.Array, run: Run):
    return (graph.head(params, graph.final(params, x_TD[run.last_R])),)


def _score(graph: Graph, params: Any, x_TD: jax.Array, run: Run, targets_T: jax.Array):
    return scored(graph, params, graph.final(params, x_TD), run, targets_T)


def _embed(graph: Graph, params: Any, x_TD: jax.Array, run: Run):
    return pooled(graph.final(params, x_TD), run)


ENDS = {"forward": _forward, "score": _score, "embed": _embed}
