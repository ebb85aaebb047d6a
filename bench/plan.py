"""How far are a plan's predictions from what is measured?

On the CPU: SmolLM2-135M's shape with random weights is planned from its config, then loaded; the engine's steps, a
prompt, weights, pages and the steps' temporaries are measured. With `--platform gpu` the same of the 8B shape on an
H200 or an H100. With `--platform recorded` nothing is measured: the plan for an H200 is held beside what
bench/decode_gpu.py measured there.
No figure of a device was fitted to any of these numbers: they are a copy's bandwidth and the rates of single ops.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

import jaxinfer as ji
from bench.support.decoding import decode_rate
from bench.support.random_checkpoint import write
from bench.support.report import BENCH, publish, table
from bench.support.shapes import LLAMA_8B, SHAPES, SMOLLM2, TINY
from jaxinfer.compiler.buckets import Ladder
from jaxinfer.runtime.plan import Plan

CPU_WAYS = ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantize": "w8a8"})


def planned(config: Any, rows: int, context: int, new: int, **options: Any) -> Plan:
    """The plan of so many rows around a context."""
    traffic = {"prompt_tokens": context - new // 2, "answer_tokens": new, "concurrency": rows}
    return ji.plan(config, traffic=traffic, **options)


def prefill(lm: ji.LanguageModel, tokens: int, rounds: int) -> float:
    """Seconds until the first token of a prompt."""
    prompts = [[10 + (i * 7 + n) % (lm.graph.vocab - 20) for i in range(tokens)] for n in range(rounds + 1)]
    return median([lm(p, max_tokens=1, reuse=False).timings.first_token for p in prompts][1:])


def reading(ladder: Ladder, rows: int, context: int) -> int:
    """About how many steps it takes until so many prompts are read, in which the first of them draw already."""
    together = max(bucket.rows - bucket.singles for bucket in ladder.rungs.values())  # prompts that a step can read
    return max(rows * context // ladder.budget, 4 * rows // together)  # each in a few pieces that fill their buckets


def compare(path: Path, rows: tuple[int, ...], context: int, new: int, rounds: int, **options: Any) -> list[dict]:
    """Every prediction, and what was measured of it."""
    size, found = dict(max_rows=max(rows), max_context=2 * context, **options), []
    what = " ".join(str(value) for name, value in options.items() if name in ("dtype", "quantize"))
    add = lambda name, predicted, measured: found.append(
        {"of": what, "what": name, "predicted": predicted, "measured": measured})
    plans = {n: planned(path, n, context, new, **size) for n in rows}
    with ji.load(path, **size) as lm:
        lm.warmup()
        for n, plan in plans.items():
            step = next(step for step in plan.steps if step.rows == n and step.name.startswith("decode"))
            drawn = new + reading(lm._engine.executables.ladder, n, context)
            measured = median(n / decode_rate(lm, n, context - drawn // 2, drawn) for _ in range(rounds))
            add(f"{step.name} of {context}, ms", 1e3 * step.seconds, 1e3 * measured)
        plan, tokens = plans[rows[0]], context - new // 2
        add(f"first token of {tokens}, ms", 1e3 * plan.service.first_token, 1e3 * prefill(lm, tokens, rounds))
        nbytes = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree)) / 1e6
        add("weights, MB", plan.weights / 1e6, nbytes(lm.params))
        add("pages, MB", plan.pages / 1e6, nbytes(lm._engine.state))
        forwards = [entry.bytes for entry in lm.ledger if entry.name.startswith("forward")]
        add("temporaries, MB", max(p.temporaries for p in plans.values()) / 1e6, max(forwards) / 1e6)
    print(*found, sep="\n", file=sys.stderr, flush=True)
    return found


def recorded() -> list[dict]:
    """The plan for an H200 beside the steps that bench/decode_gpu.py measured on one."""
    found, data = [], json.loads((BENCH / "results" / "decode_gpu.json").read_text())
    for shape, measured in data["shapes"].items():
        for step in measured["steps"]:
            rows, context = step["rows"], step["context"]
            plan = planned(SHAPES[shape], rows, context, 96, device="h200", max_rows=256, max_context=8192,
                           compile=False)
            predicted = next(s for s in plan.steps if s.rows == rows and s.name.startswith("decode"))
            found.append({"of": shape, "what": f"decode, {rows} rows of {context:,}, ms",
                          "predicted": 1e3 * predicted.seconds, "measured": 1e3 * step["engine"]})
        for name, seconds in measured.get("prompts", {}).items():
            if name.startswith("first token of 2,048"):
                plan = ji.plan(SHAPES[shape], device="h200", max_rows=256, compile=False,
                               traffic={"prompt_tokens": 2048, "answer_tokens": 1, "concurrency": 1})
                found.append({"of": shape, "what": name, "predicted": 1e3 * plan.service.first_token,
                              "measured": seconds})
    return found


def body(found: list[dict]) -> str:
    error = lambda one: one["predicted"] / one["measured"] - 1
    times = [abs(error(one)) for one in found if one["what"].endswith("ms")]
    lines = [[one["of"], one["what"], f"{one['predicted']:,.2f}", f"{one['measured']:,.2f}", f"{error(one):+.0%}"]
             for one in found]
    return (f"Times: median error {median(times):.0%}, largest {max(times):.0%}.\n\n"
            + table(["of", "", "predicted", "measured", "error"], lines, words=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "gpu", "recorded"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: a tiny shape")
    options = parser.parse_args()
    part, gpu = options.platform, options.platform == "gpu"
    if part == "recorded":
        found = recorded()
    else:
        config = TINY if options.quick else LLAMA_8B if gpu else SMOLLM2
        rows, context, new, rounds = ((1, 2), 64, 16, 1) if options.quick else (
            ((1, 8, 64, 256), 512, 96, 3) if gpu else ((1, 8, 16), 512, 32, 1))
        ways = ({"dtype": "bfloat16", "memory": "70GiB"},) if gpu else CPU_WAYS
        with tempfile.TemporaryDirectory() as folder:
            path = write(Path(folder), config)
            found = [one for way in ways for one in compare(path, rows, context, new, rounds, **way)]
    names = {"cpu": "the CPU", "gpu": "the GPU", "recorded": "an H200, as recorded"}
    publish("plan", f"A plan beside what is measured: {names[part]}", body(found), {"found": found},
            keep=not options.quick, part=part)


if __name__ == "__main__":
    main()
