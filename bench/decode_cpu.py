"""How fast is generation on the CPU, beside llama.cpp and transformers, and beside its own matmuls?

Every engine reads the same GGUF file and the same token ids, greedily, on all cores, and never while another runs.
Prefill is a prompt of 512 tokens to its first token. Decode is what more new tokens cost: the time of a run with
`LONG` of them less that of a run with `SHORT`, so that reading prompts is in both and cancels. Rounds alternate
between the engines; the table shows medians.

The second table takes the decode step apart. The floor is its matmuls and its attention's two dots in one jitted
function over contiguous KV: no norms, rotary embedding, softmax, pages or sampling.

Axes: R rows, D model width, F feed-forward width, N query heads, K KV heads, G query heads per KV head, H head width,
S context, V vocabulary, I inputs and O outputs of a matmul, Q all heads side by side.
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
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from support.report import BENCH, cores, publish, table, versions

import jaxinfer
from jaxinfer.compiler import Key
from jaxinfer.compiler.buckets import decode
from jaxinfer.frontend.catalog import resolve
from jaxinfer.graph import Run

ROWS, PREFILL, PROMPT, SHORT, LONG = 8, 512, 176, 16, 144  # decode's context is 192 to 319: 256 on average
DTYPES = ("float32", "bfloat16")
CASES = {"prefill of 512": None, "decode, batch 1": 1, f"decode, batch {ROWS}": ROWS}
ASKED = {"prefill of 512": None, "decode, batch 1": 1.0, f"decode, batch {ROWS}": 2.0}  # x transformers' faster dtype


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

    def seconds(self, peer: str, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        self.process.stdin.write(json.dumps({"peer": peer, "prompts": prompts, "new": new}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def our_seconds(lm: jaxinfer.LanguageModel, prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    outputs = lm.generate(prompts, max_tokens=new)
    seconds = time.perf_counter() - start
    tokens = [list(output.tokens) for output in outputs]
    assert all(len(row) == new for row in tokens), "an answer ended early: there is less to time than was asked"
    return seconds, tokens


def measure(engines: dict, encode, rounds: int, warm: int, long: int) -> tuple[dict, dict]:
    """Tokens per second of every round, by case and engine; and the tokens that each engine drew, by engine. The
    `warm` rounds before them count for nothing."""
    fresh = itertools.count(1)

    def prompts(rows: int, length: int) -> list[list[int]]:
        """Counting from a new number: a model goes on counting and does not end, and no prefix was seen before."""
        starts = (1000 * next(fresh) for _ in range(rows))
        return [encode(" ".join(f"{start + i}," for i in range(length)))[:length] for start in starts]

    rates, drawn = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for number in range(-warm, rounds):
        for case, rows in CASES.items():
            one = prompts(rows or 1, PROMPT if rows else PREFILL)
            for engine, seconds in engines.items():
                if rows is None:
                    took, tokens = seconds(one, 1)
                    rate = PREFILL / took
                else:
                    short, tokens = seconds(one, SHORT)
                    rate = rows * (long - SHORT) / (seconds(one, long)[0] - short)
                drawn[engine] += itertools.chain(*tokens)
                if number >= 0:
                    rates[case][engine].append(rate)
    return rates, drawn


def dot(x_RI: jax.Array, w_OI: jax.Array) -> jax.Array:
    return jnp.einsum("RI,OI->RO", x_RI.astype(w_OI.dtype), w_OI, preferred_element_type=jnp.float32)


def floor(config, blocks, head_VD, caches, x_RD, *, matmuls: bool, dots: bool):
    """The dots of a decode step, each fed by the one before. Everything that they make is used or returned."""
    R, N, K, H = len(x_RD), config.heads, config.kv_heads, config.head_width
    aside, y_RQ = [], jnp.resize(x_RD, (R, N * H))
    for layer, (k_RKSH, v_RKSH) in zip(blocks, caches, strict=True):
        if matmuls:
            y_RQ, kv_RKH = jnp.split(dot(x_RD, layer["qkv"]), [N * H], axis=1)
            aside.append(kv_RKH)
        if dots:
            q_RKGH = y_RQ.reshape(R, K, N // K, H).astype(k_RKSH.dtype)
            scores = jnp.einsum("RKGH,RKSH->RKGS", q_RKGH, k_RKSH, preferred_element_type=jnp.float32)
            y_RKGH = jnp.einsum("RKGS,RKSH->RKGH", scores.astype(v_RKSH.dtype), v_RKSH,
                                preferred_element_type=jnp.float32)
            y_RQ = y_RKGH.reshape(R, N * H)
        if matmuls:
            gate_RF, up_RF = jnp.split(dot(dot(y_RQ, layer["out"]), layer["gate_up"]), 2, axis=1)
            x_RD = dot(gate_RF + up_RF, layer["down"])
    return (dot(x_RD, head_VD) if matmuls else y_RQ), aside


def breakdown(lm: jaxinfer.LanguageModel, rounds: int, contexts: range) -> dict[str, float]:
    """Milliseconds of `forward` with `ROWS` rows, averaged over `contexts` (its cost grows in steps, page by page),
    and of the floors at their mean."""
    executables, params, config = lm._engine.executables, lm.params, lm.config  # the engine is idle
    forward = executables.get(Key("forward", decode(ROWS)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), executables.state)
    tables = {}
    for name, width in executables.table_width.items():
        used = -(-contexts[-1] // state[name][0].k.shape[2])
        tables[name] = np.zeros((ROWS, width), np.int32)
        tables[name][:, :used] = rng.permutation(state[name][0].k.shape[0])[: ROWS * used].reshape(ROWS, used)
    last_S = jnp.zeros(ROWS, jnp.int32)

    def sweep() -> list[float]:
        nonlocal state
        times = []
        for context in contexts:
            tokens_T = rng.integers(0, lm.graph.vocab, ROWS, dtype=np.int32)
            run = Run(tokens_T, np.arange(ROWS + 1, dtype=np.int32), np.full(ROWS, context, np.int32),
                      np.arange(ROWS, dtype=np.int32), tables, 1, ROWS)
            start = time.perf_counter()
            state, logits_RV = forward(params, state, last_S, run)
            logits_RV.block_until_ready()
            times.append(time.perf_counter() - start)
        return times

    head_VD = params["embed" if config.tied else "head"]
    S = round(sum(contexts) / len(contexts))
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32) * 0.01, head_VD.dtype)
    caches = [[normal(ROWS, config.kv_heads, S, config.head_width) for _ in "kv"] for _ in params["blocks"]]
    args = params["blocks"], head_VD, caches, normal(ROWS, config.width).astype(jnp.float32)
    kinds = {"matmuls and dots": (True, True), "matmuls": (True, False), "dots": (False, True)}
    floors = {
        kind: jax.jit(lambda *args, m=matmuls, d=dots: floor(config, *args, matmuls=m, dots=d)).lower(*args).compile()
        for kind, (matmuls, dots) in kinds.items()
    }

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
            times[kind] += [once(compiled) for _ in range(20)]
    forward_ms = 1e3 * np.mean(np.median(sweeps, axis=0))
    return {"forward": float(forward_ms)} | {kind: 1e3 * median(values) for kind, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of the catalog or a .gguf file")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one round, few tokens")
    options = parser.parse_args()
    if not options.peers_python.exists():
        parser.error(f"{options.peers_python} is not here; `make bench` sets it up, --peers-python names another")
    rounds, warm, long = (1, 0, SHORT + 8) if options.quick else (options.rounds, 1, LONG)
    model = Path(resolve(options.model)).resolve()

    # OpenMP's barriers crawl while others use the cores, as they may in a --quick run.
    peers = Peers(options.peers_python, model, 1 if options.quick else cores())
    ours = {f"jaxinfer {dtype}": jaxinfer.load(model, dtype=dtype, max_rows=ROWS) for dtype in DTYPES}
    for lm in ours.values():
        lm.warmup()
    engines = {name: lambda prompts, new, lm=lm: our_seconds(lm, prompts, new) for name, lm in ours.items()}
    engines |= {name: lambda prompts, new, name=name: peers.seconds(name, prompts, new) for name in peers.names}
    encode = next(iter(ours.values())).tokenizer.encode
    samples, drawn = measure(engines, encode, rounds, warm, long)
    peers.close()
    rates = {case: {engine: median(values) for engine, values in by.items()} for case, by in samples.items()}
    contexts = range(PROMPT + SHORT, PROMPT + long)
    steps = {dtype: breakdown(lm, rounds, contexts) for dtype, lm in zip(DTYPES, ours.values(), strict=True)}
    for lm in ours.values():
        lm.close()

    judge = drawn.get("transformers float32", drawn["jaxinfer float32"])
    agree = {engine: np.mean(np.array(tokens) == judge) for engine, tokens in drawn.items()}
    over = lambda rate, peer: f"{rate / peer:.2f}" if peer else ""
    lines = []
    for case, by in rates.items():
        slow = max((rate for name, rate in by.items() if name.startswith("transformers")), default=None)
        best = max(ours, key=by.get)
        for engine, rate in by.items():
            asked = f">= {ASKED[case]:g}" if engine == best and ASKED[case] else ""
            lines.append([case, engine, f"{rate:,.0f}", over(rate, slow), asked, over(rate, by.get("llama.cpp")),
                          f"{agree[engine]:.0%}"])
    first = table(["", "engine", "tokens/s", "x transformers (faster dtype)", "asked", "x llama.cpp", "same tokens"],
                  lines, words=2)
    lines = []
    for dtype, ms in steps.items():
        ms["engine step"] = 1e3 * ROWS / rates[f"decode, batch {ROWS}"][f"jaxinfer {dtype}"]
        ms["overhead"] = ms["engine step"] - ms["forward"]
        ratio = ms["forward"] / ms["matmuls and dots"]
        parts = ("engine step", "overhead", "forward", "matmuls and dots", "matmuls", "dots")
        lines.append([dtype, *(f"{ms[part]:.2f}" for part in parts), f"{ratio:.2f}", "<= 1.5"])
    second = table(["ms", "engine step", "engine - forward", "forward", "floor", "its matmuls alone",
                    "its dots alone", "forward / floor", "asked"], lines)
    body = (f"{first}\n\nMedians of {rounds} rounds. llama.cpp reads the file's {model.stem.split('.')[-1]} blocks, "
            "the others dequantised weights. \"same tokens\": as transformers in float32, of all that were drawn."
            f"\n\nA decode step of {ROWS} rows at context 256:\n\n{second}")
    publish("decode_cpu", "Generation on the CPU", body, {
        "versions": versions() | peers.versions, "model": model.name, "rounds": rounds, "tokens_per_second": samples,
        "step_ms": steps, "same_tokens": {engine: float(share) for engine, share in agree.items()},
    }, keep=not options.quick)


if __name__ == "__main__":
    main()
