"""Matmuls of few tokens on NVIDIA GPUs, written in Pallas for Triton. They wait for the weights and for nothing else:
every program reads its outputs' weights once, whatever the tokens are.

Axes: T tokens, I inputs, O outputs (of which a gated layer makes half), C splits of the inputs; b inputs that a program
reads at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxinfer.kernels.attention import TILE
from jaxinfer.kernels.triton import call, dot, load, power, store
from jaxinfer.kernels.tuned import tuned


class Blocks(NamedTuple):
    """Outputs and inputs of a block of weights (at most 64 and 128: `takes_few` asks for whole ones; Hopper's matrix
    units take no fewer outputs), warps, stages of the loop over the inputs, and the programs that there should be at
    least, where inputs can be split."""

    outputs: int = 64
    inputs: int = 128
    warps: int = 4
    stages: int = 5
    programs: int = 96


def blocks(rows: int, is_gated: bool) -> Blocks:
    """For a block of so many tokens."""
    return tuned(f"few_gated/1/{rows}" if is_gated else f"few/1/{rows}", Blocks(stages=3 if is_gated else 5))


def few(x_TI: jax.Array, w_OI: jax.Array, activation: Callable | None = None) -> jax.Array:
    """`x @ w.T` in float32; with an `activation`, that of its first half times the second, in the weights' dtype."""
    (T, I), O = x_TI.shape, len(w_OI) // (2 if activation else 1)
    rows = max(TILE, power(T))
    size = blocks(rows, activation is not None)
    C = 1 if activation else min(power(-(-size.programs * size.outputs // O)), I // size.inputs)
    C = next(c for c in (C, C // 2, C // 4, 1) if c and not I // size.inputs % c)  # whole blocks each
    out = jax.ShapeDtypeStruct((C, T, O), w_OI.dtype if activation else jnp.float32)
    kernel = partial(_few_kernel, rows=rows, outputs=size.outputs, inputs=size.inputs, activation=activation)
    act = call(kernel, (size.warps, size.stages), grid=(O // size.outputs, C), out=out)
    y_CTO = act(x_TI.astype(w_OI.dtype), w_OI)
    return reduce(add, y_CTO)  # XLA does that while it does what comes next, as it would not with a sum over an axis


def _few_kernel(x_ref, w_ref, y_ref, *, rows, outputs, inputs, activation):
    """All tokens, some outputs (with an activation: two times as many), and one split of the inputs."""
    (o, c), (C, T, O), I = (pl.program_id(axis) for axis in range(2)), y_ref.shape, w_ref.shape[1]
    t_T, o_O, b_I = jnp.arange(rows), o * outputs + jnp.arange(outputs), jnp.arange(inputs)
    each, real = I // inputs // C, rows == T or t_T < T

    def step(i, sums):
        at_1I = ((c * each + i) * inputs + b_I)[None]
        x_TI = load(x_ref, t_T[:, None], at_1I, mask=real if real is True else real[:, None])
        ws = [plt.load(w_ref.at[(half * O + o_O)[:, None], at_1I], eviction_policy="evict_first")
              for half in range(len(sums))]
        return tuple(y_OT + dot(w_OI, x_TI, trans_b=True) for y_OT, w_OI in zip(sums, ws, strict=True))

    start = (jnp.zeros((outputs, rows), jnp.float32),) * (2 if activation else 1)
    sums = lax.fori_loop(0, each, step, start)
    y_OT = activation(sums[0]) * sums[1] if activation else sums[0]
    store(y_ref, y_OT, c, t_T[None], o_O[:, None], mask=real if real is True else real[None])
