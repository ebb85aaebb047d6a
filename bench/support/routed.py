"""Routed feed-forward layers of real models with random weights, as chains of calls.

Axes: T tokens, A experts chosen for each, E experts, D model width, F an expert's width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

DTYPE = "bfloat16"


class Shape(NamedTuple):
    """Of a routed layer."""

    E: int
    A: int
    D: int
    F: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.D * self.F * jnp.dtype(DTYPE).itemsize


SHAPES = {"Mixtral-8x7B": Shape(8, 2, 4096, 14336), "Qwen3-30B-A3B": Shape(128, 8, 2048, 768)}


class Layers(NamedTuple):
    """What a chain of calls gets: tokens, and for each call its routing and its weights."""

    x_TD: jax.Array
    routings: list[tuple[jax.Array, jax.Array]]
    weights: list[tuple[jax.Array, jax.Array]]


@partial(jax.jit, static_argnums=0)
def _draw(sizes: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(jax.random.key(0), sizes, DTYPE) * sizes[-1] ** -0.5


def weights(shape: Shape, layers: int) -> list[tuple[jax.Array, jax.Array]]:
    pair = _draw((shape.E, 2 * shape.F, shape.D)), _draw((shape.E, shape.D, shape.F))
    return [pair, *(jax.tree.map(jnp.copy, pair) for _ in range(layers - 1))]


def ask(shape: Shape, T: int, pairs: list[tuple[jax.Array, jax.Array]], calls: int) -> tuple[Layers, float]:
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
