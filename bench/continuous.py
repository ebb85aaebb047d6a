"""What does continuous batching bring? A mixed trace of requests, served by jaxinfer, llama.cpp and transformers.

All serve the same token ids with the same weights: greedily, each alone on all cores, one after the other. Every
answer has the length that the trace says. transformers batches statically: a batch is formed of who has arrived when
the last one is done, and runs until its longest answer is. llama.cpp batches continuously, in slots, as its server
does. Both are tried with several numbers of rows, and each one's best is compared with. A probe first drops the dtype
that is slower here, of jaxinfer's and of transformers' two; where the CPU has no bfloat16 of its own only float32 runs.

Saturated, requests arrive faster than any engine can serve them, so that throughput is what the machine gives. At the
light load they arrive at half the rate that jaxinfer reached. A first token's latency counts from the request's
arrival, the queue included; a later token's is the mean over its request.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import matplotlib
import numpy as np
from decode_cpu import Peers
from support.report import BENCH, cores, machine, publish, table, versions
from support.trace import Request, Served, arriving, mixed

import jaxinfer
from jaxinfer.frontend.catalog import resolve

matplotlib.use("Agg")
from matplotlib import pyplot

REQUESTS, RATE, LIGHT = 64, 16.0, 0.5  # RATE a second saturates; LIGHT is a share of what jaxinfer then serves
ROWS, PROBE = (8, 16, 32), 16  # rows of the peers (jaxinfer has its default); rows, tokens and requests of the probe
DTYPES = ("float32", "bfloat16")
ASKED = 3.0  # x transformers' best, in output tokens per second
COLOURS = {"jaxinfer": "tab:blue", "llama.cpp": "tab:orange", "transformers": "tab:green"}
Serve = Callable[[list[Request]], Served]


class Servers(Peers):
    """The peers' process, serving traces."""

    def serve(self, peer: str, rows: int, trace: list[Request]) -> Served:
        ask = {"peer": peer, "rows": rows, "trace": [(request.at, request.prompt, request.new) for request in trace]}
        self.process.stdin.write(json.dumps(ask) + "\n")
        self.process.stdin.flush()
        return Served(**self._answer())


def ours(lm: jaxinfer.LanguageModel, trace: list[Request]) -> Served:
    times: list[list[float]] = [[] for _ in trace]

    def note(number: int, piece: jaxinfer.Piece) -> None:
        times[number] += [time.perf_counter() - start] * len(piece.tokens)

    def computed() -> int:
        """Token positions in all that ran the model so far; the ledger counts a call of N steps as one."""
        steps = lambda entry: int((re.findall(r"N=(\d+)", entry.name) or [1])[0])
        return sum((entry.tokens + entry.padding) * steps(entry) for entry in lm.ledger
                   if entry.name.startswith(("forward[", "steps[", "greedy_steps[")))

    before, answers = computed(), []
    start = time.perf_counter()
    for number, request in enumerate(trace):
        time.sleep(max(0.0, request.at - (time.perf_counter() - start)))
        sampling = jaxinfer.Sampling(max_tokens=request.new, ignore_eos=True)
        answers.append(lm.submit(request.prompt, sampling, reuse=False, on_piece=partial(note, number)))
    tokens = [list(answer.result().tokens) for answer in answers]
    slots = computed() - before
    return Served(times, tokens, slots, slots - sum(len(request.prompt) + request.new - 1 for request in trace))


def family(engine: str) -> str:
    """Whose engine "transformers bfloat16, 16 rows" is."""
    return engine.replace(",", "").split()[0]


def over(value: float, peer: str, values: dict[str, float]) -> str:
    return f"{value / values[peer]:.2f}" if peer in values else ""


