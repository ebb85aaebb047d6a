"""How near to the hardware's limit does a GPU generate, through the public engine?

A Llama-3-8B shape and a 1B shape with random weights in bfloat16, loaded from a checkpoint that is written on the
spot. A step's floor is the bytes of the weights and of the rows' keys and values over the bandwidth that a copy or
a search for the largest reaches in the same run. "bare" is the forward Executable alone, called in a row; "engine" is
what a caller sees: scheduler included, tokens streamed out. transformers (a static cache, compiled) runs beside it
where `--peers` has torch with CUDA. vLLM's figures are not of this run: they stand in FACTS.md, of an H200.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfer as ji
from bench.support.decoding import decode_rate, decode_run, scattered
from bench.support.random_checkpoint import write
from bench.support.report import BENCH, publish, table, versions
from bench.support.shapes import SHAPES
from jaxinfer.compiler import Key
from jaxinfer.compiler.buckets import decode
from jaxinfer.compiler.probe import bandwidth


class Plan(NamedTuple):
    """What a shape is asked: `cases` are (rows, context) of decode steps, of which `new` tokens are drawn for each row
    (more where the first rows draw while the last prompts are still read) and `calls` made of the bare step; then
    (rows, tokens) of a `prefill`, the tokens of a `short` prompt, and the `requests` of a mixed trace."""

    cases: tuple[tuple[int, int], ...]
    new: int
    rounds: int
    calls: int
    prefill: tuple[int, int]
    short: int
    requests: int

    @property
    def context(self) -> int:
        """What most steps have."""
        return self.cases[0][1]

    @property
    def longest(self) -> int:
        """The longest row there will be."""
        return max(self.prefill[1] + 64, *(context + rows * context // 2048 + self.new for rows, context in self.cases))


FULL = Plan(((1, 512), (8, 512), (64, 512), (256, 512)), 96, 3, 30, (8, 2048), 64, 512)
LONG = {"8b": ((64, 6144),)}
QUICK = Plan(((1, 32), (2, 32)), 24, 1, 3, (2, 32), 8, 0)
MOST_OF_PEER = 64  # rows
ASKED = {("8b", 1, 512): 0.88, ("8b", 8, 512): 0.85, ("8b", 64, 512): 0.82, ("8b", 256, 512): 0.80,
         ("8b", 64, 6144): 0.80, ("1b", 1, 512): 0.60, ("1b", 64, 512): 0.65}
VLLM_STEPS = {("8b", 1, 512): 4.93e-3, ("8b", 8, 512): 5.18e-3, ("8b", 64, 512): 6.63e-3, ("8b", 256, 512): 14.1e-3,
              ("1b", 1, 512): 2.15e-3, ("1b", 8, 512): 2.06e-3, ("1b", 64, 512): 2.14e-3, ("1b", 256, 512): 4.55e-3}
VLLM_PROMPTS = {  # and what is asked of us
    "prefill of 8 x 2,048, tokens/s": ("42,400", "as much, and 0.90 of the matmuls"),
    "first token of 2,048 tokens, ms": ("53", "< 50"), "first token of 64 tokens, ms": ("9", "< 8"),
    "512 mixed requests, requests/s": ("47.8", ">= 50"), "512 mixed requests, tokens/s": ("7,050", "")}


def floor_bytes(lm: ji.LanguageModel, rows: int, context: int) -> int:
    """What a decode step must read: all weights but an embedding that no head shares, and the keys and values."""
    config, params = lm.config, lm.params
    weights = sum(x.nbytes for x in jax.tree.leaves(params)) - (0 if config.tied else params["embed"].nbytes)
    itemsize = jax.tree.leaves(lm._engine.executables.state)[0].dtype.itemsize
    return weights + rows * context * 2 * config.kv_heads * config.head_width * itemsize * len(config.layers)


def engine_step(lm: ji.LanguageModel, rows: int, context: int, new: int) -> float:
    """Seconds of a step while all rows decode, around `context`."""
    new += rows * context // lm._engine.executables.ladder.budget
    return rows / decode_rate(lm, rows, context - new // 2, new)


def bare_step(lm: ji.LanguageModel, rows: int, context: int, steps: int) -> float:
    """Seconds of the forward Executable alone, called `steps` times in a row."""
    executables = lm._engine.executables
    bucket, state = executables.ladder.holding(decode(rows))[0], lm._engine.state
    forward, tables = executables.get(Key("forward", bucket)), scattered(state, executables.table_width, rows, context)
    run = jax.device_put(decode_run(tables, context, np.arange(10, 10 + rows, dtype=np.int32), bucket.rows))
    last_S = jnp.zeros(executables.max_rows, jnp.int32)
    for n in (3, steps):
        start = time.perf_counter()
        for _ in range(n):
            state, logits_RV = forward(lm.params, state, last_S, run)
        logits_RV.block_until_ready()
    lm._engine.state = state  # the one it had was donated
    return (time.perf_counter() - start) / steps


def first_token(lm: ji.LanguageModel, tokens: int, rounds: int) -> float:
    prompts = np.random.default_rng(tokens).integers(10, lm.graph.vocab, (rounds + 1, tokens)).tolist()
    return median([lm(p, max_tokens=1, reuse=False).timings.first_token for p in prompts][1:])


def prefill(lm: ji.LanguageModel, plan: Plan) -> float:
    """Prompt tokens a second of several prompts at once; the first round warms."""
    prompts = np.random.default_rng(1).integers(10, lm.graph.vocab, plan.prefill).tolist()

    def seconds() -> float:
        start = time.perf_counter()
        lm.generate(prompts, max_tokens=1, reuse=False)
        return time.perf_counter() - start

    return plan.prefill[0] * plan.prefill[1] / median([seconds() for _ in range(plan.rounds + 1)][1:])


def gemms(lm: ji.LanguageModel, tokens: int, chunk: int) -> float:
    """Tokens a second of a prefill's matmuls alone, one after the other."""
    def run(blocks, x_TD, kept):
        for layer in blocks:
            for name in ("qkv", "out", "gate_up", "down"):
                w_OI = layer[name]
                x_TI = jnp.resize(x_TD[:, :1], (x_TD.shape[0], w_OI.shape[1])) + kept[:, : w_OI.shape[1]]
                x_TD = jax.lax.dot_general(x_TI, w_OI, (((1,), (1,)), ((), ())))
        return x_TD

    widest = max(w.shape[1] for layer in lm.params["blocks"] for w in jax.tree.leaves(layer) if w.ndim == 2)
    x_TD, kept = jnp.ones((chunk, lm.config.width), jnp.bfloat16), jnp.ones((chunk, widest), jnp.bfloat16)
    compiled = jax.jit(run).lower(lm.params["blocks"], x_TD, kept).compile()
    for n in (1, max(1, tokens // chunk)):
        start = time.perf_counter()
        for _ in range(n):
            out = compiled(lm.params["blocks"], x_TD, kept)
        out.block_until_ready()
    return n * chunk / (time.perf_counter() - start)


def trace(lm: ji.LanguageModel, count: int) -> dict[str, float]:
    """Requests and output tokens a second of FACTS.md's trace, all of which is there at once."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(10, lm.graph.vocab, n).tolist() for n in rng.integers(64, 1025, count)]
    new = rng.integers(32, 257, count).tolist()
    start = time.perf_counter()
    answers = [lm.submit(p, max_tokens=n, ignore_eos=True, reuse=False) for p, n in zip(prompts, new, strict=True)]
    for answer in answers:
        answer.result()
    took = time.perf_counter() - start
    return {"requests": count / took, "tokens": sum(new) / took}


def transformers_steps(python: Path, plan: Plan, config: dict, device: str) -> dict:
    """The "seconds" of transformers' decode steps, by rows, and its "versions"; nothing where it cannot run. It runs in
    a process of its own, before JAX takes the device's memory."""
    rows = [str(rows) for rows, context in plan.cases if context == plan.context and rows <= MOST_OF_PEER]
    script = BENCH / "support" / "peers_gpu.py"
    command = [python, script, *rows, f"--context={plan.context}", f"--new={plan.new}", f"--device={device}"]
    done = subprocess.run(command, input=json.dumps(config), capture_output=True, text=True)
    if done.returncode:
        print(f"transformers is left out: {(done.stderr.splitlines() or ['no reason given'])[-1]}", flush=True)
        return {"seconds": {}, "versions": {}}
    return json.loads(done.stdout.splitlines()[-1])


def steps(lm: ji.LanguageModel, plan: Plan, copied: float) -> list[dict]:
    """Every case's step: seconds in the engine, of the bare Executable, and the least there can be."""
    found = []
    for rows, context in plan.cases:
        engine = median(engine_step(lm, rows, context, plan.new) for _ in range(plan.rounds))
        found.append({"rows": rows, "context": context, "engine": engine,
                      "bare": bare_step(lm, rows, context, plan.calls),
                      "floor": floor_bytes(lm, rows, context) / copied})
        print(found[-1], flush=True)
    return found


def prompts(lm: ji.LanguageModel, plan: Plan) -> dict[str, float]:
    """How fast prompts are read, alone, together and among answers."""
    rows, long = plan.prefill
    found = {
        f"prefill of {rows} x {long:,}, tokens/s": prefill(lm, plan),
        "the same matmuls alone, tokens/s": gemms(lm, rows * long, long),
        **{f"first token of {n:,} tokens, ms": 1e3 * first_token(lm, n, plan.rounds) for n in (long, plan.short)},
    }
    if plan.requests:
        served = [trace(lm, plan.requests) for _ in range(2)][1]
        found |= {f"{plan.requests} mixed requests, {name}/s": value for name, value in served.items()}
    print(found, flush=True)
    return found


def step_and_prefill(lm: ji.LanguageModel, plan: Plan) -> dict[str, float]:
    """What quantised weights are compared by: a step of the first case, and the prefill."""
    engine_step(lm, *plan.cases[0], plan.new)  # compiles
    return {"engine": median(engine_step(lm, *plan.cases[0], plan.new) for _ in range(plan.rounds)),
            "prefill": prefill(lm, plan)}


def measure(shape: str, plan: Plan, memory: str, copied: float) -> dict:
    """Everything of one shape; of the 1B, whose many small kernels are the question, its steps alone."""
    with tempfile.TemporaryDirectory() as folder:
        path, start = write(Path(folder), SHAPES[shape]), time.perf_counter()
        load = partial(ji.load, path, memory=memory, max_context=plan.longest)
        with load(max_rows=max(rows for rows, _ in plan.cases)) as lm:
            lm.warmup()
            found = {"load and compile, s": time.perf_counter() - start, "steps": steps(lm, plan, copied)}
            if shape == "1b":
                return found
            found |= {"prompts": prompts(lm, plan), "weights": {"bfloat16": step_and_prefill(lm, plan)}}
        for scheme in ("int8", "int4", "fp8"):
            del lm  # its memory
            with load(max_rows=plan.prefill[0], quantize=scheme) as lm:
                found["weights"][scheme] = step_and_prefill(lm, plan)
            print(scheme, found["weights"][scheme], flush=True)
    return found


def step_table(data: dict) -> str:
    lines = []
    for shape, found in data["shapes"].items():
        for step in found["steps"]:
            rows, context, engine, bare, floor = (step[k] for k in ("rows", "context", "engine", "bare", "floor"))
            asked = ASKED.get((shape, rows, context))
            lines.append([shape, rows, f"{context:,}", *(f"{1e3 * t:.2f}" for t in (engine, bare, floor)),
                          f"{floor / engine:.3f}", f">= {asked}" if asked else "", f"{engine / bare - 1:.1%}"])
            for peer in VLLM_STEPS.get((shape, rows, context)), step.get("transformers"):
                lines[-1] += [f"{1e3 * peer:.2f}", f"{peer / engine:.2f}"] if peer else ["", ""]
    return table(["shape", "rows", "context", "engine ms", "bare ms", "floor ms", "floor / engine", "asked",
                  "engine over bare (asked <= 3%)", "vLLM ms", "vLLM / engine", "transformers ms",
                  "transformers / engine"], lines)


def prompt_table(data: dict) -> str:
    lines = [[shape, name, f"{value:,.1f}", *VLLM_PROMPTS.get(name, ("", ""))]
             for shape, found in data["shapes"].items() for name, value in found.get("prompts", {}).items()]
    return table(["shape", "", "here", "vLLM", "asked"], lines, words=2)


def weights_table(data: dict) -> str:
    lines = []
    for shape, found in data["shapes"].items():
        for kind, by in found.get("weights", {}).items():
            plain = found["weights"]["bfloat16"]
            lines.append([shape, kind, f"{1e3 * by['engine']:.2f}", f"{plain['engine'] / by['engine']:.2f}",
                          ">= 1.6" if kind == "int8" else "", f"{by['prefill']:,.0f}",
                          f"{by['prefill'] / plain['prefill']:.2f}", ">= 1.5" if kind == "fp8" else ""])
    return table(["shape", "weights", "engine ms, 1 row", "x bfloat16", "asked", "prefill tokens/s", "x bfloat16",
                  "asked"], lines, words=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["1b", "8b"])
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="a Python with torch and transformers")
    parser.add_argument("--quick", action="store_true", help="a check that it runs, on any device: a tiny shape")
    parser.add_argument("--memory", default="70GiB")
    options = parser.parse_args()
    if not options.peers.exists():
        parser.error(f"{options.peers} is not here")
    if options.quick:
        options.shapes, options.memory, of_peer, plans = ["tiny"], "1GiB", "tiny", {"tiny": QUICK}
    else:
        of_peer, plans = "8b", {shape: FULL._replace(cases=FULL.cases + LONG.get(shape, ())) for shape in SHAPES}
    peer = {"seconds": {}, "versions": {}}
    if of_peer in options.shapes:
        peer = transformers_steps(options.peers, plans[of_peer], SHAPES[of_peer], "cpu" if options.quick else "cuda")
    if jax.default_backend() != "gpu" and not options.quick:
        raise SystemExit("there is no GPU here: bench/decode_gpu.py --quick only sees that it runs")
    copied = bandwidth(2**24 if options.quick else 2**31, 0.02 if options.quick else 0.5)
    data = {"versions": versions() | peer["versions"], "bandwidth": copied, "shapes": {}}
    for shape in options.shapes:
        data["shapes"][shape] = found = measure(shape, plans[shape], options.memory, copied)
        for step in found["steps"] if shape == of_peer else ():
            if step["context"] == plans[shape].context:
                step["transformers"] = peer["seconds"].get(str(step["rows"]))
    body = (f"{jax.devices()[0].device_kind}: memory moves {copied / 1e12:.2f} TB/s. Random weights, bfloat16; medians "
            f"of {plans[options.shapes[0]].rounds}. vLLM 0.24's figures are FACTS.md's, of an H200: none ran here.\n\n"
            f"{step_table(data)}\n\n{prompt_table(data)}\n\nQuantised weights:\n\n{weights_table(data)}")
    publish("decode_gpu", "Generation on the GPU", body, data, keep=not options.quick)


if __name__ == "__main__":
    main()
