"""What does it cost to have every request's logits the same to the bit, whatever shares its steps?

The same model and requests with and without `batch_invariant=True`, one after the other in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import jaxinfer as ji
from bench.support.decoding import decode_rate
from bench.support.report import publish, table

CONTEXT, ROWS = 1024, 32


def decode(lm: ji.LanguageModel, rows: int, prompt: int, new: int) -> float:
    return decode_rate(lm, rows, prompt, new + rows)


def prefill(lm: ji.LanguageModel, tokens: int) -> float:
    """Prompt tokens per second of one request."""
    prompt = np.random.default_rng(tokens).integers(10, 40000, tokens).tolist()
    return tokens / lm(prompt, max_tokens=1, reuse=False).timings.first_token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="a check that it runs")
    given = parser.parse_args()
    new, rounds = (4, 1) if given.quick else (48, 3)
    kinds = {f"decode, batch {rows}": (decode, rows, 64, new) for rows in (1, 8, 32)}
    kinds |= {"prefill of 512": (prefill, 512)}
    found: dict[str, dict[str, list[float]]] = {kind: {} for kind in kinds}
    for name, invariant in (("default", False), ("invariant", True)):
        with ji.load(given.model, max_context=CONTEXT, max_rows=ROWS, batch_invariant=invariant) as lm:
            for kind, (measure, *how) in kinds.items():
                measure(lm, *how)  # compiles
                time.sleep(1)
                found[kind][name] = [measure(lm, *how) for _ in range(rounds)]
    lines = []
    for kind, by in found.items():
        fast, exact = statistics.median(by["default"]), statistics.median(by["invariant"])
        lines.append([kind, f"{fast:.1f}", f"{exact:.1f}", f"{fast / exact:.2f}"])
    body = table(["", "default, tokens/s", "batch_invariant, tokens/s", "default / invariant"], lines)
    publish("batch_invariance", "What batch invariance costs",
            f"{given.model}, max_rows={ROWS}: every step has {ROWS} rows and {ROWS + 16} tokens.\n\n{body}",
            {"tokens_per_second": found}, keep=not given.quick)


if __name__ == "__main__":
    main()
