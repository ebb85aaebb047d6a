"""A graph in memory: nodes in order, each with the rule that runs it. Subgraphs and function bodies are Blocks too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.core import Tracer

from jaxinfer.errors import UnsupportedModel
from jaxinfer.frontend.onnx.registry import Rule
from jaxinfer.frontend.onnx.values import Value


@dataclass(frozen=True, eq=False)
class Node:
    """One operation: value names in and out ("" where an optional one is absent), attributes as Python values."""

    op: str
    name: str
    version: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rule: Rule
    attributes: Mapping[str, Any] = field(default_factory=dict)
    body: Block | None = None  # of a function that runs instead of the rule

    @property
    def label(self) -> str:
        return f"node {self.name or '-> ' + ', '.join(self.outputs)!r} ({self.op}-{self.version})"

    def error(self, text: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self.label}: {text}")

    def array(self, value: Value, what: str) -> np.ndarray:
        """`value` as a numpy array. Raises UnsupportedModel if it is only known when the compiled function runs."""
        if isinstance(value, Tracer):
            raise self.error(
                f"input {what!r} decides a shape or a branch, so it must be known while JAX traces, but it depends on "
                "a traced value; leave the graph inputs that it comes from out of jit's arguments (as numpy arrays), "
                "or export the model with a constant here"
            )
        return np.asarray(value)

    def ints(self, value: Value, what: str) -> list[int]:
        """A concrete vector or scalar as Python integers."""
        return [int(number) for number in self.array(value, what).reshape(-1)]

    def blocks(self) -> Iterator[Block]:
        """The subgraphs among the attributes."""
        return (value for value in self.attributes.values() if isinstance(value, Block))


@dataclass(frozen=True, eq=False)
class Block:
    """Nodes in the order of their execution. `constants` hold what is known before any input arrives."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]

    def count(self) -> int:
        """Nodes, with those of subgraphs; a function that is called counts as one."""
        return sum(1 + sum(block.count() for block in node.blocks()) for node in self.nodes)

    def free(self) -> set[str]:
        """Names that are read here and defined outside."""
        defined, free = {*self.inputs, *self.constants}, set[str]()
        for node in self.nodes:
            read = set(node.inputs).union(*(block.free() for block in node.blocks()))
            free |= read - defined
            defined |= set(node.outputs)
        return (free | set(self.outputs) - defined) - {""}
