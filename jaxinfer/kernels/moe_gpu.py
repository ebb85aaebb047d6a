"""The routed feed-forward layer on NVIDIA GPUs, written in Pallas for Triton: pairs are sorted by expert and cut into
blocks of one expert each, two kernels multiply block by block, and a token's answers are added in the order in which
its router gave them.

Axes: T tokens, A experts chosen for each, E experts, D model width, F an expert's width, O its gates and ups (2 F),
P pairs of a token and one of its experts (T A), N blocks, B rows of a block; of a tile o outputs and i inputs; of what
is sorted k keys at a time.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxinfer.kernels.attention import TILE
from jaxinfer.kernels.matmul_gpu import RANGE, held_as, inputs_of_dot, operand, unit, weights
from jaxinfer.kernels.quantised import FP8, INT4, INT8
from jaxinfer.kernels.triton import call, dot, load, power, store
from jaxinfer.kernels.tuned import tuned

WIDE = 64  # what Hopper's matrix units take at least of one side: of the outputs, where rows are fewer
KEYS = 512  # compared at a time with those of PLACES pairs
PLACES = 16
SORT = 8, 1  # warps, and stages of a kernel's loop


class Tile(NamedTuple):
    """What a program multiplies at a time, beside the rows of its block; its warps, and its loop's stages."""

    outputs: int
    inputs: int
    warps: int
    stages: int

    def within(self, outputs: int, inputs: int) -> Tile:
        """A tile no larger than what there is to multiply."""
        fit = lambda most, size: max(TILE, min(most, power(size)))
        return self._replace(outputs=fit(self.outputs, outputs), inputs=fit(self.inputs, inputs))


class Tiling(NamedTuple):
    """Rows of a block, and the tiles of the two matmuls; `gate_up` has as many gates as ups."""

    rows: int
    gate_up: Tile
    down: Tile


# By rows. Few rows wait for the weights, which deep pipelines read; many for the arithmetic.
TILINGS = (
    Tiling(16, Tile(64, 128, 4, 3), Tile(64, 128, 4, 5)),
    Tiling(32, Tile(64, 128, 4, 3), Tile(64, 128, 4, 5)),
    Tiling(64, Tile(64, 64, 4, 4), Tile(128, 64, 4, 4)),
    Tiling(128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 4)),
)


# With weights of eight and four bits (not measured yet): 128 inputs, since four groups of int4 share their words.
NARROW = (
    Tiling(16, Tile(64, 128, 4, 4), Tile(64, 128, 4, 4)),
    Tiling(32, Tile(64, 128, 4, 4), Tile(64, 128, 4, 4)),
    Tiling(64, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3)),
    Tiling(128, Tile(64, 128, 8, 3), Tile(128, 128, 8, 3)),
)


def tiling_for(pairs: int, experts: int, format: str | None = None) -> Tiling:
    """The first whose blocks have twice the rows that an expert has on average, so that few experts have a second block
    and their weights are read once; or the last. Its tiles are those that were measured, where they were."""
    tilings = NARROW if format else TILINGS
    rows, *tiles = next((tiling for tiling in tilings if tiling.rows * experts >= 2 * pairs), tilings[-1])
    names = {None: (f"routed_gate_up/1/{rows}", f"routed_down/1/{rows}"),
             INT8.name: (f"routed_gate_up_int8/1/{rows}", f"routed_down_int8/1/{rows}"),
             INT4.name: (f"routed_gate_up_int4/1/{rows}", f"routed_down_int4/1/{rows}"),
             FP8.name: (f"routed_gate_up_fp8/1/{rows}", f"routed_down_fp8/1/{rows}")}
    return Tiling(rows, *map(tuned, names[format], tiles))


class Blocks(NamedTuple):
    """The pairs in the order of their experts, each `t A + a`; and of each block its expert, and the places in that
    order where its rows begin and where its expert's end. A block that is none begins after its end."""

    pair_P: jax.Array
    expert_N: jax.Array
    first_N: jax.Array
    end_N: jax.Array


def routed_ffn_triton(x_TD, expert_TA, weight_TA, gate_up_EOD, down_EDF, *, activation, tiling: Tiling | None = None):
    """Reads the experts that somebody chose, once for each of their blocks, and no other. What a matmul is given is
    rounded to the weights' dtype (to float16, where weights of eight and four bits are widened to it in registers), and
    so is each expert's answer; sums are in float32.

    A row of a matmul does not know the other rows of its block: what shares it changes no bit.
    """
    (T, A), (E, D, F) = expert_TA.shape, down_EDF.shape
    format = held_as(gate_up_EOD)
    rows, gate_up, down = tiling or tiling_for(T * A, E, format)
    blocks = by_blocks(expert_TA.reshape(-1), E, rows)
    h_dtype, by = (down_EDF.dtype, 1.0) if format is None else (jnp.float16, RANGE**-1)
    kernel = partial(_gate_up_kernel, activation=activation, choices=A, rows=rows, format=format, by=by)
    h_PF = _multiplied(kernel, gate_up.within(F, D), blocks, operand(x_TD, gate_up_EOD), gate_up_EOD,
                       out=(F, h_dtype))
    kernel = partial(_down_kernel, rows=rows, format=held_as(down_EDF))
    y_PD = _multiplied(kernel, down.within(D, F), blocks, weight_TA.reshape(-1), h_PF, down_EDF,
                       out=(D, down_EDF.dtype))
    y_TAD = jnp.where((expert_TA < E)[..., None], y_PD.reshape(T, A, D), 0).astype(jnp.float32)
    return sum(y_TAD[:, a] for a in range(A))


