"""How fast is the routed feed-forward layer of Mixtral-8x7B and of Qwen3-30B-A3B on this device?

Random weights, in bfloat16 or quantised; every token chooses its experts at random. Beside it runs the second way that
the platform has for them (on a GPU "chunks": every expert is asked about every token), and stands the floor: the
weights of the experts that somebody chose over the memory's bandwidth, or the operations asked for over a large
matmul's rate, whichever takes longer.

Axes: T tokens, A experts chosen for each, E experts, D model width, F an expert's width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from bench.support.report import publish, table
from bench.support.routed import DTYPE, SHAPES, Layers, Shape, ask, chain, weights
from jaxinfer.compiler.probe import bandwidth, best, matmul_rate
from jaxinfer.kernels import routed_ffn
from jaxinfer.kernels.quantised import FP8, INT4, INT8

SPREAD = 8 << 30  # bytes of weights: a layer's have left every cache when it comes again
CALLS = 32  # of a program for few tokens, whose dispatch would take longer than one
CLOSE = 0.02  # of the largest answer: what two ways may differ by, whose sums are rounded in other places

TINY = Shape(8, 2, 128, 128)
FORMATS = {DTYPE: None, **{format.name: format for format in (INT8, INT4, FP8)}}


def seconds(compiled: Callable, layers: Layers) -> float:
    """Of one call."""
    return best(lambda last: compiled(*layers, layers.x_TD if last is None else last)) / len(layers.routings)


def compiled(op: Callable, layers: Layers) -> Callable:
    return jax.jit(partial(chain, op), keep_unused=True).lower(*layers, layers.x_TD).compile()


def check(ways: Sequence[str], layers: Layers) -> float:
    """How far two ways' answers are from each other, in parts of the largest one."""
    first = layers.x_TD, *layers.routings[0], *layers.weights[0]
    mine, other = (jax.jit(partial(routed_ffn, activation=jax.nn.silu, how=way))(*first) for way in ways)
    far = float(jnp.abs(mine - other).max() / jnp.abs(other).max())
    if not far < CLOSE:
        raise SystemExit(f"{ways[0]} is not {ways[1]}: they differ by {far:.3f} of the largest answer")
    return far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 64, 256, 2048])
    parser.add_argument("--weights", nargs="*", choices=list(FORMATS), default=[DTYPE])
    parser.add_argument("--quick", action="store_true", help="a check that it runs, on any device: a tiny shape")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for name in options.shapes}
    if options.quick:
        shapes, options.tokens = {"tiny": TINY}, [1, 16]
    large, wide = (1 << 22, 128) if options.quick else (1 << 31, 8192)
    moves, multiplies = bandwidth(large, 0.02 if options.quick else 0.5), matmul_rate(DTYPE, wide)
    lines, data = [], {"bandwidth": moves, "matmul": multiplies}
    for (name, shape), held in product(shapes.items(), options.weights):
        each = shape.expert_bytes(FORMATS[held])
        pairs = weights(shape, 1 if options.quick else -(-SPREAD // (shape.E * each)), FORMATS[held])
        for T in options.tokens:
            layers, asked = ask(shape, T, pairs, CALLS if T <= 64 and not options.quick else len(pairs))
            example = layers.x_TD, *layers.routings[0], *layers.weights[0]
            takes = partial(routed_ffn.takes, activation=jax.nn.silu)
            ways = [way for way in routed_ffn.available(jax.default_backend()) if takes(way, *example)][:2]
            far = check(ways, layers)
            mine, other = (seconds(compiled(partial(routed_ffn, how=way), layers), layers) for way in ways)
            read, count = asked * each / moves, 6 * shape.D * shape.F * T * shape.A / multiplies
            least = max(read, count)
            data[f"{name} x {T} in {held}"] = {"experts": asked, ways[0]: mine, ways[1]: other, "read": read,
                                               "count": count, "difference": far}
            lines.append([name, held, T, f"{asked:.1f}", f"{1e6 * mine:.1f}", f"{1e6 * other:.1f}",
                          f"{1e6 * least:.1f}", "memory" if read > count else "matmuls", f"{least / mine:.2f}",
                          f"{other / mine:.2f}"])
            print(*lines[-1], flush=True)
    header = ["shape", "weights", "tokens", "experts asked", f"{ways[0]}, us", f"{ways[1]}, us", "floor, us", "by",
              "floor / ours", f"{ways[1]} / ours"]
    on_gpu = jax.default_backend() == "gpu"
    publish("moe", "The routed feed-forward layer" + ("" if on_gpu else f": {jax.default_backend().upper()}"),
            f"{jax.devices()[0].device_kind}: memory moves {moves / 1e12:.2f} TB/s, a matmul of bfloat16 does "
            f"{multiplies / 1e12:.0f} TFLOP/s. Random weights; a layer of a chain; the best of 5 rounds.\n\n"
            + table(header, lines), data, keep=not options.quick, part="" if on_gpu else jax.default_backend(),
            flags=" ".join(sys.argv[1:]))


if __name__ == "__main__":
    main()
