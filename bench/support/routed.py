"""Routed feed-forward layers of real models with random weights, as chains of calls.

Axes: T tokens, A experts chosen for each, E experts, D model width, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.kernels.moe import Weight
from jaxinfer.kernels.quantised import Format, blank

DTYPE = "bfloat16"


class Shape(NamedTuple):
    """Of a routed layer."""

    E: int
    A: int
    D: int
    F: int

    @property
    def stacks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Gates and ups of all experts, and what comes after them."""
        return (self.E, 2 * self.F, self.D), (self.E, self.D, self.F)

    def expert_bytes(self, format: Format | None = None) -> int:
        each = [blank(format, stack, DTYPE) if format else jax.ShapeDtypeStruct(stack, DTYPE) for stack in self.stacks]
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(each)) // self.E


SHAPES = {"Mixtral-8x7B": Shape(8, 2, 4096, 14336), "Qwen3-30B-A3B": Shape(128, 8, 2048, 768)}


class Layers(NamedTuple):
    """What a chain of calls gets: tokens, and for each call its routing and its weights."""

    x_TD: jax.Array
    routings: list[tuple[jax.Array, jax.Array]]
    weights: list[tuple[Weight, Weight]]


@partial(jax.jit, static_argnums=(0, 1))
def _draw(sizes: tuple[int, ...], format: Format | None) -> Weight:
    """Of one deviation, over the root of the inputs; quantised ones, made as they are held, of about as much."""
    key, deviation = jax.random.key(0), sizes[-1] ** -0.5
    if format is None:
        return jax.random.normal(key, sizes, DTYPE) * deviation
    like = blank(format, sizes, DTYPE)
    if format.group:
        full = lambda times: jnp.full(like.scale.shape, times * deviation, like.scale.dtype)
        return replace(like, values=jax.random.bits(key, like.values.shape, like.values.dtype),
                       scale=full(1 / 4.6), minimum=full(-7.5 / 4.6))  # 16 numbers, all as likely
    values = (jax.random.normal(key, sizes, DTYPE) * (format.most / 4)).astype(format.values)
    return replace(like, values=values, scale=jnp.full(like.scale.shape, 4 / format.most * deviation, jnp.float32))


def weights(shape: Shape, layers: int, format: Format | None = None) -> list[tuple[Weight, Weight]]:
    first, second = shape.stacks
    pair = _draw(first, format), _draw(second, format)
    return [pair, *(jax.tree.map(jnp.copy, pair) for _ in range(layers - 1))]


def ask(shape: Shape, T: int, pairs: list[tuple[Weight, Weight]], calls: int) -> tuple[Layers, float]:
    """So many calls at least over these weights, and how many experts each asks on average."""
    rng, repeats = np.random.default_rng(T), -(-calls // len(pairs))
    routings = [(rng.random((T, shape.E)).argsort(1)[:, :shape.A].astype(np.int32), np.full((T, shape.A), 1 / shape.A))
                for _ in range(repeats * len(pairs))]
    x_TD = jnp.asarray(rng.normal(size=(T, shape.D)), jnp.float32)
    asked = np.mean([len(np.unique(expert_TA)) for expert_TA, _ in routings])
    put = [(jnp.asarray(expert_TA), jnp.asarray(weight_TA, jnp.float32)) for expert_TA, weight_TA in routings]
    return Layers(x_TD, put, pairs * repeats), float(asked)


def chain(op: Callable, x_TD: jax.Array, routings: Any, weights: Any, _last: Any) -> jax.Array:
    """One call after the other, each of which waits for the tokens of the one before it, as a router would."""
    op = jax.jit(partial(op, activation=jax.nn.silu))  # traced once
    for routing, pair in zip(routings, weights, strict=True):
        x_TD, routing = jax.lax.optimization_barrier((x_TD, routing))
        x_TD = x_TD + op(x_TD, *routing, *pair)
    return x_TD
