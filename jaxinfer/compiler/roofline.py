"""What a step must compute and move on each device, op by op, from the shapes of its arrays alone.

Every operand is read once and every result written once; the stream is float32. Source of the model: Williams, Waterman
and Patterson, "Roofline", 2009. Axes: T tokens, R rows, D model width, N query heads, K KV heads, H head width, O
outputs, I inputs, E experts, A experts of a token, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import kernels
from jaxinfer.compiler.buckets import Bucket, decode
from jaxinfer.compiler.hardware import Work
from jaxinfer.compiler.placement import Placement, held
from jaxinfer.graph import Block, Graph, Leaf, Run, StateGroup
from jaxinfer.kernels.moe import widened
from jaxinfer.kernels.quantised import FP8, INT8, Quantised
from jaxinfer.kernels.quantised_pages import QuantisedPages, format_of

STREAM = 4  # bytes of a float32
KERNELS = 5  # of a block beside one for each leaf: rotary, attention's two, additions (XLA makes 11 or 12 for a Llama)
# How often a format's matmul multiplies, and in what, by its implementation; all others once, in the weight's dtype.
MULTIPLIES = {(INT8.name, "w8a16"): (2, "int8"), (INT8.name, "w8a8"): (1, "int8"),
              (FP8.name, "w8a8"): (1, "float8_e4m3fn")}


@dataclass(frozen=True, eq=False)
class Roofline:
    """The work of a graph's steps: `params` and `state` are the shapes of arrays as they are placed, `A` are the
    experts that a token asks (0: all there are). Ops choose as they would where this is `tracing`."""

    graph: Graph
    params: Any
    state: Any
    place: Placement
    A: int = 0

    def embed(self, bucket: Bucket) -> list[Work]:
        x_TD, looked_up = self.width * bucket.tokens, sum(_row(x) for _, x in self._embedding) * bucket.tokens
        return [Work("other", "float32", 0, looked_up + STREAM * x_TD), *self._sum("vocab", STREAM * x_TD)]

    def block(self, n: int, bucket: Bucket, rows: int, context: int) -> list[Work]:
        """Of the `n`-th block: the matmuls of all its leaves, attention of `rows` rows, and what is between them."""
        block, T, x_TD = self.graph.blocks[n], bucket.tokens, self.width * bucket.tokens
        works = [Work("other", "float32", 0, 2 * STREAM * x_TD, KERNELS - 1)]  # additions to the stream
        for leaf, x in leaves(self.graph.spec["blocks"][n], self.params["blocks"][n]):
            works.append(self._leaf(leaf, x, T))
            if len(leaf.shape) > 1:
                works += self._sum(leaf.axes[-1], STREAM * T * leaf.shape[-2])
        return [*works, self._attend(n, block, bucket, rows, context)]

    def head(self, bucket: Bucket) -> list[Work]:
        """The last tokens' norm and logits, and a search for the likeliest."""
        logits = STREAM * bucket.rows * self.graph.vocab
        return [*(self._leaf(leaf, x, bucket.rows) for leaf, x in self._head), Work("other", "float32", 0, logits),
                *self._sum("vocab", logits)]

    def _leaf(self, leaf: Leaf, x: Any, T: int) -> Work:
        """A matrix meets T tokens, experts' those that ask them; a vector scales or shifts a stream as wide."""
        shape = _piece(x)
        if len(shape) == 1:
            return Work("other", "float32", 0, held(x) + 2 * STREAM * T * shape[0])
        I, O = shape[-1], shape[-2]
        times, dtype, format = _multiplies(x)
        if len(shape) == 2:
            moved = held(x) + STREAM * T * (I + O)
            return Work("matmul", dtype, 2 * times * T * O * I, moved, shape=(format, str(x.dtype), T, O, I))
        if format and kernels.OPS["routed_ffn"].choice() == "triton" and widened(x):
            times, dtype = 1, _product(x.dtype)
        E, A = shape[0], self.A or shape[0]
        asked = 1 - (1 - A / E) ** T  # of the experts, the share that somebody asks, if all are as likely
        return Work("routed_ffn", dtype, 2 * times * T * A * O * I, held(x) * asked + STREAM * T * A * (I + O),
                    shape=(format, str(x.dtype), max(1, round(T * A / max(1.0, E * asked))), O, I))

    def _attend(self, n: int, block: Block, bucket: Bucket, rows: int, context: int) -> Work:
        group = next(group for group in self.graph.groups if group.name == block.group)
        pages, shards = self.state[group.name][0], self.place.shards("heads")
        K, H = group.kv_heads // shards, group.head_width
        N = max(K, queries(self.graph.spec["blocks"][n], group) // shards)
        new = min(bucket.longest, context)
        seen = context if group.window is None else min(context, group.window + new - 1)
        pairs = rows * new * (2 * seen - new + 1) / 2 if group.window is None else rows * new * min(seen, group.window)
        slots = math.prod(pages.shape[:1] + pages.shape[2:3])
        moved = rows * seen * held(pages) / slots + STREAM * bucket.tokens * (2 * N + 2 * K) * H
        format = format_of(pages.k).name if isinstance(pages, QuantisedPages) else None
        return Work("attend", _product(pages.dtype), 4 * N * H * pairs, moved,
                    shape=(rows, new, seen, N, K, H, str(pages.dtype), format))

    def _sum(self, axis: str | None, size: int) -> list[Work]:
        """Over the devices that a logical axis is cut over: each sends and gets nearly all of it twice."""
        n = self.place.shards(axis)
        return [Work("sum", "float32", 0, 2 * size * (n - 1) / n)] if n > 1 else []

    @cached_property
    def width(self) -> int:
        """Of the stream."""
        return jax.eval_shape(partial(self.graph.embed), self.params, self._run(decode(1))).shape[1]

    @cached_property
    def _embedding(self) -> list[tuple[Leaf, Any]]:
        return list(read_by(self.graph.embed, self.graph.spec, self.params, self._run(decode(1))))

    @cached_property
    def _head(self) -> list[tuple[Leaf, Any]]:
        x_RD = jax.ShapeDtypeStruct((1, self.width), jnp.float32)
        return list(read_by(lambda params, x: self.graph.head(params, self.graph.final(params, x)), self.graph.spec,
                            self.params, x_RD))

    def _run(self, bucket: Bucket) -> Run:
        ints, R = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32), bucket.rows
        return Run(ints(bucket.tokens), ints(R + 1), ints(R), ints(R), {}, bucket.longest, bucket.singles)