def throughput(trace: list[Request], served: dict[str, Served], best: dict[str, str], judge: Served) -> str:
    """A table of all engines at the saturating load. "asked" is in the row of jaxinfer."""
    new, read = sum(request.new for request in trace), sum(len(request.prompt) for request in trace)
    rates = {engine: new / result.seconds for engine, result in served.items()}
    best_rates = {name: rates[engine] for name, engine in best.items()}
    firsts = lambda result: np.array([tokens[0] for tokens in result.tokens])
    lines = [
        [engine, f"{rate:,.0f}", f"{rate * (new + read) / new:,.0f}", over(rate, "transformers", best_rates),
         f">= {ASKED:g}" if family(engine) == "jaxinfer" else "", over(rate, "llama.cpp", best_rates),
         f"{served[engine].padding / served[engine].slots:.0%}",
         f"{np.mean(firsts(served[engine]) == firsts(judge)):.0%}"]
        for engine, rate in rates.items()
    ]
    return table(["", "output tokens/s", "prompt + output", "x transformers' best", "asked", "x llama.cpp's best",
                  "padding", "same first token"], lines)


def latency(loads: dict[str, tuple[list[Request], dict[str, Served]]]) -> str:
    """A table of the best engines at each load: percentiles, and the medians' ratios to the peers'."""
    lines = []
    for load, (trace, served) in loads.items():
        firsts = {family(engine): result.first(trace) for engine, result in served.items()}
        eaches = {family(engine): result.each() for engine, result in served.items()}
        for engine in served:
            cells = []
            for values, scale, form in ((firsts, 1, ".2f"), (eaches, 1e3, ".0f")):
                middle = {name: float(np.median(sample)) for name, sample in values.items()}
                name = family(engine)
                cells += [f"{scale * np.percentile(values[name], q):{form}}" for q in (50, 95, 99)]
                cells += [over(middle[name], peer, middle) for peer in ("transformers", "llama.cpp")]
            lines.append([load, engine, *cells])
    ratios = ["p50 x transformers", "x llama.cpp"]
    return table(["load", "", "first token, s: p50", "p95", "p99", *ratios, "each later token, ms: p50", "p95", "p99",
                  *ratios], lines, words=2)


