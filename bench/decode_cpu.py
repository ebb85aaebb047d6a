"""How fast is generation on the CPU, beside llama.cpp and transformers, and beside its own matmuls?

Every engine reads the same GGUF file and the same token ids, greedily, and never while another runs: ours and
transformers on all cores, llama.cpp decoding with as many threads as a probe finds fastest for those rows. Prefill is
a prompt of 512 tokens to its first token. Decode counts from when all rows have their first token until the first row
has its last. Rounds alternate between the engines; the table shows medians. Engines of ours are a dtype each, or what
weights are quantised to (beside float32, or bfloat16 where the CPU has it).

The second table takes the decode step apart. The floor is its matmuls, with the weights as they are held, and its
attention's two dots in one jitted function over contiguous KV: no norms, rotary embedding, softmax, pages or sampling.

A first run, which `--quick` may be, fills the compile cache.

Axes: R rows, D model width, F feed-forward width, N query heads, K KV heads, G query heads per KV head, H head width,
S context, V vocabulary, Q all heads side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from support.decoding import answers, decode_run, scattered
from support.report import BENCH, cores, machine, publish, table, versions

import jaxinfer
from jaxinfer import kernels
from jaxinfer.compiler import Key
from jaxinfer.compiler.buckets import decode
from jaxinfer.frontend.catalog import resolve
from jaxinfer.kernels.quantised import FORCED

PREFILL, PROMPT = 512, 96
NEW = {1: 48, 8: 32, 32: 24}  # tokens drawn for each row, by rows
DTYPES, SCHEMES = ("float32", "bfloat16"), ("w8a8", "int8", "int4")
CASES = {"prefill of 512": None} | {f"decode, batch {rows}": rows for rows in NEW}
BATCH_1, STEP_ROWS = "decode, batch 1", 8  # whose step is taken apart
ASKED = {"prefill of 512": "4 x llama.cpp, 1 x transformers", BATCH_1: "1 x llama.cpp",
         "decode, batch 8": "1.3 x llama.cpp, 3 x its batch 1", "decode, batch 32": "1.3 x llama.cpp, 4 x its batch 1"}


class Timed(NamedTuple):
    """One run of an engine: seconds until all prompts were read, tokens per second from then on, and the tokens."""

    read: float
    rate: float
    tokens: list[list[int]]


class Peers:
    """The peers' process. It holds the models and computes only when asked."""

    def __init__(self, python: Path, model: Path, threads: int):
        command = [python, BENCH / "support" / "peers_cpu.py", model, str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        hello = self._answer()
        self.names, self.versions = hello["peers"], hello["versions"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"the peers' process ended with {self.process.wait()}; its last words are above")
        return json.loads(line)

    def timed(self, peer: str, prompts: list[list[int]], new: int) -> Timed:
        self.process.stdin.write(json.dumps({"peer": peer, "prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        rate = len(prompts) * (new - 1) / (answer["seconds"] - answer["read"])
        return Timed(answer["read"], rate, answer["tokens"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compile_greedy(lm: jaxinfer.LanguageModel) -> None:
    """All that greedy requests run in, before anything is timed; what samples or scores is not needed here."""
    executables = lm._engine.executables
    buckets = executables.ladder.buckets
    executables.compile_all(*(Key("greedy_steps" if bucket.steps > 1 else "forward", bucket) for bucket in buckets),
                            *(Key("greedy", rows) for rows in {bucket.rows for bucket in buckets}))


def ours_timed(lm: jaxinfer.LanguageModel, prompts: list[list[int]], new: int) -> Timed:
    """Rows begin to decode while others are read: they draw a token more for each of those."""
    found = answers(lm, prompts, new + len(prompts) - 1)
    return Timed(found.read, found.rate if new > 1 else 0.0, [tokens[:new] for tokens in found.tokens])


def measure(engines: dict[str, Callable[..., Timed]], encode: Callable[[str], list[int]], rounds: int, most: int
            ) -> tuple[dict, dict]:
    """Tokens per second of every round, by case and engine; and the tokens that each engine drew, by engine. Every
    engine first reads and draws a little with each number of rows. No row draws more than `most` tokens."""
    fresh = itertools.count(1)

    def prompts(rows: int, length: int) -> list[list[int]]:
        """Counting from a new number: a model goes on counting and does not end, and no prefix was seen before."""
        starts = (1000 * next(fresh) for _ in range(rows))
        return [encode(" ".join(f"{start + i}," for i in range(length)))[:length] for start in starts]

    for rows, timed in itertools.product(NEW, engines.values()):
        timed(prompts(rows, 16), 2)
    rates, drawn = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for number in range(rounds):
        for case, rows in CASES.items():
            asked = prompts(rows or 1, PROMPT if rows else PREFILL)
            for engine, timed in engines.items():
                found = timed(asked, min(NEW[rows], most) if rows else 1)
                drawn[engine] += itertools.chain(*found.tokens)
                rates[case][engine].append(found.rate if rows else PREFILL / found.read)
                print(number, case, engine, f"{rates[case][engine][-1]:.1f}", file=sys.stderr, flush=True)
    return rates, drawn


def floor(config, blocks, head_VD, caches, x_RD, *, matmuls: bool, dots: bool):
    """The dots of a decode step, each fed by the one before. Everything that they make is used or returned."""
    R, N, K, H = len(x_RD), config.heads, config.kv_heads, config.head_width
    aside, y_RQ = [], jnp.resize(x_RD, (R, N * H))
    for layer, (k_RKSH, v_RKSH) in zip(blocks, caches, strict=True):
        if matmuls:
            y_RQ, kv_RKH = jnp.split(kernels.matmul(x_RD, layer["qkv"]), [N * H], axis=1)
            aside.append(kv_RKH)
        if dots:
            q_RKGH = y_RQ.reshape(R, K, N // K, H).astype(k_RKSH.dtype)
            scores = jnp.einsum("RKGH,RKSH->RKGS", q_RKGH, k_RKSH, preferred_element_type=jnp.float32)
            y_RKGH = jnp.einsum("RKGS,RKSH->RKGH", scores.astype(v_RKSH.dtype), v_RKSH,
                                preferred_element_type=jnp.float32)
            y_RQ = y_RKGH.reshape(R, N * H)
        if matmuls:
            y_RF2 = kernels.matmul(kernels.matmul(y_RQ, layer["out"]), layer["gate_up"])
            gate_RF, up_RF = jnp.split(y_RF2, 2, axis=1)
            x_RD = kernels.matmul(gate_RF + up_RF, layer["down"])
    return (kernels.matmul(x_RD, head_VD) if matmuls else y_RQ), aside


def breakdown(lm: jaxinfer.LanguageModel, forced: Mapping[str, str], rounds: int, contexts: range) -> dict[str, float]:
    """Milliseconds of `forward` with `STEP_ROWS` rows, averaged over `contexts` (its cost grows in steps, page by
    page), and of the floors at their mean, whose matmuls are `forced` as the engine's are."""
    executables, params, config, R = lm._engine.executables, lm.params, lm.config, STEP_ROWS  # the engine is idle
    forward = executables.get(Key("forward", decode(R)))
    rng = np.random.default_rng(0)
    state = executables.empty("state")
    tables, last_S = scattered(state, executables.table_width, R, contexts[-1]), executables.empty("last_S")

    def sweep() -> list[float]:
        nonlocal state
        times = []
        for context in contexts:
            run = decode_run(tables, context, rng.integers(0, lm.graph.vocab, R, dtype=np.int32))
            start = time.perf_counter()
            state, logits_RV = forward(params, state, last_S, run)
            logits_RV.block_until_ready()
            times.append(time.perf_counter() - start)
        return times

    S, pages = round(sum(contexts) / len(contexts)), jax.tree.leaves(executables.state)[0].dtype
    normal = lambda dtype, *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * 0.01, dtype)
    caches = [[normal(pages, R, config.kv_heads, S, config.head_width) for _ in "kv"] for _ in params["blocks"]]
    args = params["blocks"], params["embed" if config.tied else "head"], caches, normal("float32", R, config.width)
    kinds = {"matmuls and dots": (True, True), "matmuls": (True, False), "dots": (False, True)}
    with kernels.tracing("cpu", forced):
        floors = {kind: jax.jit(partial(floor, config, matmuls=matmuls, dots=dots)).lower(*args).compile()
                  for kind, (matmuls, dots) in kinds.items()}

    def once(compiled) -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        return time.perf_counter() - start

    sweeps, times = [], defaultdict(list)
    sweep()
    for _ in range(rounds):
        sweeps.append(sweep())
        for kind, compiled in floors.items():
            once(compiled)
            times[kind] += [once(compiled) for _ in range(5)]
    forward_ms = 1e3 * np.mean(np.median(sweeps, axis=0))
    return {"forward": float(forward_ms)} | {kind: 1e3 * median(values) for kind, values in times.items()}


def over(rate: float, peer: float | None) -> str:
    return f"{rate / peer:.2f}" if peer else ""


def rate_table(rates: dict[str, dict[str, float]], agree: dict[str, float]) -> str:
    """All engines in all cases; what is asked stands in the row of our best."""
    lines, single = [], rates[BATCH_1].get("llama.cpp")
    for case, by in rates.items():
        faster = max((rate for name, rate in by.items() if name.startswith("transformers")), default=None)
        best = max((name for name in by if name.startswith("jaxinfer")), key=by.get)
        for engine, rate in by.items():
            asked = f">= {ASKED[case]}" if engine == best else ""
            lines.append([case, engine, f"{rate:,.0f}", over(rate, by.get("llama.cpp")),
                          over(rate, single) if CASES[case] else "", over(rate, faster), asked, f"{agree[engine]:.0%}"])
    return table(["", "engine", "tokens/s", "x llama.cpp", "x llama.cpp, batch 1", "x transformers (faster dtype)",
                  "asked", "same tokens"], lines, words=2)


def step_table(steps: dict[str, dict[str, float]], rates: dict[str, float]) -> str:
    """Where the time of a decode step goes, by engine."""
    lines = []
    for engine, ms in steps.items():
        ms["engine step"] = 1e3 * STEP_ROWS / rates[engine]
        ms["overhead"] = ms["engine step"] - ms["forward"]
        parts = ("engine step", "overhead", "forward", "matmuls and dots", "matmuls", "dots")
        lines.append([engine, *(f"{ms[part]:.2f}" for part in parts),
                      f"{ms['forward'] / ms['matmuls and dots']:.2f}", "<= 1.5"])
    return table(["ms", "engine step", "engine - forward", "forward", "floor", "its matmuls alone",
                  "its dots alone", "forward / floor", "asked"], lines)


def main() -> None:
    native = any("bf16" in name for name in machine()["instructions"])
    dtypes = DTYPES if native else DTYPES[:1]  # a CPU that must emulate bfloat16 takes minutes for a prompt
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of the catalog or a .gguf file")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--ours", nargs="+", choices=DTYPES + SCHEMES, default=dtypes + SCHEMES, help="our engines")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one round, few tokens")
    options = parser.parse_args()
    if not options.peers_python.exists():
        parser.error(f"{options.peers_python} is not here; `make bench` sets it up, --peers-python names another")
    rounds, most = (1, 4) if options.quick else (options.rounds, max(NEW.values()))
    model = Path(resolve(options.model)).resolve()

    # OpenMP's barriers crawl while others use the cores, as they may in a --quick run.
    peers = Peers(options.peers_python, model, 1 if options.quick else cores())
    beside = lambda kind: {"dtype": kind} if kind in DTYPES else {"dtype": dtypes[-1], "quantize": kind}
    ours = {f"jaxinfer {kind}": jaxinfer.load(model, max_rows=max(NEW), **beside(kind)) for kind in options.ours}
    for lm in ours.values():
        compile_greedy(lm)
    engines = {name: partial(ours_timed, lm) for name, lm in ours.items()}
    engines |= {name: partial(peers.timed, name) for name in peers.names if native or "bfloat16" not in name}
    encode = next(iter(ours.values())).tokenizer.encode
    samples, drawn = measure(engines, encode, rounds, most)
    peers.close()
    rates = {case: {engine: median(values) for engine, values in by.items()} for case, by in samples.items()}
    contexts = range(PROMPT, PROMPT + NEW[STEP_ROWS], 4)
    steps = {}
    for kind, (name, lm) in zip(options.ours, ours.items(), strict=True):
        steps[name] = breakdown(lm, FORCED.get(kind, {}), rounds, contexts)
        lm.close()

    judge = drawn.get("transformers float32", next(iter(drawn.values())))
    agree = {engine: float(np.mean(np.array(tokens) == judge)) for engine, tokens in drawn.items()}
    body = (f"{rate_table(rates, agree)}\n\nMedians of {rounds} rounds. llama.cpp reads the file's "
            f"{model.stem.split('.')[-1]} blocks, the others dequantised weights, which ours rounds anew where "
            "they are quantised. \"same tokens\": as transformers in float32, of all that were drawn."
            f"\n\nA decode step of {STEP_ROWS} rows at context {round(np.mean(contexts))}:\n\n"
            f"{step_table(steps, rates[f'decode, batch {STEP_ROWS}'])}")
    publish("decode_cpu", "Generation on the CPU", body, {
        "versions": versions() | peers.versions, "model": model.name, "rounds": rounds, "tokens_per_second": samples,
        "step_ms": steps, "same_tokens": agree,
    }, keep=not options.quick)


if __name__ == "__main__":
    main()