def leaves(spec: Any, params: Any) -> list[tuple[Leaf, Any]]:
    """Each leaf with its array, or its quantised ones."""
    flat, tree = jax.tree.flatten(spec, is_leaf=lambda x: isinstance(x, Leaf))
    return list(zip(flat, tree.flatten_up_to(params), strict=True))


def read_by(function: Callable, spec: Any, params: Any, *args: Any) -> Iterator[tuple[Leaf, Any]]:
    """The leaves, with their arrays, that a function of params reads."""
    jaxpr = jax.make_jaxpr(partial(function))(params, *args).jaxpr
    used = {id(v) for eqn in jaxpr.eqns for v in eqn.invars}
    of_params = iter(id(v) in used for v in jaxpr.invars[: len(jax.tree.leaves(params))])
    for leaf, x in leaves(spec, params):
        if any([next(of_params) for _ in jax.tree.leaves(x)]):
            yield leaf, x


def queries(spec: Any, group: StateGroup) -> int:
    """A block's query heads: its output projection reads as many, and its inputs are an axis of heads."""
    wide = (leaf.shape[-1] for leaf in jax.tree.leaves(spec, is_leaf=lambda x: isinstance(x, Leaf))
            if len(leaf.shape) > 1 and leaf.axes[-1] == "heads")
    return max(wide, default=group.kv_heads * group.head_width) // group.head_width


def _multiplies(x: Any) -> tuple[int, str, str | None]:
    """How often a weight's matmul multiplies, in what, and the weight's format."""
    if not isinstance(x, Quantised):
        return 1, _product(x.dtype), None
    times, dtype = MULTIPLIES.get((x.format, kernels.OPS[f"matmul_{x.format}"].choice()), (1, _product(x.dtype)))
    return times, dtype, x.format


def _product(dtype: Any) -> str:
    """What numbers of this dtype are multiplied in."""
    return "bfloat16" if jnp.dtype(dtype).itemsize < 4 else "float32"


def _piece(x: Any) -> tuple[int, ...]:
    """The shape of a weight on one device."""
    if isinstance(x, Quantised):
        *rows, inputs = _piece(x.values)
        return (*rows, x.shape[-1] * inputs // x.values.shape[-1])
    return x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape


def _row(x: Any) -> float:
    """Bytes of one of a table's rows."""
    return held(x) / _piece(x)[0]