def draw(loads: dict[str, tuple[list[Request], dict[str, Served]]], target: Path | io.BytesIO) -> None:
    """A row of axes for each load: tokens drawn over time, and how latencies spread."""
    figure, axes = pyplot.subplots(len(loads), 3, figsize=(12, 3.4 * len(loads)), layout="constrained")
    for (load, (trace, served)), (over_time, first, each) in zip(loads.items(), axes, strict=True):
        for engine, result in served.items():
            style = {"label": engine, "color": COLOURS[family(engine)]}
            times = np.sort(np.concatenate(result.times))
            over_time.plot(times, np.arange(1, len(times) + 1), **style)
            first.ecdf(result.first(trace), **style)
            each.ecdf(1e3 * np.array(result.each()), **style)
        over_time.set(title=f"{load}: tokens drawn", xlabel="seconds")
        first.set(title="share of first tokens", xlabel="within seconds of arrival", xscale="log")
        each.set(title="share of requests", xlabel="within ms for each later token")
        over_time.legend()
        first.xaxis.set_major_formatter("{x:g}")
        each.set_xlim(left=0)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    figure.savefig(target, format="png", dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of the catalog or a .gguf file")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--quick", action="store_true", help="only see that it runs: eight short requests")
    parser.add_argument("--requests", type=int, default=REQUESTS, help="the length of the trace")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="numbers of rows to try the peers with")
    options = parser.parse_args()
    if not options.peers_python.exists():
        parser.error(f"{options.peers_python} is not here; `make bench` sets it up, --peers-python names another")
    model = Path(resolve(options.model)).resolve()

    # OpenMP's barriers crawl while others use the cores, as they may in a --quick run.
    peers = Servers(options.peers_python, model, 1 if options.quick else cores())
    native = any("bf16" in name for name in machine()["instructions"])
    dtypes = DTYPES if native else DTYPES[:1]  # a CPU that must emulate bfloat16 takes minutes for the probe alone
    lms = {f"jaxinfer {dtype}": jaxinfer.load(model, dtype=dtype) for dtype in dtypes}
    for lm in lms.values():
        lm.warmup()
    text = lm.tokenizer.encode((BENCH.parent / "LICENSE").read_text())
    warm, probe, first, second = (mixed(text, 8 if options.quick else options.requests, cut=cut) for cut in range(4))
    if options.quick:
        short = lambda request: replace(request, prompt=request.prompt[:32], new=request.new // 8)
        warm, probe, first, second = (list(map(short, trace)) for trace in (warm, probe, first, second))
    warm, probe = ([replace(r, at=0.0, new=PROBE) for r in trace[:PROBE]] for trace in (warm, probe))

    names = [*lms, *(name for name in peers.names if native or "bfloat16" not in name)]
    probed: dict[str, float] = {}
    for name in names:
        serve = partial(ours, lms[name]) if name in lms else partial(peers.serve, name, PROBE)
        serve(warm)
        probed[name] = serve(probe).seconds
    engines: dict[str, Serve] = {}
    for name in names:
        if probed[name] > min(probed[other] for other in names if family(other) == family(name)):
            continue
        if name in lms:
            engines[name] = partial(ours, lms[name])
        else:
            engines |= {f"{name}, {rows} rows": partial(peers.serve, name, rows) for rows in options.rows}
    for serve in engines.values():
        serve(warm)

    full = arriving(first, RATE)
    saturated = {engine: serve(full).check(full) for engine, serve in engines.items()}
    best: dict[str, str] = {}
    for engine in sorted(engines, key=lambda engine: saturated[engine].seconds):
        best.setdefault(family(engine), engine)
    best = dict(sorted(best.items()))
    rate = LIGHT * len(full) / saturated[best["jaxinfer"]].seconds
    half = arriving(second, rate)
    light = {engine: engines[engine](half).check(half) for engine in best.values()}
    peers.close()
    for lm in lms.values():
        lm.close()

    judge = best.get("transformers", best["jaxinfer"])
    loads = {"saturated": (full, {engine: saturated[engine] for engine in best.values()}), "light": (half, light)}
    picture = BENCH / "results" / "continuous.png"
    draw(loads, io.BytesIO() if options.quick else picture)
    prompts, answers = ([f(request) for request in full] for f in (lambda r: len(r.prompt), lambda r: r.new))
    body = (f"{len(full)} requests: prompts of {min(prompts)} to {max(prompts)} tokens (mean {np.mean(prompts):.0f}), "
            f"answers of {min(answers)} to {max(answers)} (mean {np.mean(answers):.0f}). Saturated, {RATE:g} arrive in "
            f"a second; at the light load {rate:.2f}, half of what jaxinfer served. \"padding\" is the share of "
            "computed token positions that was for nobody: prompts' padding, spare rows, rows whose answer was "
            f"complete. \"same first token\": as {judge}. The probe: "
            + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in probed.items()) + ".\n\n"
            f"{throughput(full, saturated, best, saturated[judge])}\n\n{latency(loads)}\n\n"
            f"![tokens over time and latencies]({picture.relative_to(BENCH)})")
    kept = lambda trace, served: {engine: {"first": np.round(result.first(trace), 4).tolist(), "each": np.round(
        result.each(), 5).tolist(), "seconds": result.seconds, "slots": result.slots, "padding": result.padding}
        for engine, result in served.items()}
    publish("continuous", "A mixed trace of requests", body, {
        "versions": versions() | peers.versions, "model": model.name, "prompts": prompts, "answers": answers,
        "probe_seconds": probed,
        "saturated": {"arrivals_per_second": RATE, "engines": kept(full, saturated)},
        "light": {"arrivals_per_second": rate, "engines": kept(half, light)},
    }, keep=not options.quick)


if __name__ == "__main__":
    main()
