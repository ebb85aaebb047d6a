"""Which block sizes are the fastest for our kernels on this GPU?

Each kernel is timed with each of its candidates on a call of a real model's shape, and with the fastest of them on some
more; a candidate's figure is the mean over the calls of its time over the default's. `--write FILE` puts the best into
a table like `kernels/tuned.json`, which is where it belongs: what is there is taken wherever a model runs on a device
of this kind.

Axes as in `kernels.attention_gpu`, `kernels.matmul_gpu` and `kernels.moe_gpu`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from bench.support.ops import weight
from bench.support.report import publish, table
from bench.support.routed import SHAPES, Shape, ask, chain, weights
from jaxinfer.compiler.probe import best
from jaxinfer.graph import Pages, Run
from jaxinfer.kernels import attend, gated, matmul, routed_ffn, tracing
from jaxinfer.kernels.attention_gpu import Decode, Prefill
from jaxinfer.kernels.matmul_gpu import Blocks, narrow_blocks
from jaxinfer.kernels.moe_gpu import NARROW, TILINGS, tiling_for
from jaxinfer.kernels.quantised import FP8, INT4, INT8, Format
from jaxinfer.kernels.tuned import TABLE, trying

WORTH = 0.99  # of the default's time: what is no better than that is noise
ON = 5  # of a kernel's candidates, the fastest in the first call, are tried in the others
LEAST = 0.01  # seconds that a round of a measurement takes
PAGE, POOL = 64, 8192  # slots of a page, and pages: more than any cache holds
CACHED = 2**27  # bytes: more than twice what any cache holds
WIDTHS = {128: (8, 4), 64: (8, 4)}  # of a head: KV heads, and queries for each
MATMULS = [(4096, 14336), (6144, 4096), (4096, 4096), (3072, 2048), (2048, 2048), (2048, 8192)]
GATES = [(28672, 4096), (16384, 2048)]
FEW_ROWS = [(32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4),
            (64, 128, 4, 5), (64, 256, 4, 3), (64, 256, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 8, 3)]
MANY_ROWS = [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 8, 3), (128, 32, 8, 4), (128, 64, 4, 3),
             (128, 64, 4, 4), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4)]


class Call(NamedTuple):
    """`function(*make())` runs the kernel `times` times, one after the other; what it returns is dropped."""

    function: Callable
    make: Callable[[], tuple]
    times: int


class Kernel(NamedTuple):
    """What is tuned: by its name in the table, the default, what is tried instead, and the calls that are timed."""

    name: str
    default: tuple
    candidates: list[tuple]
    calls: list[Call]


def attention(H: int, lens: list[int], contexts: list[int], times: int = 8) -> Call:
    """Rows of these lengths, of which the last tokens stand at the end of these contexts."""
    (K, G), R, longest = WIDTHS[H], len(lens), max(lens)

    def make():
        ints, key = lambda x: jnp.asarray(x, jnp.int32), jax.random.key(0)
        table_RP = np.random.default_rng(0).permutation(POOL)[: R * (POOL // R)].reshape(R, -1)
        run = Run(ints(np.zeros(sum(lens))), ints(np.cumsum([0, *lens])), ints(contexts), ints(range(R)),
                  {"kv": ints(table_RP[:, : -(-max(contexts) // PAGE)])}, longest, R if longest == 1 else 0)
        pages = Pages(*(jax.random.normal(key, (POOL, K, PAGE, H), jnp.bfloat16) for _ in "kv"))
        q_TNH, k_TKH = (jax.random.normal(key, (sum(lens), n, H), jnp.bfloat16) for n in (K * G, K))
        return q_TNH, k_TKH, pages, run

    def act(q_TNH, k_TKH, pages, run):
        for _ in range(times):
            q_TNH, pages = attend(q_TNH, k_TKH, k_TKH, pages, run, group="kv", scale=H**-0.5)
        return q_TNH

    return Call(act, make, times)


def multiply(T: int, shape: tuple[int, int], is_gated: bool, format: Format | None = None) -> Call:
    """Weights that no cache holds together."""
    bits = {None: 16, INT8: 8, INT4: 4}[format]
    times = max(2, -(-CACHED * 8 // (bits * shape[0] * shape[1])))

    def act(x, ws):
        call = (lambda x, w: gated(x, w, jax.nn.silu)) if is_gated else (lambda x, w: matmul(x, w))
        one = jax.jit(call)  # traced once, and anew for each candidate
        return [one(x, w) for w in ws]

    make = lambda: (jnp.ones((T, shape[1]), jnp.bfloat16), [weight(shape, "bfloat16", format) for _ in range(times)])
    return Call(act, make, times)


def routed(shape: Shape, T: int, format: Format | None, times: int = 4) -> Call:
    """One layer's experts again and again, of which no cache holds many."""
    make = lambda: ask(shape, T, weights(shape, 1, format), times)[0]
    act = lambda x_TD, routings, pairs: chain(routed_ffn, x_TD, routings, pairs, None)
    return Call(act, make, times)


