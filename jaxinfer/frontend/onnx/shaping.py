"""Which values decide shapes: found backwards from the inputs that an op needs to know while JAX traces."""

from __future__ import annotations

from collections.abc import Iterable

from jaxinfer.frontend.onnx.block import Block, Node


def shaping(block: Block, wanted: Iterable[str] = ()) -> set[str]:
    """Names, in `block` or around it, that must be concrete for every op to know its shapes and for `wanted`."""
    names = set(wanted)
    for node in reversed(block.nodes):
        names |= _read(node, names)
    return names


def branching(block: Block) -> set[str]:
    """Names, in `block` or around it, that must be concrete for every `If` to take its branch while JAX traces."""
    conditions = {node.inputs[0] for node in block.nodes if node.op == "If"}
    for node in block.nodes:
        for body in node.blocks():
            conditions |= branching(body) & body.free()
    return shaping(block, conditions)


def _read(node: Node, names: set[str]) -> set[str]:
    asked = [i for i, output in enumerate(node.outputs) if output in names]
    if node.body is not None:
        inner = shaping(node.body, [node.body.outputs[i] for i in asked if node.body.outputs[i]])
        return {outer for formal, outer in zip(node.body.inputs, node.inputs, strict=False) if formal in inner}
    needed = {name for i, name in enumerate(node.inputs) if node.rule.shapes_by(i)}
    if asked and not node.rule.shapes_only:
        needed |= set(node.inputs)
    for body in node.blocks():
        inner = shaping(body, body.outputs if asked else ())
        needed |= inner & body.free()
        needed |= {outer for formal, outer in zip(body.inputs, node.inputs, strict=False) if formal in inner}
    return needed - {""}
