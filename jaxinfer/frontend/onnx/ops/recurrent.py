"""RNN, GRU and LSTM over padded sequences, as one `lax.scan` per direction.

Axes: T time, B batch, I input, H hidden, D directions, G gates. The product with the input is taken for all steps at
once, before the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxinfer.frontend.onnx.block import Node
from jaxinfer.frontend.onnx.ops import activation
from jaxinfer.frontend.onnx.ops.layout import reversed_steps
from jaxinfer.frontend.onnx.registry import op
from jaxinfer.frontend.onnx.values import Value

Function = Callable[[Value], Value]
UNROLL = 8  # steps; a shorter scan is written out

# By name: the function, and its default alpha and beta.
ACTIVATIONS: dict[str, tuple[Callable[..., Value], tuple[float, ...]]] = {
    "relu": (lambda x: jnp.maximum(x, 0), ()),
    "tanh": (jnp.tanh, ()),
    "sigmoid": (jax.nn.sigmoid, ()),
    "affine": (lambda x, a, b: a * x + b, (1.0, 0.0)),
    "leakyrelu": (activation.leaky_relu, (0.01,)),
    "thresholdedrelu": (lambda x, a: jnp.where(x > a, x, 0), (1.0,)),
    "scaledtanh": (lambda x, a, b: a * jnp.tanh(b * x), (1.0, 1.0)),
    "hardsigmoid": (activation.hard_sigmoid, (0.2, 0.5)),
    "elu": (activation.elu, (1.0,)),
    "softsign": (lambda x: x / (1 + jnp.abs(x)), ()),
    "softplus": (activation.softplus, ()),
}


@dataclass(frozen=True)
class Setup:
    """What RNN, GRU and LSTM share."""

    functions: list[list[Function]]  # by direction
    reversed: list[bool]
    hidden: int
    clip: float | None
    batch_first: bool

    def limit(self, x: Value) -> Value:
        return x if self.clip is None else jnp.clip(x, -self.clip, self.clip)


def setup(
    node: Node, r: Value, defaults: list[str], activations: list[str] | None, alphas: list[float] | None,
    betas: list[float] | None, clip: float | None, direction: str, layout: int,
) -> Setup:  # fmt: skip
    directions = {"forward": [False], "reverse": [True], "bidirectional": [False, True]}[direction]
    names, alphas, betas = activations or defaults * len(directions), list(alphas or []), list(betas or [])
    functions = [_activation(node, name, alphas, betas) for name in names]
    per = len(functions) // len(directions)
    grouped = [functions[i * per : (i + 1) * per] for i in range(len(directions))]
    return Setup(grouped, directions, r.shape[-1], clip, bool(layout))


def _activation(node: Node, name: str, alphas: list[float], betas: list[float]) -> Function:
    """alpha and beta are listed only for the functions that take them."""
    if name.lower() not in ACTIVATIONS:
        raise node.error(f"the activation {name!r} is not one of {', '.join(ACTIVATIONS)}")
    function, defaults = ACTIVATIONS[name.lower()]
    given = [source.pop(0) if source else default for source, default in zip((alphas, betas), defaults, strict=False)]
    return lambda x: function(x, *given)


Step = Callable[[tuple[Value, ...], Value], tuple[Value, ...]]  # (states, input product [B, G * H]) -> states


def run(
    how: Setup, x: Value, w: Value, b: Value, lengths: Value, initial: list[Value],
    step_of: Callable[[int], Step],
) -> tuple[Value, ...]:  # fmt: skip
    """Y [T, D, B, H], then the last value of every state [D, B, H]. `step_of(d)` makes the step of direction d."""
    x_TBI = jnp.swapaxes(x, 0, 1) if how.batch_first else jnp.asarray(x)
    batch = x_TBI.shape[1]
    outputs, finals = [], []
    for d, backwards in enumerate(how.reversed):
        states = tuple(_initial(how, state, d, batch, x_TBI.dtype) for state in initial)
        inputs = _flipped(x_TBI, lengths) if backwards else x_TBI
        gates_TBG = inputs @ w[d].T + (0 if b is None else b[d][: w.shape[1]])
        y, states = _scanned(step_of(d), states, gates_TBG, lengths)
        outputs.append(_flipped(y, lengths) if backwards else y)
        finals.append(states)
    y_TDBH, last = jnp.stack(outputs, 1), [jnp.stack(parts) for parts in zip(*finals, strict=True)]
    if not how.batch_first:
        return y_TDBH, *last
    return y_TDBH.transpose(2, 0, 1, 3), *(jnp.swapaxes(state, 0, 1) for state in last)


def _initial(how: Setup, state: Value, d: int, batch: int, dtype: np.dtype) -> Value:
    if state is None:
        return jnp.zeros((batch, how.hidden), dtype)
    return jnp.asarray(state)[:, d] if how.batch_first else jnp.asarray(state)[d]


def _flipped(x_TB: Value, lengths: Value) -> Value:
    return jnp.flip(x_TB, 0) if lengths is None else reversed_steps(x_TB, jnp.asarray(lengths), 1, 0)


def _scanned(
    step: Step, states: tuple[Value, ...], gates_TBG: Value, lengths: Value,
) -> tuple[Value, tuple[Value, ...]]:  # fmt: skip
    """A row that has ended keeps its states, and its outputs are zero."""
    time = gates_TBG.shape[0]

    def body(states: tuple[Value, ...], at: tuple[Value, Value]) -> tuple[tuple[Value, ...], Value]:
        t, gates = at
        new = step(states, gates)
        if lengths is None:
            return new, new[0]
        live = (t < lengths)[:, None]
        kept = tuple(jnp.where(live, n, old) for n, old in zip(new, states, strict=True))
        return kept, jnp.where(live, new[0], 0)

    states, y = lax.scan(body, states, (jnp.arange(time), gates_TBG), unroll=max(time, 1) if time <= UNROLL else 1)
    return y, states


@op("RNN", since=7)
def rnn(
    node: Node, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, initial_h: Value = None, *,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, layout: int = 0,
) -> tuple[Value, ...]:  # fmt: skip
    how = setup(node, r, ["Tanh"], activations, activation_alpha, activation_beta, clip, direction, layout)

    def step_of(d: int) -> Step:
        (f,), bias = how.functions[d], 0 if b is None else b[d][how.hidden :]
        return lambda states, gates: (f(how.limit(gates + states[0] @ r[d].T + bias)),)

    return run(how, x, w, b, lengths, [initial_h], step_of)


@op("GRU", since=7)
def gru(
    node: Node, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, initial_h: Value = None, *,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, layout: int = 0, linear_before_reset: int = 0,
) -> tuple[Value, ...]:  # fmt: skip
    """Gates in the order update, reset, new."""
    how = setup(node, r, ["Sigmoid", "Tanh"], activations, activation_alpha, activation_beta, clip, direction, layout)
    n = how.hidden

    def step_of(d: int) -> Step:
        f, g = how.functions[d]
        bias = jnp.zeros(3 * n, x.dtype) if b is None else b[d][3 * n :]

        def step(states: tuple[Value, ...], gates: Value) -> tuple[Value, ...]:
            h = states[0]
            both = f(how.limit(gates[:, : 2 * n] + h @ r[d][: 2 * n].T + bias[: 2 * n]))
            update, reset = both[:, :n], both[:, n:]
            if linear_before_reset:
                past = reset * (h @ r[d][2 * n :].T + bias[2 * n :])
            else:
                past = (reset * h) @ r[d][2 * n :].T + bias[2 * n :]
            new = g(how.limit(gates[:, 2 * n :] + past))
            return ((1 - update) * new + update * h,)

        return step

    return run(how, x, w, b, lengths, [initial_h], step_of)


@op("LSTM", since=7)
def lstm(
    node: Node, x: Value, w: Value, r: Value, b: Value = None, lengths: Value = None, initial_h: Value = None,
    initial_c: Value = None, p: Value = None, *,
    activation_alpha: list[float] | None = None, activation_beta: list[float] | None = None,
    activations: list[str] | None = None, clip: float | None = None, direction: str = "forward",
    hidden_size: int | None = None, input_forget: int = 0, layout: int = 0,
) -> tuple[Value, ...]:  # fmt: skip
    """Gates in the order input, output, forget, cell; peepholes `p` in the order input, output, forget."""
    default = ["Sigmoid", "Tanh", "Tanh"]
    how = setup(node, r, default, activations, activation_alpha, activation_beta, clip, direction, layout)
    n = how.hidden

    def step_of(d: int) -> Step:
        f, g, h = how.functions[d]
        bias = 0 if b is None else b[d][4 * n :]
        peep_i, peep_o, peep_f = (0, 0, 0) if p is None else (p[d][:n], p[d][n : 2 * n], p[d][2 * n :])

        def step(states: tuple[Value, ...], gates: Value) -> tuple[Value, ...]:
            last, cell = states
            i, o, forget, c = jnp.split(gates + last @ r[d].T + bias, 4, -1)
            i = f(how.limit(i + peep_i * cell))
            forget = 1 - i if input_forget else f(how.limit(forget + peep_f * cell))
            cell = forget * cell + i * g(how.limit(c))
            return f(how.limit(o + peep_o * cell)) * h(cell), cell

        return step

    return run(how, x, w, b, lengths, [initial_h, initial_c], step_of)