def kernels() -> Iterator[Kernel]:
    """All that is tuned."""
    for H in WIDTHS:
        calls = [attention(H, [1] * R, [context] * R) for R, context in ((64, 6144), (64, 512), (8, 512))]
        yield Kernel(f"decode/2/{H}", Decode(), [*itertools.product((1, 2, 4), (2, 3, 4), (132, 264, 528))], calls)
        calls = [attention(H, *call) for call in (([2048], [2048]), ([1] * 64 + [1024], [512] * 64 + [1024]),
                                                  ([512] * 4, [4096] * 4))]
        yield Kernel(f"prefill/2/{H}", Prefill(), [*itertools.product((64, 128), (4, 8), (2, 3, 4))], calls)
    for T, is_gated in itertools.product((16, 32, 64), (False, True)):
        calls = [multiply(T, shape, is_gated) for shape in (GATES if is_gated else MATMULS)]
        candidates = [(*size, *how, programs) for size, how, programs in itertools.product(
            ((64, 128), (64, 64), (32, 128)), ((4, 3), (4, 4), (4, 5), (8, 4)), (96,) if is_gated else (96, 192))]
        name = f"few_gated/1/{T}" if is_gated else f"few/1/{T}"
        yield Kernel(name, Blocks(stages=3 if is_gated else 5), candidates, calls)
        for format in INT8, INT4:
            calls = [multiply(T, shape, is_gated, format) for shape in (GATES if is_gated else MATMULS)]
            candidates = [(*size, *how, programs) for size, how, programs in itertools.product(
                ((64, 256), (64, 128), (32, 256), (32, 128)), ((2, 3), (2, 4), (2, 6), (4, 4)),
                (192,) if is_gated else (192, 384))]
            yield Kernel(f"few_{format.name}{'_gated' * is_gated}/1/{T}", narrow_blocks(T), candidates, calls)
    for format in None, INT8, INT4, FP8:
        of = f"_{format.name}" if format else ""
        for tiling in NARROW if format else TILINGS:
            calls = [routed(shape, T, format) for shape in SHAPES.values() for T in tokens(shape, tiling.rows)]
            candidates = FEW_ROWS if tiling.rows <= 32 else MANY_ROWS
            if format:  # of which int4 is read 128 inputs at a time
                candidates = list(dict.fromkeys((outputs, 128, *how) for outputs, _, *how in candidates))
            yield Kernel(f"routed_gate_up{of}/1/{tiling.rows}", tiling.gate_up, candidates, calls)
            yield Kernel(f"routed_down{of}/1/{tiling.rows}", tiling.down, candidates, calls)


def tokens(shape: Shape, rows: int) -> list[int]:
    """Numbers of tokens, of a decode step, a chunk or a long prompt, for which blocks of so many rows are taken."""
    return [T for T in (16, 64, 128, 256, 512, 2048) if tiling_for(T * shape.A, shape.E).rows == rows][-2:]


def compiled(name: str, blocks: tuple, call: Call, args: tuple, kind: str) -> Any:
    """A call's program for a kind of GPU. None where that has not the shared memory for it."""
    with tracing("gpu", kind=kind), trying({name: blocks}):
        lowered = jax.jit(lambda *args: call.function(*args)).lower(*args)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError:
        return None


def measured(kernel: Kernel, tried: list[tuple], kind: str) -> np.ndarray:
    """Seconds by candidate and call. Those that are not among the fastest in the first call are tried in no other;
    the first candidate, the default, is in all."""
    times = np.full((len(tried), len(kernel.calls)), np.inf)
    going = range(len(tried))
    for n, call in enumerate(kernel.calls):
        args = call.make()
        with ThreadPoolExecutor(12) as pool:
            one = partial(compiled, kernel.name, call=call, args=args, kind=kind)
            programs = list(pool.map(one, (tried[i] for i in going)))
        for i, program in zip(going, programs, strict=True):
            if program:
                once = lambda _, run=program, args=args: run(*args)
                times[i, n] = best(once, least=LEAST, rounds=3) / call.times
        going = sorted({0, *times[:, 0].argsort()[:ON].tolist()})
    return times


def write(found: dict[str, dict[str, list[int]]], path: Path) -> None:
    rows = (f" {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in sorted(found.items()))
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="kernels whose names begin so")
    parser.add_argument("--write", type=Path, help="a table of the best so far, with what is in kernels/tuned.json")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("there is no GPU here, whose block sizes could be tuned")
    kind, found, lines = jax.devices()[0].device_kind, {name: dict(kinds) for name, kinds in TABLE.items()}, []
    in_us = lambda times: " ".join(f"{1e6 * took:.1f}" for took in times)
    start = time.perf_counter()
    for kernel in kernels():
        if not kernel.name.startswith(tuple(options.only) or ""):
            continue
        tried = list(dict.fromkeys([tuple(kernel.default), *kernel.candidates]))
        times = measured(kernel, tried, kind)
        scores = (times / times[0]).mean(1)
        first = int(scores.argmin()) if scores.min() < WORTH else 0
        found.setdefault(kernel.name, {})[kind] = list(tried[first])
        lines.append([kernel.name, str(tried[0]), in_us(times[0]), str(tried[first]), in_us(times[first]),
                      f"{scores[first]:.3f}"])
        print(f"{time.perf_counter() - start:.0f} s:", *lines[-1], flush=True)
        if options.write:
            write(found, options.write)
    body = f"{kind}; microseconds for each call.\n\n" + table(
        ["kernel", "default", "us", "best", "us", "x default"], lines, words=2)
    names = f": {', '.join(options.only)}" if options.only else ""
    publish("tune", f"Block sizes of our kernels{names}", body, found, keep=True)


if __name__ == "__main__":
    main()