def _multiplied(kernel, tile: Tile, blocks: Blocks, *arrays, out: tuple) -> jax.Array:
    """What a kernel makes of each pair: so many outputs, of a dtype. Blocks of one expert run beside each other, and
    share what they read of it."""
    (outputs, dtype), arrays = out, jax.tree.leaves(arrays)
    grid = len(blocks.expert_N), pl.cdiv(outputs, tile.outputs)
    shape = [jax.ShapeDtypeStruct((len(blocks.pair_P), outputs), dtype)]
    return call(partial(kernel, tile=tile), (tile.warps, tile.stages), grid=grid, out=shape)(*blocks, *arrays)[0]


def by_blocks(expert_P: jax.Array, experts: int, rows: int) -> Blocks:
    """The blocks of all experts, as few as there are; pairs of expert E, whom nobody asks, are in none."""
    P, asked = len(expert_P), min(experts, len(expert_P))
    N = asked + (P - asked) // rows  # the most there can be: one row for each expert, and the others in full blocks
    out = [jax.ShapeDtypeStruct((size,), jnp.int32) for size in (P, N, N, N)]
    kernel = partial(_sort_kernel, experts=experts, rows=rows)
    return Blocks(*call(kernel, SORT, grid=(pl.cdiv(P, PLACES) + 1,), out=out)(expert_P))


def _sort_kernel(expert_ref, pair_ref, *block_refs, experts, rows):
    """The programs find the places of PLACES pairs each, and the last one the blocks: all in one kernel, since a decode
    step has time for few."""
    program, last = pl.program_id(0), pl.num_programs(0) - 1
    pl.when(program < last)(lambda: _sort(expert_ref, pair_ref, program * PLACES + jnp.arange(PLACES)))
    pl.when(program == last)(lambda: _cut(expert_ref, *block_refs, experts=experts, rows=rows))


def _sort(expert_ref, pair_ref, p_X):
    """A pair's place is how many come before it: P comparisons for each."""
    P, k_k = len(expert_ref), jnp.arange(KEYS)
    key_of = lambda p_X: load(expert_ref, p_X, mask=p_X < P) * P + p_X  # no two are equal
    key_X = key_of(p_X)

    def count(i, before_X):
        p_k = i * KEYS + k_k
        return before_X + ((key_of(p_k)[None] < key_X[:, None]) & (p_k < P)[None]).astype(jnp.int32).sum(1)

    place_X = lax.fori_loop(0, pl.cdiv(P, KEYS), count, jnp.zeros_like(p_X))
    store(pair_ref, p_X, jnp.where(p_X < P, place_X, P), mask=p_X < P)


def _cut(expert_ref, block_expert_ref, first_ref, end_ref, *, experts, rows):
    """Each expert's pairs into blocks, and the blocks that nobody needs."""
    P, N, k_k, e_E = len(expert_ref), len(first_ref), jnp.arange(KEYS), jnp.arange(power(experts))

    def count(i, pairs_E):
        p_k = i * KEYS + k_k
        expert_k = jnp.where(p_k < P, load(expert_ref, p_k, mask=p_k < P), experts)
        return pairs_E + (expert_k[:, None] == e_E[None]).astype(jnp.int32).sum(0)

    pairs_E = lax.fori_loop(0, pl.cdiv(P, KEYS), count, jnp.zeros_like(e_E))
    pairs_E = jnp.where(e_E < experts, pairs_E, 0)
    blocks_E, end_E = (pairs_E + rows - 1) // rows, jnp.cumsum(pairs_E)
    before_E = jnp.cumsum(blocks_E) - blocks_E

    def write(nth, _):
        """The blocks that have so many of their expert's before them."""
        mask = nth < blocks_E
        n_E = jnp.where(mask, before_E + nth, N)
        store(block_expert_ref, e_E, n_E, mask=mask)
        store(first_ref, end_E - pairs_E + nth * rows, n_E, mask=mask)
        store(end_ref, end_E, n_E, mask=mask)

    lax.fori_loop(0, blocks_E.max(), write, None)
    n_N = jnp.arange(power(N))
    mask = (n_N >= blocks_E.sum()) & (n_N < N)
    for ref, none in ((block_expert_ref, 0), (first_ref, 1), (end_ref, 0)):
        store(ref, jnp.full_like(n_N, none), n_N, mask=mask)


