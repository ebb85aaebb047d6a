"""Random calls of the ops: what to give to `check_op`. Axes as in `testing.runs`; I inputs, O outputs, D width."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxinfer.kernels.quantised import SCHEMES, blank, quantise
from jaxinfer.testing.check import Alone, Case
from jaxinfer.testing.runs import DECODE, GROUP, SEEDS, Numbers, RaggedRun, RunShape, ragged_runs

POISON, JUNK = (np.nan, 4096.0), (-(2**31), 2**31 - 1)  # in numbers that nobody may read, and in tables
SIZES = {"q": (2.0, 0.0, 64.0), "v": (2.0, 2.0**-20, 2.0**20)}  # usual; uniform and sharp attention; extreme values


@dataclass(frozen=True, eq=False, repr=False)
class AttendCase(Case):
    """A call of `attend`, with the run and the numbers that it was made of."""

    ragged: RaggedRun | None = None
    numbers: Numbers | None = None


@st.composite
def attend_cases(draw, shape: RunShape = DECODE, heads: tuple[int, int] = (4, 2), *, width: int = 8,
                 page_size: int | None = None, dtype: str = "float32", kv_cache_dtype: str | None = None,
                 window: int | None = None, softcap: float | None = None, sinks: bool = False) -> AttendCase:
    """Ragged rows on pages in any order, some of them shared or there twice: q, k, v, pages and run for
    `attend(..., group, scale)`.

    `heads` are N query heads on K KV heads of `width`, in pages of `dtype`, or of `kv_cache_dtype` ("int8", "fp8")
    with scales in `dtype`, and of `page_size` tokens (by default the shape's 4). Our kernels for GPUs want 16 at least
    of both sizes, for instance `page_size=16, width=64`, and `check_op` leaves out what an implementation does not
    take. Padded tokens, slots that nobody has written and pages that a window hides hold NaN, and something else in
    the twin. With `sinks`, each head has one.
    """
    shape = shape if page_size is None else replace(shape, S=page_size)
    ragged = draw(ragged_runs(shape, window))
    q_size, v_size = (draw(st.sampled_from(SIZES[name]), label=f"{name} size") for name in "qv")
    numbers, scale = Numbers.of(ragged, heads, dtype, width, q_size, v_size, kv_cache_dtype), 0.4
    make = lambda ragged, numbers, i: (*numbers.padded(shape, POISON[i]), ragged.run(JUNK[i]))
    real, r = slice(0, ragged.ends[-1]), draw(st.integers(0, len(ragged.lens) - 1), label="the row alone")
    mine = ragged.mine(r)
    sink_N = np.random.default_rng(ragged.seed).normal(size=heads[0]) * draw(st.sampled_from((3.0, 40.0)))
    return AttendCase(
        args=make(ragged, numbers, 0),
        arrays={"sinks_N": jnp.asarray(sink_N, jnp.float32)} if sinks else {},
        options={"group": GROUP, "scale": scale, "window": window, "softcap": softcap},
        real=lambda output: output[0][real],
        exact=lambda output: output[1],
        twins=(make(ragged, numbers, 1),),
        alone=(Alone(make(ragged.alone(r), numbers.part(mine), 0), lambda output: output[0][mine],
                     lambda output: output[0][:ragged.lens[r]]),),
        atol=attend_error(numbers, dtype, scale),
        ragged=ragged, numbers=numbers,
    )


def attend_error(numbers: Numbers, dtype: str, scale: float) -> float:
    """How far rounding may take attention: weights are rounded to the pages' dtype and errors of scores, which grow
    with the scores, are relative errors of weights."""
    top = lambda *arrays: max(float(np.nanmax(np.abs(x), initial=0)) for x in arrays)
    scores = top(numbers.q) * top(numbers.k, numbers.pages[0]) * numbers.q.shape[-1] * scale
    weights = 2.0**-8 if dtype == "bfloat16" else 0.0
    return (weights + 2.0**-22 * scores + 2.0**-19) * top(numbers.v, numbers.pages[1])


@st.composite
def matmul_cases(draw, rows: int = 5, inputs: int = 64, outputs: int = 48, dtype: str = "float32",
                 quantize: str | None = None) -> Case:
    """x_TI in float32 and w_OI in `dtype`, which is what x is rounded to as well; with `quantize` ("int8", "int4",
    "fp8") a weight for `kernels.OPS["matmul_int8"]` and so on, some of whose implementations round x to eight bits.

    Of several rows the last is padding: NaN, and something else in the twin. Our kernel for GPUs wants bfloat16,
    `inputs` in blocks of 128 and `outputs` in blocks of 64."""
    rng, real = np.random.default_rng(draw(SEEDS)), max(1, rows - 1)
    size = draw(st.sampled_from((1.0, 2.0**-20, 2.0**20)), label="size")
    x, others = (rng.normal(size=(rows, inputs)) * size for _ in range(2))
    w, r = rng.normal(size=(outputs, inputs)), draw(st.integers(0, real - 1), label="the row alone")
    others[r] = x[r]
    weight, rounding = jnp.asarray(w, dtype), 0.0
    if quantize is not None:
        weight = jax.tree.map(jnp.asarray, quantise(w, blank(SCHEMES[quantize]["ffn"], w.shape, dtype)))
        rounding = (2.0**-4 if quantize == "fp8" else 2.0**-7) * float(np.abs(x).max() * np.abs(w).max())
    args = lambda x, i: (jnp.asarray(np.where(np.arange(rows)[:, None] < real, x, POISON[i]), jnp.float32), weight)
    return Case(args(x, 0), real=lambda y: y[:real], twins=(args(x, 1),), atol=(2.0**-20 * size + rounding) * inputs,
                alone=(Alone(args(others, 0), lambda y: y[r], lambda y: y[r]),))


@st.composite
def norm_cases(draw, shape: tuple[int, ...] = (5, 32), offset: float = 0.0) -> Case:
    """x and weight for `rms_norm(x, weight, eps, offset)`; some rows are all zeros."""
    rng = np.random.default_rng(draw(SEEDS))
    x = rng.normal(size=shape) * draw(st.sampled_from((1.0, 2.0**-20, 2.0**20)), label="size")
    x[rng.random(shape[:-1]) < 0.2] = 0
    return Case((jnp.asarray(x, jnp.float32), jnp.asarray(rng.normal(size=shape[-1:]), jnp.float32)),
                options={"eps": 1e-5, "offset": offset}, rtol=2e-6 * shape[-1], atol=1e-6)

