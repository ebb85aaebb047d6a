"""Compute once, at load time, what depends on constants alone."""

from __future__ import annotations

from collections import ChainMap
from dataclasses import replace

import numpy as np

from jaxinfer.frontend.onnx.block import Block, Node
from jaxinfer.frontend.onnx.run import run_node

LARGEST = 1 << 20  # elements of a folded result; a larger one would cost more memory than it saves time


def fold(block: Block) -> tuple[Block, int]:
    """The block without the nodes whose inputs are all constants, and how many there were."""
    constants, kept, folded = dict(block.constants), [], 0
    for node in block.nodes:
        values = _results(node, constants)
        if values is None:
            kept.append(node)
        else:
            constants |= dict(zip(node.outputs, values, strict=False))
            folded += 1
    read = {*block.outputs, *(name for node in kept for name in (*node.inputs, *_free(node)))}
    return replace(block, nodes=tuple(kept), constants={k: v for k, v in constants.items() if k in read}), folded


def _free(node: Node) -> set[str]:
    return set[str]().union(*(block.free() for block in node.blocks()))


def _results(node: Node, constants: dict[str, np.ndarray]) -> list[np.ndarray] | None:
    if node.body is not None or not node.rule.fixed or any(node.blocks()):
        return None
    if not node.inputs or any(name and name not in constants for name in node.inputs):
        return None
    try:
        values = list(run_node(node, ChainMap(constants)))
    except Exception:  # it fails again, with its reason, when the graph runs
        return None
    fine = all(isinstance(value, np.ndarray) and value.size <= LARGEST for value in values)
    return values if fine else None
