"""How much faster is a decode step on several devices than on one, and what is the share of what they exchange?

Forward steps of a Llama-3-8B shape with random weights, in bfloat16, through the engine's Executables: 64 rows at a
context of 512, each drawing the likeliest token. What the devices exchange is read from the optimised program, and
timed alone, one sum after the other.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bench.support.decoding import decode_run
from bench.support.report import publish, table
from bench.support.shapes import SHAPES
from jaxinfer import compiler, kernels
from jaxinfer.compiler import Executables, Key, Ladder
from jaxinfer.compiler.buckets import decode
from jaxinfer.compiler.placement import Placement, spread
from jaxinfer.frontend.architectures import architecture
from jaxinfer.graph import Graph
from jaxinfer.runtime import memory as planning
from jaxinfer.scheduler import PageGroup

ASKED, DTYPE = 1.35, jnp.dtype(jnp.bfloat16)


class Steps:
    """Decode steps of `rows` rows that have `context` tokens, on the devices of `place`."""

    def __init__(self, graph: Graph, place: Placement, rows: int, context: int, most: int):
        width = -(-(context + most) // planning.PAGE_SIZE)
        group = PageGroup(graph.groups[0].name, planning.PAGE_SIZE, rows * width)
        self.bucket, self.rows, self.context = decode(rows), rows, context
        self.programs = Executables(
            graph, Ladder((self.bucket,), 512, ()), params=planning.abstract_params(graph, DTYPE), max_rows=rows,
            max_context=context + most, state=planning.abstract_state(graph, (group,), DTYPE),
            table_width={group.name: width}, device=place)
        keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(self.programs.params)))
        leaves, tree = jax.tree.flatten(self.programs.params)
        self.params = jax.tree.unflatten(tree, map(_draw, keys, leaves))
        self.state, self.last_S = self.programs.empty("state"), self.programs.empty("last_S")
        self.tables = {group.name: np.arange(rows * width, dtype=np.int32).reshape(rows, width)}
        self.forward, self.greedy = (self.programs.get(key) for key in (Key("forward", self.bucket),
                                                                        Key("greedy", rows)))

    def run(self, count: int) -> float:
        """Seconds a step, over `count` of them, dispatched ahead as the engine does."""
        all_R = np.arange(self.rows, dtype=np.int32)
        jax.block_until_ready((self.state, self.last_S))
        start = time.perf_counter()
        for i in range(count):
            run = decode_run(self.tables, self.context + 1 + i)
            self.state, logits_RV = self.forward(self.params, self.state, self.last_S, run)
            self.last_S, tokens_R = self.greedy(logits_RV, self.last_S, all_R)
        jax.block_until_ready(tokens_R)
        return (time.perf_counter() - start) / count

    def exchanged(self) -> Counter:
        """Collectives of one forward step: (kind, dtype, shape) -> how many."""
        place = self.programs.place
        with kernels.tracing(self.programs.platform, {}, place.mesh, place.axes):
            text = self.programs.lower(Key("forward", self.bucket)).compile().as_text()
        found: Counter = Counter()
        for result, kind in re.findall(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(",
                                       text):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", result)
            for dtype, dims in shapes if kind == "all-reduce" else shapes[-1:]:
                found[kind, dtype, tuple(int(n) for n in dims.split(",") if n)] += 1
        return found


def _draw(key: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """Random numbers, made where they lie; vectors, which are norms, are ones."""
    if len(like.shape) == 1:
        return jax.device_put(np.ones(like.shape, like.dtype), like.sharding)
    return jax.jit(_normal, static_argnums=(1, 2), out_shardings=like.sharding)(key, like.shape, like.dtype)


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * shape[-1] ** -0.5


def sums_alone(mesh: Mesh, exchanged: Counter, count: int) -> float:
    """Seconds that the all-reduces of a step take, each of what the one before it gave."""
    sums = [(jnp.dtype({"f32": "float32", "bf16": "bfloat16"}[dtype]), shape)
            for (kind, dtype, shape), n in exchanged.items() if kind == "all-reduce" for _ in range(n)]

    def chain(x_1):
        for dtype, shape in sums:
            summed = jax.lax.psum(jnp.broadcast_to(x_1[0], shape).astype(dtype), "model")
            x_1 = x_1 * 0.5 + jax.lax.optimization_barrier(summed).ravel()[:1].astype(jnp.float32)
        return x_1

    cut = PartitionSpec("model")  # a number of its own on each device: XLA multiplies instead of summing equal ones
    program = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=cut, out_specs=cut, check_vma=False))
    x = program(jax.device_put(np.arange(mesh.size, dtype=np.float32), NamedSharding(mesh, cut)))
    jax.block_until_ready(x)
    start = time.perf_counter()
    for _ in range(count):
        x = program(x)
    jax.block_until_ready(x)
    return (time.perf_counter() - start) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--quick", "--tiny", action="store_true", help="a check that it runs: a tiny shape, on the CPU")
    given = parser.parse_args()
    if given.quick:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", given.devices)
    devices, steps, rounds = jax.devices(), 8 if given.quick else 40, 2 if given.quick else 5
    if len(devices) < given.devices:
        print(f"{given.devices} devices are needed, {len(devices)} are here; nothing was measured")
        return
    compiler.enable()
    graph = architecture(SHAPES["tiny" if given.quick else "8b"], max_context=given.context + steps).graph()
    mesh = Mesh(np.array(devices[: given.devices]), ("model",))
    several = spread(graph, mesh)
    times: dict[int, list[float]] = {}
    for count, place in ((1, Placement(devices[0])), (given.devices, several)):
        bench = Steps(graph, place, given.rows, given.context, steps)
        bench.run(3)  # warm
        times[count] = [bench.run(steps) for _ in range(rounds)]
        exchanged = bench.exchanged()
        bench.programs.close()
        del bench  # its weights, before the next ones come
    one, many = (statistics.median(times[count]) for count in (1, given.devices))
    alone = min(sums_alone(mesh, exchanged, steps) for _ in range(rounds))
    rows = [[count, f"{1e3 * t:.2f}", f"{given.rows / t:,.0f}", f"{one / t:.2f}", share] for count, t, share in (
        (1, one, ""), (given.devices, many, f"{alone / many:.0%}"))]
    names = ", ".join(f"{n} x {kind} {dtype}{list(shape)}" for (kind, dtype, shape), n in exchanged.items())
    body = (f"{given.devices} x {devices[0].device_kind}; {several}.\n\n"
            + table(["devices", "step ms", "tokens/s", "x one device", "collectives, alone"], rows)
            + f"\n\nA step exchanges {names}: {1e3 * alone:.2f} ms alone. Asked: {ASKED} x on two devices.")
    publish("many_devices", "A decode step on several devices", body,
            {"seconds_per_step": {str(count): t for count, t in times.items()}, "collectives_alone": alone,
             "rows": given.rows, "context": given.context}, keep=not given.quick)


if __name__ == "__main__":
    main()
