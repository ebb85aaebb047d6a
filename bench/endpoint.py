"""How many requests a second does an endpoint answer, and how long does each wait, beside what one would use instead?

A small MLP (784-256-10, float32), asked by 1, 64 and 1,024 callers at once, each of which asks again as soon as it has
its answer: in this process through the endpoint (threads, and coroutines of one event loop), and by calling the jitted
function one by one; and over HTTP through LitServe and Ray Serve, which batch too, with the same JAX function inside.
Then all-MiniLM-L6-v2: texts a second, beside sentence-transformers.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from support.mlp import mlp, weights
from support.report import BENCH, publish, table, versions

import jaxinfer as ji

CALLERS, SECONDS, ASKED = (1, 64, 1024), 4.0, 10_000
WIDTHS = (784, 256, 10)


class Load:
    """Latencies of callers that ask again and again for some seconds."""

    def __init__(self, seconds: float):
        self.begun = time.perf_counter()
        self.end, self.seconds = self.begun + seconds, 0.0
        self.latencies: list[float] = []

    def close(self) -> dict[str, float]:
        took = time.perf_counter() - self.begun
        p50, p99 = np.percentile(self.latencies, (50, 99))
        return {"rate": len(self.latencies) / took, "p50": float(p50), "p99": float(p99)}

    def thread(self, ask: Callable[[], object]) -> None:
        while (start := time.perf_counter()) < self.end:
            ask()
            self.latencies.append(time.perf_counter() - start)

    async def task(self, ask: Callable[[], Awaitable]) -> None:
        while (start := time.perf_counter()) < self.end:
            await ask()
            self.latencies.append(time.perf_counter() - start)


def by_threads(ask: Callable[[], object], callers: int, seconds: float) -> dict[str, float]:
    load = Load(seconds)
    threads = [threading.Thread(target=load.thread, args=(ask,)) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load.close()


def by_tasks(make: Callable[[], Awaitable[Callable[[], Awaitable]]], callers: int, seconds: float) -> dict[str, float]:
    async def run():
        asks = [await make() for _ in range(callers)]
        load = Load(seconds)
        await asyncio.gather(*(load.task(ask) for ask in asks))
        return load.close()

    return asyncio.run(run())


def http(port: int, body: bytes) -> Callable[[], Awaitable[Callable[[], Awaitable]]]:
    """Makes callers with a connection of their own that stays open."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def connect():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)

        async def ask():
            writer.write(head.encode() + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in answer.split(b"\r\n")[0], answer
            length = next((int(line.split(b":")[1]) for line in answer.lower().split(b"\r\n")
                           if line.startswith(b"content-length")), None)
            if length is not None:
                return json.loads(await reader.readexactly(length))
            chunks = await reader.readuntil(b"0\r\n\r\n")  # Ray Serve's
            return json.loads(chunks.split(b"\r\n")[1])

        return ask

    return connect


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def serve(python: Path, peer: str, port: int) -> subprocess.Popen:
    """Start a peer's server and wait until it answers."""
    server = subprocess.Popen([python, BENCH / "support" / "serve_peers.py", peer, str(port)], stdout=sys.stderr,
                              start_new_session=True)  # they start processes of their own
    end = time.monotonic() + 120
    while time.monotonic() < end and server.poll() is None:
        try:
            by_tasks(http(port, json.dumps({"x": [0.0] * WIDTHS[0]}).encode()), 1, 0.2)
            return server
        except (OSError, asyncio.IncompleteReadError, AssertionError):
            time.sleep(1)
    os.killpg(server.pid, signal.SIGKILL)
    raise RuntimeError(f"{peer} does not serve")


def mlp_rates(python: Path | None, seconds: float, callers: tuple[int, ...]) -> dict[str, dict[int, dict[str, float]]]:
    x, found = np.random.default_rng(1).normal(size=WIDTHS[0]).astype(np.float32), {}
    jitted, params = jax.jit(mlp), jax.device_put(weights(WIDTHS))
    one = jnp.asarray(x[None])
    with ji.endpoint(mlp, weights(WIDTHS), example={"x": x}, max_batch=256) as f:
        f.warmup()
        f(x)

        async def make():
            return lambda: f.asubmit(x)

        ways = {"jaxinfer, threads": lambda n: by_threads(lambda: f(x), n, seconds),
                "jaxinfer, coroutines": lambda n: by_tasks(make, n, seconds),
                "jitted function, one by one": lambda n: by_threads(
                    lambda: np.asarray(jitted(params, one)), n, seconds)}
        for name, way in ways.items():
            way(1)
            found[name] = {n: way(n) for n in callers}
    body = json.dumps({"x": x.tolist()}).encode()
    for peer in ("LitServe", "Ray Serve") if python else ():
        port = free_port()
        server = serve(python, peer, port)
        try:
            by_tasks(http(port, body), min(callers[-1], 64), seconds)
            found[f"{peer}, HTTP"] = {n: by_tasks(http(port, body), n, seconds) for n in callers}
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    return found


def minilm_rates(python: Path | None, texts: list[str], rounds: int) -> dict[str, list[float]]:
    """Texts a second, by round."""
    found: dict[str, list[float]] = {}
    with ji.load("all-minilm-l6-v2", dtype="float32") as encoder:
        encoder.warmup()
        encoder.embed(texts)
        found["jaxinfer, embed"] = [len(texts) / _timed(lambda: encoder.embed(texts)) for _ in range(rounds)]
        for n in CALLERS:
            asked = itertools.cycle(texts)
            ask = lambda asked=asked: encoder(next(asked))
            by_threads(ask, n, 0.5)
            found[f"jaxinfer, {n:,} callers"] = [by_threads(ask, n, SECONDS / 2)["rate"] for _ in range(rounds)]
    if python:
        done = subprocess.run([python, BENCH / "support" / "serve_peers.py", "sentence-transformers", str(rounds)],
                              input=json.dumps(texts), capture_output=True, text=True, check=True)
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def _timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def sentences(count: int) -> list[str]:
    words = (BENCH.parent / "LICENSE").read_text().split()
    rng = np.random.default_rng(0)
    return [" ".join(words[at: at + n]) for at, n in zip(rng.integers(0, len(words) - 60, count),
                                                         rng.integers(3, 60, count), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-serve/bin/python"))
    parser.add_argument("--quick", action="store_true", help="only see that it runs, without peers")
    options = parser.parse_args()
    if not options.quick and not options.peers_python.exists():
        parser.error(f"{options.peers_python} is not here; `make bench` sets it up, --peers-python names another")
    python = None if options.quick else options.peers_python.absolute()
    seconds, callers = (0.3, (1, 64)) if options.quick else (SECONDS, CALLERS)
    rates = mlp_rates(python, seconds, callers)
    texts = sentences(32 if options.quick else 512)
    encoded = minilm_rates(python, texts, 1 if options.quick else 3)
    rate = lambda name, n: rates[name][n]["rate"]
    lines = [[name, *(cell for n in callers for cell in (
        f"{rate(name, n):,.0f}", f"{1e3 * by[n]['p50']:.2f}", f"{1e3 * by[n]['p99']:.2f}",
        f"{rate(name, n) / rate('jitted function, one by one', n):.2f}"))] for name, by in rates.items()]
    whats = "requests/s", "p50 ms", "p99 ms", "x one by one"
    head = ["", *(f"{n:,} callers: {what}" for n in callers for what in whats)]
    body = ("A 784-256-10 MLP; asked in process at 64 and at 1,024 callers: at least 10,000 requests a second.\n\n"
            + table(head, lines, words=1))
    middle = {name: float(np.median(each)) for name, each in encoded.items()}
    best = max((name for name in middle if name.startswith("sentence")), key=middle.get, default=None)
    ratio = lambda name: f"{middle[name] / middle[best]:.2f}" if best else ""
    encoders = [[name, f"{value:,.0f}", ratio(name)] for name, value in middle.items()]
    body += ("\n\nall-MiniLM-L6-v2, float32, texts of 3 to 60 words; asked: at least 5 x sentence-transformers.\n\n"
             + table(["", "texts/s", "x sentence-transformers"], encoders))
    publish("endpoint", "Any pure function, served", body, {
        "versions": versions(), "mlp": rates, "minilm_texts_per_second": encoded}, keep=not options.quick)


if __name__ == "__main__":
    main()
