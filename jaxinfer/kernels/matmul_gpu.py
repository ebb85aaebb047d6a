"""Matmuls of few tokens on NVIDIA GPUs, written in Pallas for Triton. They wait for the weights and for nothing else:
every program reads its outputs' weights once, whatever the tokens are. Weights of eight and four bits are widened in
registers, on the way from memory to the matrix units.

Axes: T tokens, I inputs, O outputs (of which a gated layer makes half), C splits of the inputs; of a block that a
program reads at a time, b inputs, which are one dot, and w words.
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
from jaxinfer.kernels.op import platform
from jaxinfer.kernels.quantised import INT4, INT8, Quantised
from jaxinfer.kernels.triton import call, dot, load, power, store
from jaxinfer.kernels.tuned import tuned

GROUP: int = INT4.group  # type: ignore[assignment]  # int4 has groups; as many words come together
RANGE = 16.0  # what activations are divided by to be float16, which so holds a million


class Blocks(NamedTuple):
    """Outputs and inputs of a block of weights (of 64 outputs at most, since `takes_few` asks for whole ones; Hopper's
    own matrix units take no fewer), warps, stages of the loop over the inputs, and the programs that there should be at
    least, where inputs can be split."""

    outputs: int = 64
    inputs: int = 128
    warps: int = 4
    stages: int = 5
    programs: int = 96


def narrow_blocks(rows: int) -> Blocks:
    """For weights of eight and four bits: two warps, and so Ampere's matrix units, which no warp waits for; the sums of
    64 tokens need the registers of four."""
    size = Blocks(inputs=256, warps=2, stages=4, programs=192)
    return size._replace(inputs=128, warps=4) if rows > 32 else size


def blocks(rows: int, format: str | None, is_gated: bool) -> Blocks:
    """For a block of so many tokens, and weights of this format (None: arrays)."""
    names = {None: (f"few/1/{rows}", f"few_gated/1/{rows}"),
             INT8.name: (f"few_int8/1/{rows}", f"few_int8_gated/1/{rows}"),
             INT4.name: (f"few_int4/1/{rows}", f"few_int4_gated/1/{rows}")}
    return tuned(names[format][is_gated], narrow_blocks(rows) if format else Blocks(stages=3 if is_gated else 5))


def few(x_TI: jax.Array, w_OI: jax.Array | Quantised, activation: Callable | None = None) -> jax.Array:
    """`x @ w.T` in float32; with an `activation`, that of its first half times the second, in the weights' dtype.

    Activations are rounded to the weights' dtype, and against weights of eight and four bits to float16, as these are.
    """
    format = held_as(w_OI)
    (T, I), O = x_TI.shape, w_OI.shape[0] // (2 if activation else 1)
    rows = max(TILE, power(T))
    size = blocks(rows, format, activation is not None)
    inputs = min(size.inputs, I & -I)  # whole blocks
    C = 1 if activation else min(power(-(-size.programs * size.outputs // O)), I // inputs)
    C = next(c for c in (C, C // 2, C // 4, 1) if c and not I // inputs % c)  # whole blocks each
    x_TI = operand(x_TI, w_OI)
    out = jax.ShapeDtypeStruct((C, T, O), w_OI.dtype if activation else jnp.float32)
    kernel = partial(_few_kernel, rows=rows, outputs=size.outputs, inputs=inputs, format=format, activation=activation)
    y_CTO = call(kernel, (size.warps, size.stages), grid=(O // size.outputs, C), out=out)(x_TI, *jax.tree.leaves(w_OI))
    return reduce(add, y_CTO)  # XLA does that while it does what comes next, as it would not with a sum over an axis


def _few_kernel(x_ref, *refs, rows, outputs, inputs, format, activation):
    """All tokens, some outputs (with an activation: two times as many), and one split of the inputs."""
    *w_refs, y_ref = refs
    (o, c), (C, T, O), I = (pl.program_id(axis) for axis in range(2)), y_ref.shape, x_ref.shape[1]
    t_T, o_O, one = jnp.arange(rows), o * outputs + jnp.arange(outputs), inputs_of_dot(format, inputs)
    b_b, each, real = jnp.arange(one), I // inputs // C, rows == T or t_T < T

    def step(i, sums):
        n = c * each + i
        x_nTb = [load(x_ref, t_T[:, None], (n * inputs + b + b_b)[None], mask=real if real is True else real[:, None])
                 for b in range(0, inputs, one)]
        w_nOb = [weights(w_refs, partial(_stream, half * O + o_O), n, inputs, format) for half in range(len(sums))]
        for x_Tb, *ws in zip(x_nTb, *w_nOb, strict=True):
            sums = tuple(y_OT + dot(w_Ob, x_Tb, trans_b=True) for y_OT, w_Ob in zip(sums, ws, strict=True))
        return sums

    start = (jnp.zeros((outputs, rows), jnp.float32),) * (2 if activation else 1)
    scale = lambda half: lambda ref: plt.load(ref.at[half * O + o_O])[:, None]
    sums = [y_OT * unit(w_refs, scale(half), format) for half, y_OT in enumerate(lax.fori_loop(0, each, step, start))]
    y_OT = activation(sums[0]) * sums[1] if activation else sums[0]
    store(y_ref, y_OT, c, t_T[None], o_O[:, None], mask=real if real is True else real[None])


def _stream(o_O, ref, n, size):
    """Some rows' n-th `size` numbers, which nobody will read again."""
    return plt.load(ref.at[o_O[:, None], (n * size + jnp.arange(size))[None]], eviction_policy="evict_first")


