"""How near to the hardware's limit does a GPU generate, through the public engine?

A Llama-3-8B shape and a 1B shape with random weights in bfloat16, loaded from a checkpoint that is written on the
spot. A step's floor is the bytes of the weights and of the rows' keys and values over the bandwidth that a copy or
a sum reaches in the same run. "bare" is the forward Executable alone, called in a row; "engine" is what a caller sees:
scheduler included, tokens streamed out. vLLM's figures are not of this run: they stand in FACTS.md, of an H200.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import jaxinfer as ji
from bench.support.decoding import decode_rate
from bench.support.random_checkpoint import SHAPES, write
from bench.support.report import publish, table
from jaxinfer.compiler import Key
from jaxinfer.compiler.buckets import decode
from jaxinfer.graph import Run

NEW = 96  # tokens drawn for each row; more where the first rows draw while the last prompts are still read
ASKED = {("8b", 1, 512): 0.88, ("8b", 8, 512): 0.85, ("8b", 64, 512): 0.82, ("8b", 256, 512): 0.80,
         ("8b", 64, 6144): 0.80, ("1b", 1, 512): 0.60, ("1b", 64, 512): 0.65}


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes, or a sum reads: the best of five of each."""
    x = jnp.ones(2**30, jnp.bfloat16)
    passes = {jax.jit(lambda x: x + 1): 2, jax.jit(lambda x: x.reshape(-1, 2**14).max(1)): 1}

    def once(act) -> float:
        start = time.perf_counter()
        for _ in range(10):
            out = act(x)
        out.block_until_ready()
        return (time.perf_counter() - start) / 10

    return max(times * x.nbytes / min(once(act) for _ in range(5)) for act, times in passes.items())


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
    forward, state = executables.get(Key("forward", decode(rows))), lm._engine.state
    tables = {}
    for name, width in executables.table_width.items():
        pages, used = state[name][0].k.shape[0], -(-context // state[name][0].k.shape[2])
        tables[name] = np.zeros((rows, width), np.int32)
        tables[name][:, :used] = np.random.default_rng(0).permutation(pages)[: rows * used].reshape(rows, used)
    ints = lambda *args: np.arange(*args, dtype=np.int32)
    run = jax.device_put(Run(ints(10, 10 + rows), ints(rows + 1), np.full(rows, context, np.int32), ints(rows),
                             tables, 1, rows))
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


def prefill(lm: ji.LanguageModel, rows: int, tokens: int) -> float:
    """Prompt tokens a second of several prompts at once."""
    prompts = np.random.default_rng(1).integers(10, lm.graph.vocab, (rows, tokens)).tolist()
    start = time.perf_counter()
    lm.generate(prompts, max_tokens=1, reuse=False)
    return rows * tokens / (time.perf_counter() - start)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["1b", "8b"])
    parser.add_argument("--quick", action="store_true", help="a check that it runs, on any device: a tiny shape")
    parser.add_argument("--memory", default="70GiB")
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.memory = ["tiny"], "1GiB"
    elif jax.default_backend() != "gpu":
        raise SystemExit("there is no GPU here: bench/decode_gpu.py --quick only sees that it runs")
    copied = bandwidth()
    lines, others, quantised, data = [], [], [], {"bandwidth": copied}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), SHAPES[shape])
            cases = [(1, 32), (2, 32)] if options.quick else [(1, 512), (8, 512), (64, 512), (256, 512)]
            cases += [(64, 6144)] if shape == "8b" else []
            start = time.perf_counter()
            longest = max(2048 + 64, *(context + rows * context // 2048 + NEW for rows, context in cases))
            lm = ji.load(path, max_rows=max(rows for rows, _ in cases), memory=options.memory,
                         max_context=96 if options.quick else longest)
            lm.warmup()
            data[f"{shape} load and compile everything, s"] = time.perf_counter() - start
            with lm:
                new, rounds = (24, 1) if options.quick else (NEW, 3)
                for rows, context in cases:
                    step = median(engine_step(lm, rows, context, new) for _ in range(rounds))
                    bare = bare_step(lm, rows, context, 3 if options.quick else 30)
                    least = floor_bytes(lm, rows, context) / copied
                    asked = ASKED.get((shape, rows, context))
                    data[f"{shape} x {rows} at {context}"] = {"engine": step, "bare": bare, "floor": least}
                    lines.append([shape, rows, context, f"{1e3 * step:.2f}", f"{1e3 * bare:.2f}",
                                  f"{1e3 * least:.2f}", f"{least / step:.3f}", f">= {asked}" if asked else "",
                                  f"{step / bare - 1:.1%}"])
                    print(*lines[-1], flush=True)
                if shape == "1b":
                    continue
                long, short = (32, 8) if options.quick else (2048, 64)
                rates = [prefill(lm, 2 if options.quick else 8, long) for _ in range(rounds + 1)][1:]
                alone = gemms(lm, 8 * long, min(2048, long))
                served = [trace(lm, 4 if options.quick else 512) for _ in range(2)][1] if not options.quick else {}
                prefill_name = f"prefill of 8 x {long}, tokens/s"
                found = {prefill_name: median(rates), "the same matmuls alone, tokens/s": alone,
                         **{f"first token of {n} tokens, ms": 1e3 * first_token(lm, n, rounds) for n in (long, short)},
                         **{f"512 mixed requests, {name}/s": value for name, value in served.items()}}
                data[shape] = found
                others += [[shape, name, f"{value:,.1f}"] for name, value in found.items()]
                print(*others, sep="\n", flush=True)
            del lm  # its memory
            for scheme in ("int8", "int4", "fp8"):
                with ji.load(path, max_rows=8, memory=options.memory, quantize=scheme,
                             max_context=96 if options.quick else longest) as lm:
                    first = cases[0]
                    engine_step(lm, *first, new)  # compiles
                    step = median(engine_step(lm, *first, new) for _ in range(rounds))
                    rate = median([prefill(lm, 2 if options.quick else 8, long) for _ in range(rounds + 1)][1:])
                    base = data[f"{shape} x {first[0]} at {first[1]}"]["engine"], data[shape][prefill_name]
                    data[f"{shape} {scheme}"] = {"engine": step, "prefill": rate}
                    quantised.append([shape, scheme, f"{1e3 * step:.2f}", f"{base[0] / step:.2f}", f"{rate:,.0f}",
                                      f"{rate / base[1]:.2f}"])
                    print(*quantised[-1], flush=True)
    name = jax.devices()[0].device_kind
    body = (f"{name}: memory moves {copied / 1e12:.2f} TB/s. Random weights, bfloat16; medians of 3.\n\n"
            + table(["shape", "rows", "context", "engine ms", "bare ms", "floor ms", "floor / engine", "asked",
                     "engine over bare"], lines)
            + "\n\n" + table(["shape", "", "here"], others, words=2)
            + "\n\nQuantised weights; asked: int8 >= 1.6 x bfloat16 with one row, fp8 >= 1.5 x its prefill.\n\n"
            + table(["shape", "weights", "engine ms, 1 row", "x bfloat16", "prefill tokens/s", "x bfloat16"], quantised,
                    words=2))
    publish("decode_gpu", "Generation on the GPU", body, data, keep=not options.quick)


if __name__ == "__main__":
    main()