def _rows(pair_ref, first, end, rows):
    """The places of a block's rows, which of them are real, and their pairs (the first one where they are not)."""
    place_B = first + jnp.arange(rows)
    real_B = place_B < end
    return place_B, real_B, load(pair_ref, place_B, mask=real_B)


def _sides(rows, tile):
    """Whether a result is [o, B] and not [B, o]; and what makes a vector of its rows, or of its outputs, as wide."""
    first, second = lambda x: x[:, None], lambda x: x[None]
    return (True, second, first) if rows < WIDE <= tile.outputs else (False, first, second)


def _gate_up_kernel(pair_ref, expert_ref, first_ref, end_ref, x_ref, *refs, activation, choices, rows, format, by,
                    tile):
    """Some of the gates and ups of one block: activation(gate) * up, `by` what the other matmul wants, at the places
    that its pairs were sorted to."""
    *w_refs, h_ref = refs
    n, f_o, F = pl.program_id(0), pl.program_id(1) * tile.outputs + jnp.arange(tile.outputs), h_ref.shape[1]
    first, end = first_ref[n], end_ref[n]

    @pl.when(first < end)
    def _():
        place_B, real_B, pair_B = _rows(pair_ref, first, end, rows)
        within_o = jnp.minimum(f_o, F - 1)
        gate, up = _multiply(x_ref, pair_B // choices, w_refs, expert_ref[n], (within_o, F + within_o), tile, format)
        _, row, output = _sides(rows, tile)
        store(h_ref, activation(gate) * up * by, row(place_B), output(f_o), mask=row(real_B) & output(f_o < F))


def _down_kernel(pair_ref, expert_ref, first_ref, end_ref, weight_ref, h_ref, *refs, rows, format, tile):
    """Some of the outputs of one block, weighed; a pair's are written where it was before the sort."""
    *w_refs, y_ref = refs
    n, d_o, (P, D) = pl.program_id(0), pl.program_id(1) * tile.outputs + jnp.arange(tile.outputs), y_ref.shape
    first, end = first_ref[n], end_ref[n]

    @pl.when(first < end)
    def _():
        place_B, real_B, pair_B = _rows(pair_ref, first, end, rows)
        row_B, within_o = jnp.minimum(place_B, P - 1), jnp.minimum(d_o, D - 1)
        (y,) = _multiply(h_ref, row_B, w_refs, expert_ref[n], (within_o,), tile, format)
        _, row, output = _sides(rows, tile)
        weighed = y * row(load(weight_ref, pair_B, mask=real_B))
        store(y_ref, weighed, row(jnp.where(real_B, pair_B, P)), output(d_o), mask=row(real_B) & output(d_o < D))


def _multiply(x_ref, row_B, w_refs, e, outputs, tile, format):
    """Rows of `x` with each of these ranges of expert `e`'s outputs, in float32; the rows are read once for all."""
    inputs, rows, one = x_ref.shape[1], len(row_B), inputs_of_dot(format, tile.inputs)
    outputs_first, _, output = _sides(rows, tile)
    policy = "evict_first" if rows < WIDE else None  # then hardly any block reads weights that another one has read

    def read(ref, n, size, *at, **how):
        i_1i = n * size + jnp.arange(size)[None]
        mask = True if format == INT4.name or inputs % size == 0 else i_1i < inputs
        return load(ref, *at, i_1i, mask=mask, **how)

    def add(n, sums):
        x_nBi = [read(x_ref, n * (tile.inputs // one) + i, one, row_B[:, None]) for i in range(tile.inputs // one)]
        stream = lambda o_o: lambda ref, n, size: read(ref, n, size, e, o_o[:, None], eviction_policy=policy)
        w_noi = [weights(w_refs, stream(o_o), n, tile.inputs, format) for o_o in outputs]
        for x_Bi, *ws in zip(x_nBi, *w_noi, strict=True):
            both = [(w_oi, x_Bi) if outputs_first else (x_Bi, w_oi) for w_oi in ws]
            sums = tuple(so_far + dot(*pair, trans_b=True) for so_far, pair in zip(sums, both, strict=True))
        return sums

    shape = (tile.outputs, rows) if outputs_first else (rows, tile.outputs)
    start = (jnp.zeros(shape, jnp.float32),) * len(outputs)
    scale = lambda o_o: lambda ref: output(load(ref, e, o_o, mask=True))
    return [y * unit(w_refs, scale(o_o), format)
            for y, o_o in zip(lax.fori_loop(0, pl.cdiv(inputs, tile.inputs), add, start), outputs, strict=True)]