# What weights of any format are in a kernel, here and for experts.


def held_as(w: jax.Array | Quantised) -> str | None:
    """The format of quantised weights; None of arrays."""
    return w.format if isinstance(w, Quantised) else None


def operand(x: jax.Array, w: jax.Array | Quantised) -> jax.Array:
    """Activations as they meet these weights: in their dtype; in float16, as weights of eight and four bits come."""
    return x.astype(w.dtype) if held_as(w) is None else (x * RANGE**-1).astype(jnp.float16)


def inputs_of_dot(format: str | None, inputs: int) -> int:
    """Of so many inputs of a block, how many one dot has: those of four bits take one for each group."""
    return GROUP if format == INT4.name else inputs


def weights(refs, stream: Callable, n, inputs: int, format: str | None) -> list:
    """The n-th `inputs` of some outputs, as [O, b] for each dot; `stream(ref, n, size)` reads their n-th numbers."""
    if format == INT4.name:
        words_ref, *of_groups = refs
        groups = inputs // GROUP
        scale_gO, minimum_gO = (
            [x_O1.reshape(x_O1.shape[0]) for x_O1 in lax.split(stream(ref, n, groups), (1,) * groups, 1)]
            for ref in of_groups)
        words_nOb = [stream(words_ref, n * (groups // 4) + i, GROUP) for i in range(groups // 4)]
        return [_unpacked(words_nOb[g // 4], g % 4, scale_gO[g], minimum_gO[g]) for g in range(groups)]
    numbers_Ob = stream(refs[0], n, inputs)
    if format is None:
        return [numbers_Ob]
    return [_widened(numbers_Ob) if format == INT8.name else numbers_Ob.astype(jnp.float16)]


def unit(refs, scale: Callable, format: str | None):
    """What sums are to be multiplied by: what activations were divided by; with `scale(ref)`, the outputs' own."""
    return 1.0 if format is None else RANGE if format == INT4.name else scale(refs[1]) * RANGE


def _widened(numbers_Ob):
    """Numbers of eight bits in float16: as the lowest bits of 1024 there, n + 128 is 1152 + n."""
    if platform() != "gpu":
        return numbers_Ob.astype(jnp.float16)
    asm = """{ .reg .b32 n, less;
        mov.b32 less, 0xE480E480;
        xor.b32 n, $2, 0x80808080;
        prmt.b32 $0, n, 0x64646464, 0x4140;
        prmt.b32 $1, n, 0x64646464, 0x4342;
        add.rn.f16x2 $0, $0, less;
        add.rn.f16x2 $1, $1, less; }"""
    return plt.elementwise_inline_asm(asm, args=[numbers_Ob], constraints="=r,=r,r", pack=4, result_shape_dtypes=[
        jax.ShapeDtypeStruct(numbers_Ob.shape, jnp.float16)])[0]


def _unpacked(words_Ob, nth, scale_O, minimum_O):
    """One of the four numbers of each word, times a scale, plus a minimum, in float16.

    Below the bits of 1024 in float16 a number n of four bits is 1024 + n, four bits higher 1024 + 16 n: two are
    unpacked by one instruction and converted by one more (Kim et al., 2022), where a conversion of its own for each
    would take longer than the weights take to come.
    """
    scale_Ob, minimum_Ob = (jnp.broadcast_to(x_O[:, None], words_Ob.shape) for x_O in (scale_O, minimum_O))
    if platform() != "gpu":
        return (words_Ob >> 4 * nth & INT4.most).astype(jnp.float16) * scale_Ob + minimum_Ob
    mask, by, less = [("0x000F000F", "0x3C003C00", "0xE400E400"),  # times 1, less 1024
                      ("0x00F000F0", "0x2C002C00", "0xD400D400")][nth % 2]  # times 1/16, less 64
    asm = f"""{{ .reg .b32 n, by, less;
        mov.b32 by, {by};
        mov.b32 less, {less};
        shr.u32 n, $1, {nth // 2 * 8};
        lop3.b32 n, n, {mask}, 0x64006400, 0xEA;
        fma.rn.f16x2 n, n, by, less;
        fma.rn.f16x2 $0, n, $2, $3; }}"""
    return plt.elementwise_inline_asm(
        asm, args=[words_Ob, scale_Ob, minimum_Ob], constraints="=r,r,r,r", pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words_Ob.shape, jnp.float16)])[0]
