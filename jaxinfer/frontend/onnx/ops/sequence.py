"""Sequences are Python lists, an empty optional is None. Positions must be known while tracing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.ops.layout import split_at
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, namespace, positive_axis


@op("SequenceConstruct", since=11)
def sequence_construct(node: Node, *values: Value) -> list[Value]:
    return list(values)


@op("SequenceEmpty", since=11)
def sequence_empty(node: Node, *, dtype: int = 1) -> list[Value]:
    return []


def place(node: Node, position: Value, default: int) -> int:
    return default if position is None else node.ints(position, "position")[0]


@op("SequenceAt", since=11, shaping=(1,))
def sequence_at(node: Node, sequence: list[Value], position: Value) -> Value:
    return sequence[place(node, position, 0)]


@op("SequenceInsert", since=11, shaping=(2,))
def sequence_insert(node: Node, sequence: list[Value], value: Value, position: Value = None) -> list[Value]:
    at = positive_axis(place(node, position, len(sequence)), len(sequence))
    return [*sequence[:at], value, *sequence[at:]]


@op("SequenceErase", since=11, shaping=(1,))
def sequence_erase(node: Node, sequence: list[Value], position: Value = None) -> list[Value]:
    at = positive_axis(place(node, position, -1), len(sequence))
    return sequence[:at] + sequence[at + 1 :]


@op("SequenceLength", since=11, shapes_only=True)
def sequence_length(node: Node, sequence: list[Value]) -> Value:
    return np.asarray(len(sequence), np.int64)


@op("ConcatFromSequence", since=11)
def concat_from_sequence(node: Node, sequence: list[Value], *, axis: int, new_axis: int = 0) -> Value:
    xp = namespace(*sequence)
    return xp.stack(sequence, axis) if new_axis else xp.concatenate(sequence, axis)


@op("SplitToSequence", since=11, shaping=(1,))
def split_to_sequence(node: Node, x: Value, split: Value = None, *, axis: int = 0, keepdims: int = 1) -> list[Value]:
    """A scalar gives the size of every piece; without one, pieces of size 1 may lose the axis."""
    total = x.shape[axis]
    if split is None:
        pieces = split_at(x, [1] * total, axis)
        return list(pieces) if keepdims else [piece.squeeze(axis) for piece in pieces]
    sizes = node.ints(split, "split")
    return list(split_at(x, sizes if split.ndim else _pieces(total, sizes[0]), axis))


def _pieces(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]


@op("SequenceMap", since=17)
def sequence_map(
    node: Node, sequence: list[Value], *others: Value, body: Callable[..., list[Value]],
) -> tuple[Value, ...]:  # fmt: skip
    """`body` on every element; further sequences are read in step, tensors are the same each time."""
    at = lambda other, i: other[i] if isinstance(other, list) else other
    rows = [body(value, *(at(other, i) for other in others)) for i, value in enumerate(sequence)]
    return tuple([row[k] for row in rows] for k in range(len(node.outputs)))


@op("Optional", since=15)
def optional(node: Node, value: Value = None, *, type: object = None) -> tuple[Value, ...]:
    return (value,)


@op("OptionalHasElement", since=15, shapes_only=True)
def optional_has_element(node: Node, value: Value = None) -> Value:
    return np.asarray(value is not None)


@op("OptionalGetElement", since=15)
def optional_get_element(node: Node, value: Value) -> tuple[Value, ...]:
    if value is None:
        raise node.error("the optional is empty")
    return (value,)
