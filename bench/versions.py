"""What do callers feel while weights are swapped, a new version is loaded, or another model of the registry is flooded?

Latencies of requests to an endpoint of a registry from 16 threads: before, during ten swaps a second, while new
versions are loaded, warmed and flipped to, and while a second endpoint is asked for more than it can serve.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from support.mlp import mlp, weights
from support.report import publish, table

import jaxinfer as ji
from jaxinfer.errors import Rejected

CALLERS, SECONDS, ASKED = 16, 6.0, 1.5
WIDTHS = (784, 1024, 10)


def make(seed: int) -> Callable[[], object]:
    return lambda: ji.endpoint(mlp, weights(WIDTHS, seed), example=np.zeros(WIDTHS[0], np.float32), max_batch=16,
                               max_waiting=64)


def latencies(handle, seconds: float, meanwhile: Callable[[float], None] = lambda until: None) -> np.ndarray:
    """Of all requests in `seconds`, while `meanwhile(end)` does what it does."""
    x, found, end = np.ones(WIDTHS[0], np.float32), [], time.perf_counter() + seconds

    def ask():
        while (start := time.perf_counter()) < end:
            handle(x)
            found.append(time.perf_counter() - start)

    threads = [threading.Thread(target=ask) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    meanwhile(end)
    for thread in threads:
        thread.join()
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a check that it runs")
    quick = parser.parse_args().quick
    seconds = 0.5 if quick else SECONDS
    registry, both = ji.Registry(), [weights(WIDTHS, 1), weights(WIDTHS, 2)]
    registry.load("mine", make(1))
    registry.load("other", make(3))
    mine, other = registry["mine"], registry["other"]

    def swap(end):
        turn = 0
        while time.perf_counter() < end:
            mine.swap(both[turn % 2])
            turn += 1
            time.sleep(0.1)

    def load(end):
        while time.perf_counter() < end - 0.2:
            registry.load("mine", make(2))

    def flood(end):
        x = np.ones(WIDTHS[0], np.float32)
        while time.perf_counter() < end:
            try:
                other.submit(x)
            except Rejected:
                time.sleep(0.0005)

    latencies(mine, 1.0)
    kinds = {"nothing": lambda end: None, "ten swaps a second": swap, "loads and flips": load,
             "another model is flooded": flood}
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
    for _ in range(1 if quick else 3):
        for kind, meanwhile in kinds.items():
            found[kind].append(latencies(mine, seconds, meanwhile))
    registry.close()
    all_of = {kind: np.concatenate(each) for kind, each in found.items()}
    base = np.percentile(all_of["nothing"], 99)
    lines = [[kind, f"{len(each) / seconds / len(found[kind]):,.0f}", *(f"{1e3 * np.percentile(each, q):.2f}"
              for q in (50, 95, 99)), f"{np.percentile(each, 99) / base:.2f}"] for kind, each in all_of.items()]
    body = (f"A 784-1024-10 MLP, {CALLERS} callers; no request was lost. Asked: p99 during a swap within {ASKED} x of "
            "before.\n\n" + table(["meanwhile", "requests/s", "p50 ms", "p95 ms", "p99 ms", "p99 x before"], lines))
    publish("versions", "Swaps and neighbours", body,
            {"milliseconds": {kind: [np.round(1e3 * np.percentile(each, range(0, 101, 5)), 3).tolist() for each in many]
                              for kind, many in found.items()}}, keep=not quick)


if __name__ == "__main__":
    main()
