"""How fast is the routed feed-forward layer of Mixtral-8x7B and of Qwen3-30B-A3B on this device?

Random weights in bfloat16; every token chooses its experts at random. Beside it runs the platform's second way (on a
GPU "chunks": every expert is asked about every token), and stands the floor: the weights of the experts that somebody
chose over the memory's bandwidth, or the operations asked for over a large matmul's rate, whichever takes longer.
`--tune` tries other tiles for the kernels of GPUs instead, and says which are the fastest for each number of rows.

Axes: T tokens, A experts chosen for each, E experts, D model width, F an expert's width.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from bench.support.report import publish, table
from jaxinfer.compiler.probe import bandwidth, best, matmul_rate
from jaxinfer.kernels import moe_gpu, routed_ffn
from jaxinfer.kernels.moe_gpu import Tile, Tiling

DTYPE = "bfloat16"
SPREAD = 8 << 30  # bytes of weights: a layer's have left every cache when it comes again
CALLS = 32  # of a program for few tokens, whose dispatch would take longer than one
CLOSE = 0.02  # of the largest answer: what two ways may differ by, whose sums are rounded in other places

# Tried by `--tune`, for blocks of few rows and of many.
FEW = [Tile(*sizes) for sizes in (
    (32, 128, 4, 4), (32, 256, 4, 3), (64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 128, 4, 5),
    (64, 256, 4, 3), (64, 256, 4, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 128, 8, 3))]
MANY = [Tile(*sizes) for sizes in (
    (64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 8, 4), (64, 128, 8, 3), (128, 32, 8, 4), (128, 64, 4, 3), (128, 64, 4, 4),
    (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 3), (256, 64, 8, 3), (256, 64, 8, 4))]


class Shape(NamedTuple):
    """Of a routed layer."""

    E: int
    A: int
    D: int
    F: int

    @property
    def expert_bytes(self) -> int:
        return 3 * self.D * self.F * jnp.dtype(DTYPE).itemsize

    @property
    def layers(self) -> int:
        """How many there are of it, each with weights of its own."""
        return -(-SPREAD // (self.E * self.expert_bytes))


SHAPES = {"Mixtral-8x7B": Shape(8, 2, 4096, 14336), "Qwen3-30B-A3B": Shape(128, 8, 2048, 768)}
TINY = Shape(8, 2, 64, 48)


class Layers(NamedTuple):
    """What a chain of calls gets: tokens, and for each call its routing and its weights."""

    x_TD: jax.Array
    routings: list[tuple[jax.Array, jax.Array]]
    weights: list[tuple[jax.Array, jax.Array]]


def weights(shape: Shape, layers: int) -> list[tuple[jax.Array, jax.Array]]:
    draw = lambda *sizes: jax.jit(lambda: jax.random.normal(jax.random.key(0), sizes, DTYPE) * sizes[-1] ** -0.5)()
    pair = draw(shape.E, 2 * shape.F, shape.D), draw(shape.E, shape.D, shape.F)
    return [pair, *(jax.tree.map(jnp.copy, pair) for _ in range(layers - 1))]


def ask(shape: Shape, T: int, pairs: list[tuple[jax.Array, jax.Array]], calls: int) -> tuple[Layers, float]:
    """So many calls at least over these weights, and how many experts each asks on average."""
    rng, repeats = np.random.default_rng(T), -(-calls // len(pairs))
    routings = [(rng.random((T, shape.E)).argsort(1)[:, :shape.A].astype(np.int32), np.full((T, shape.A), 1 / shape.A))
                for _ in range(repeats * len(pairs))]
    x_TD = jnp.asarray(rng.normal(size=(T, shape.D)), jnp.float32)
    asked = np.mean([len(np.unique(expert_TA)) for expert_TA, _ in routings])
    put = [(jnp.asarray(expert_TA), jnp.asarray(weight_TA, jnp.float32)) for expert_TA, weight_TA in routings]
    return Layers(x_TD, put, pairs * repeats), float(asked)


def chain(op: Callable, x_TD: jax.Array, routings: Any, weights: Any, _last: Any) -> jax.Array:
    """One call after the other, each of which waits for the tokens of the one before it, as a router would."""
    op = jax.jit(op, static_argnums=5)  # traced once
    for routing, pair in zip(routings, weights, strict=True):
        x_TD, routing = jax.lax.optimization_barrier((x_TD, routing))
        x_TD = x_TD + op(x_TD, *routing, *pair, jax.nn.silu)
    return x_TD


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


def fastest_tiles(shape: Shape, T: int, layers: Layers, quick: bool) -> list[tuple[float, Tiling]]:
    """The fastest tiles for each number of rows near the one that is taken, and how long a call takes with them."""
    def fastest(tilings: list[Tiling]) -> tuple[float, Tiling]:
        with ThreadPoolExecutor(8) as pool:
            programs = list(pool.map(attempt, tilings))
        return min((seconds(program, layers), tiling) for program, tiling in zip(programs, tilings, strict=True)
                   if program)

    def attempt(tiling: Tiling) -> Callable | None:
        try:
            return compiled(partial(moe_gpu.routed_ffn_triton, tiling=tiling), layers)
        except jax.errors.JaxRuntimeError:  # more shared memory than there is
            return None

    at = [tiling.rows for tiling in moe_gpu.TILINGS].index(moe_gpu.tiling_for(T * shape.A, shape.E).rows)
    found = []
    for base in moe_gpu.TILINGS[max(0, at - 1):at + 2]:
        tiles = (FEW if base.rows <= 32 else MANY)[:1 if quick else None]
        _, base = fastest([base, *(base._replace(gate_up=tile) for tile in tiles)])
        found.append(fastest([base, *(base._replace(down=tile) for tile in tiles)]))
        print(T, f"{1e6 * found[-1][0]:.1f} us", found[-1][1], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[1, 16, 64, 256, 2048])
    parser.add_argument("--tune", action="store_true", help="try other tiles for the kernels of GPUs; nothing is kept")
    parser.add_argument("--quick", action="store_true", help="a check that it runs, on any device: a tiny shape")
    options = parser.parse_args()
    shapes = {name: SHAPES[name] for name in options.shapes}
    if options.quick:
        shapes, options.tokens = {"tiny": TINY}, [1, 16]
    ways = routed_ffn.available(jax.default_backend())[:2]
    large, wide = (1 << 22, 128) if options.quick else (1 << 31, 8192)
    moves, multiplies = bandwidth(large, 0.02 if options.quick else 0.5), matmul_rate(DTYPE, wide)
    lines, data = [], {"bandwidth": moves, "matmul": multiplies}
    for name, shape in shapes.items():
        pairs = weights(shape, 1 if options.quick else shape.layers)
        for T in options.tokens:
            layers, asked = ask(shape, T, pairs, CALLS if T <= 64 and not options.quick else len(pairs))
            if options.tune:
                lines += [[name, T, f"{1e6 * took:.1f}", tiling.rows, tuple(tiling.gate_up), tuple(tiling.down)]
                          for took, tiling in fastest_tiles(shape, T, layers, options.quick)]
                continue
            far = check(ways, layers)
            mine, other = (seconds(compiled(partial(routed_ffn, how=way), layers), layers) for way in ways)
            read, count = asked * shape.expert_bytes / moves, 6 * shape.D * shape.F * T * shape.A / multiplies
            least = max(read, count)
            data[f"{name} x {T}"] = {"experts": asked, ways[0]: mine, ways[1]: other, "read": read, "count": count,
                                     "difference": far}
            lines.append([name, T, f"{asked:.1f}", f"{1e6 * mine:.1f}", f"{1e6 * other:.1f}", f"{1e6 * least:.1f}",
                          "memory" if read > count else "matmuls", f"{least / mine:.2f}", f"{other / mine:.2f}"])
            print(*lines[-1], flush=True)
    if options.tune:
        print(table(["shape", "tokens", "us", "rows", "gate and up: outputs, inputs, warps, stages", "down"], lines))
        return
    header = ["shape", "tokens", "experts asked", f"{ways[0]}, us", f"{ways[1]}, us", "floor, us", "by",
              "floor / ours", f"{ways[1]} / ours"]
    publish("moe", "The routed feed-forward layer",
            f"{jax.devices()[0].device_kind}: memory moves {moves / 1e12:.2f} TB/s, a matmul of bfloat16 does "
            f"{multiplies / 1e12:.0f} TFLOP/s. Random weights, bfloat16; a layer of a chain; the best of 5 rounds.\n\n"
            + table(header, lines), data, keep=not options.quick)


if __name__ == "__main__":
    main()
