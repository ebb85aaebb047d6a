"""If, Loop and Scan: plain Python where the condition is concrete, `lax` where it is traced.

A subgraph arrives as a function from its inputs to the list of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value, is_concrete, positive_axis

Body = Callable[..., list[Value]]
LONGEST_UNROLLED = 64  # trips; a longer loop of fixed shapes becomes a lax.while_loop


def decided(value: Value) -> bool:
    return not isinstance(value, Tracer)


@op("If")
def if_(node: Node, condition: Value, *, then_branch: Body, else_branch: Body) -> tuple[Value, ...]:
    if decided(condition):
        return tuple(then_branch() if np.asarray(condition).reshape(()) else else_branch())
    try:
        return tuple(lax.cond(condition.reshape(()), _arrays(node, then_branch), _arrays(node, else_branch)))
    except TypeError as error:
        raise node.error("the condition is traced, so both branches must give the same shapes and types: "
                         f"{str(error).splitlines()[0]}") from error


def _arrays(node: Node, branch: Body) -> Callable[[], list[Value]]:
    def run() -> list[Value]:
        values = branch()
        if any(isinstance(value, list) or value is None for value in values):
            raise node.error("the condition is traced, so its branches cannot give sequences or optionals")
        return [jnp.asarray(value) for value in values]

    return run


@op("Loop")
def loop(node: Node, most: Value, condition: Value, *carried: Value, body: Body) -> tuple[Value, ...]:
    """`body(i, condition, *carried)` gives the next condition, the next carried values, and one row per scan output."""
    if decided(most) and decided(condition):
        trips = None if most is None else int(np.asarray(most).reshape(()))
        going = condition is None or bool(np.asarray(condition).reshape(()))
        short = trips is None or trips <= LONGEST_UNROLLED or not _fixed(carried)
        done = _unrolled(node, trips, going, carried, body) if short else None
        if done is not None:
            return done
    return _traced_loop(node, most, condition, carried, body)


def _fixed(carried: Sequence[Value]) -> bool:
    return all(isinstance(value, jax.Array) for value in carried)


def _unrolled(
    node: Node, trips: int | None, going: bool, carried: Sequence[Value], body: Body,
) -> tuple[Value, ...] | None:  # fmt: skip
    """The loop in Python, or None if a condition turns out to be traced."""
    rows: list[list[Value]] = []
    i, state, width = 0, list(carried), len(carried)
    while going and (trips is None or i < trips):
        following, *values = body(np.asarray(i, np.int64), np.asarray(True), *state)
        if not decided(following):
            return None
        state, i, going = values[:width], i + 1, bool(np.asarray(following).reshape(()))
        rows.append(values[width:])
    scans = len(node.outputs) - width
    return *state, *(_stacked(node, [row[k] for row in rows]) for k in range(scans))


def _stacked(node: Node, rows: list[Value]) -> Value:
    if not rows:
        return np.zeros((0,), np.float32)
    return (np if all(map(is_concrete, rows)) else jnp).stack(rows)


class _EndsEarly(Exception):
    """The condition of a loop is computed from traced values."""


def _traced_loop(node: Node, most: Value, condition: Value, carried: Sequence[Value], body: Body) -> tuple[Value, ...]:
    """Fixed shapes: a scan where the number of trips is known, which can be differentiated; else a while loop."""
    if any(isinstance(value, list) or value is None for value in carried):
        raise node.error("the number of trips is traced, so sequences and optionals cannot be carried")
    start = [jnp.asarray(value) for value in carried]
    if most is not None and decided(most) and decided(condition):
        try:
            return _scanned_loop(int(np.asarray(most).reshape(())), start, body)
        except _EndsEarly:
            pass
    if any(node.outputs[len(carried) :]):
        raise node.error("the number of trips is traced, and decides how many rows the scan outputs have; give the "
                         "graph a fixed trip count and a constant condition")
    return _while_loop(most, condition, start, body)


def _scanned_loop(trips: int, start: list[Value], body: Body) -> tuple[Value, ...]:
    width = len(start)

    def step(values, i):
        following, *new = body(i, np.asarray(True), *values)
        if not is_concrete(following) or not following:
            raise _EndsEarly
        return _like(new[:width], values), new[width:]

    state, rows = lax.scan(step, start, jnp.arange(trips))
    return *state, *rows


def _while_loop(most: Value, condition: Value, start: list[Value], body: Body) -> tuple[Value, ...]:
    limit = jnp.asarray(jnp.iinfo(jnp.int32).max if most is None else most).reshape(())
    first = jnp.asarray(True if condition is None else condition).reshape(())

    def step(state):
        i, _, values = state
        following, *new = body(i, np.asarray(True), *values)
        return i + 1, jnp.asarray(following).reshape(()), _like(new[: len(values)], values)

    state = lax.while_loop(lambda s: (s[0] < limit) & s[1], step, (jnp.zeros((), limit.dtype), first, start))
    return tuple(state[2])


def _like(new: Sequence[Value], old: Sequence[Value]) -> list[Value]:
    return [jnp.asarray(n, o.dtype) for n, o in zip(new, old, strict=True)]


@op("Scan", since=9)
def scan(
    node: Node, *values: Value, body: Body, num_scan_inputs: int,
    scan_input_axes: list[int] | None = None, scan_input_directions: list[int] | None = None,
    scan_output_axes: list[int] | None = None, scan_output_directions: list[int] | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    states, inputs = values[:-num_scan_inputs], values[-num_scan_inputs:]
    width, count = len(states), len(node.outputs) - len(states)
    in_axes, out_axes = scan_input_axes or [0] * len(inputs), scan_output_axes or [0] * count
    in_back, out_back = scan_input_directions or [0] * len(inputs), scan_output_directions or [0] * count
    rows = [_along(jnp.moveaxis(x, axis, 0), back) for x, axis, back in zip(inputs, in_axes, in_back, strict=True)]

    def step(carry, row):
        new = body(*carry, *row)
        return _like(new[:width], carry), [jnp.asarray(value) for value in new[width:]]

    state, outputs = lax.scan(step, [jnp.asarray(value) for value in states], rows)
    placed = [jnp.moveaxis(_along(y, back), 0, positive_axis(axis, y.ndim))
              for y, axis, back in zip(outputs, out_axes, out_back, strict=True)]
    return *state, *placed


def _along(x: Value, backwards: int) -> Value:
    return jnp.flip(x, 0) if backwards else x


@op("Scan", since=8)
def scan_8(
    node: Node, lengths: Value, *values: Value, body: Body, num_scan_inputs: int, directions: list[int] | None = None,
) -> tuple[Value, ...]:  # fmt: skip
    """Opset 8 scans axis 1 of every row of a batch."""
    if lengths is not None:
        raise node.error("sequence_lens of Scan-8 is not supported; export with opset 9 or later")
    one = lambda row: scan(node, *row, body=body, num_scan_inputs=num_scan_inputs, scan_input_directions=directions)
    return tuple(jax.vmap(one)([jnp.asarray(value) for value in values]))
