"""Which block sizes are the fastest for our kernels on this GPU?

Each kernel is timed with each of its candidates on a few calls of real models' shapes; a candidate's figure is the mean
over the calls of its time over the default's. `--write FILE` puts the best into a table like `kernels/tuned.json`,
which is where it belongs: what is there is taken wherever a model runs on a device of this kind.

Axes as in `kernels.attention_gpu` and `kernels.matmul_gpu`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from bench.support.ops import weight
from bench.support.report import publish, table
from jaxinfer.compiler.probe import best
from jaxinfer.graph import Pages, Run
from jaxinfer.kernels import attend, gated, matmul, tracing
from jaxinfer.kernels.attention_gpu import Decode, Prefill
from jaxinfer.kernels.matmul_gpu import Blocks, narrow_blocks
from jaxinfer.kernels.quantised import INT4, INT8, Format
from jaxinfer.kernels.tuned import TABLE, trying

WORTH = 0.99  # of the default's time: what is no better than that is noise
PAGE, POOL = 64, 8192  # slots of a page, and pages: more than any cache holds
WIDTHS = {128: (8, 4), 64: (8, 4)}  # of a head: KV heads, and queries for each
MATMULS = [(6144, 4096), (4096, 4096), (4096, 14336), (3072, 2048), (2048, 2048), (2048, 8192)]
GATES = [(28672, 4096), (16384, 2048)]


class Call(NamedTuple):
    """`function(*args)` runs the kernel `times` times, one after the other; what it returns is dropped."""

    function: Callable
    args: tuple
    times: int


def attention(H: int, lens: list[int], contexts: list[int], times: int = 8) -> Call:
    """Rows of these lengths, of which the last tokens stand at the end of these contexts."""
    (K, G), R, rng = WIDTHS[H], len(lens), np.random.default_rng(0)
    table_RP = rng.permutation(POOL)[: R * (POOL // R)].reshape(R, -1)[:, : -(-max(contexts) // PAGE)]
    ints = lambda x: jnp.asarray(x, jnp.int32)
    longest = max(lens)
    run = Run(ints(np.zeros(sum(lens))), ints(np.cumsum([0, *lens])), ints(contexts), ints(range(R)),
              {"kv": ints(table_RP)}, longest, R if longest == 1 else 0)
    key = jax.random.key(0)
    pages = Pages(*(jax.random.normal(key, (POOL, K, PAGE, H), jnp.bfloat16) for _ in "kv"))
    q_TNH, k_TKH = (jax.random.normal(key, (sum(lens), n, H), jnp.bfloat16) for n in (K * G, K))

    def act(q_TNH, k_TKH, pages, run):
        for _ in range(times):
            q_TNH, pages = attend(q_TNH, k_TKH, k_TKH, pages, run, group="kv", scale=H**-0.5)
        return q_TNH

    return Call(act, (q_TNH, k_TKH, pages, run), times)


def multiply(T: int, shape: tuple[int, int], is_gated: bool, format: Format | None = None) -> Call:
    """Weights that no cache holds together."""
    times = max(2, -(-2**29 // (2 * shape[0] * shape[1])) * (1 if format is None else 2))
    ws = [weight(shape, "bfloat16", format) for _ in range(times)]
    one = (lambda x, w: gated(x, w, jax.nn.silu)) if is_gated else matmul
    return Call(lambda x, ws: [one(x, w) for w in ws], (jnp.ones((T, shape[1]), jnp.bfloat16), ws), times)


def kernels() -> Iterator[tuple[str, tuple, list[tuple], list[Call]]]:
    """The names, defaults, candidates and calls of all that is tuned."""
    for H in WIDTHS:
        calls = [attention(H, [1] * R, [context] * R) for R, context in ((8, 512), (64, 512), (64, 6144))]
        yield f"decode/2/{H}", Decode(), [*itertools.product((1, 2, 4), (2, 3, 4), (132, 264, 528))], calls
        calls = [attention(H, *call) for call in (([2048], [2048]), ([1] * 64 + [1024], [512] * 64 + [1024]),
                                                  ([512] * 4, [4096] * 4))]
        yield f"prefill/2/{H}", Prefill(), [*itertools.product((64, 128), (4, 8), (2, 3, 4))], calls
    for T, is_gated in itertools.product((16, 32, 64), (False, True)):
        calls = [multiply(T, shape, is_gated) for shape in (GATES if is_gated else MATMULS)]
        candidates = [(*size, *how, programs) for size, how, programs in itertools.product(
            ((64, 128), (64, 64), (32, 128)), ((4, 3), (4, 4), (4, 5), (8, 4)), (96,) if is_gated else (96, 192))]
        yield f"few_gated/1/{T}" if is_gated else f"few/1/{T}", Blocks(stages=3 if is_gated else 5), candidates, calls
        for format in INT8, INT4:
            calls = [multiply(T, shape, is_gated, format) for shape in (GATES if is_gated else MATMULS)]
            candidates = [(*size, *how, programs) for size, how, programs in itertools.product(
                ((64, 256), (64, 128), (32, 256), (32, 128)), ((2, 3), (2, 4), (2, 6), (4, 4)),
                (192,) if is_gated else (192, 384))]
            yield f"few_{format.name}{'_gated' * is_gated}/1/{T}", narrow_blocks(T), candidates, calls


def compiled(name: str, blocks: tuple, call: Call, platform: str) -> Any:
    """None where the device has not the shared memory for it."""
    with tracing(platform, kind=jax.devices()[0].device_kind), trying({name: blocks}):
        lowered = jax.jit(lambda *args: call.function(*args)).lower(*call.args)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError:
        return None


def measured(name: str, tried: list[tuple], calls: list[Call]) -> np.ndarray:
    """Seconds of a kernel by candidate and call."""
    times = np.full((len(tried), len(calls)), np.inf)
    for n, call in enumerate(calls):
        with ThreadPoolExecutor(12) as pool:
            programs = list(pool.map(lambda blocks, call=call: compiled(name, blocks, call, "gpu"), tried))
        for i, program in enumerate(programs):
            if program:
                times[i, n] = best(lambda _, run=program, call=call: run(*call.args), rounds=3) / call.times
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="kernels whose names begin so")
    parser.add_argument("--write", type=Path, help="a table of the best, with what is in kernels/tuned.json")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit("there is no GPU here, whose block sizes could be tuned")
    kind, found, lines = jax.devices()[0].device_kind, {name: dict(kinds) for name, kinds in TABLE.items()}, []
    in_us = lambda times: " ".join(f"{1e6 * took:.1f}" for took in times)
    for name, default, candidates, calls in kernels():
        if not name.startswith(tuple(options.only)):
            continue
        tried = list(dict.fromkeys([tuple(default), *candidates]))
        times = measured(name, tried, calls)
        scores = (times / times[0]).mean(1)
        first = int(scores.argmin()) if scores.min() < WORTH else 0
        found.setdefault(name, {})[kind] = list(tried[first])
        lines.append([name, str(tried[0]), in_us(times[0]), str(tried[first]), in_us(times[first]),
                      f"{scores[first]:.3f}"])
        print(*lines[-1], flush=True)
    if options.write:
        rows = (f" {json.dumps(name)}: {json.dumps(kinds)}" for name, kinds in sorted(found.items()))
        options.write.write_text("{\n" + ",\n".join(rows) + "\n}\n")
    body = f"{kind}; microseconds for each call.\n\n" + table(
        ["kernel", "default", "us", "best", "us", "x default"], lines, words=2)
    publish("tune", "Block sizes of our kernels", body, found, keep=True)


if __name__ == "__main__":
    main()
