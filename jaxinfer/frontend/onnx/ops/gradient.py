"""The one operator of training that is a function: derivatives of a value with respect to others, by JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxinfer.frontend.onnx.block import Block, Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value

TRAINING = "ai.onnx.preview.training"


@op("Gradient", domain=TRAINING)
def gradient(
    node: Node, *values: Value, body: Callable[..., list[Value]], xs: list[str], y: str, zs: list[str] | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    """The sum of y's elements, differentiated by each of `xs`; `body` computes y from xs and zs."""
    moving, fixed = values[: len(xs)], values[len(xs) :]
    total = lambda moving: jnp.sum(body(*moving, *fixed)[0])
    return tuple(jax.grad(total)([jnp.asarray(value) for value in moving]))


def between(nodes: Sequence[Node], starts: Sequence[str], end: str) -> Block:
    """The nodes that compute `end` from `starts`; what else they need, they read from the graph around them."""
    wanted, chosen = {end}, []
    for node in reversed(nodes):
        if wanted & set(node.outputs) - set(starts):
            chosen.append(node)
            wanted |= set(node.inputs)
    return Block("gradient", tuple(starts), (end,), tuple(reversed(chosen)), {})
