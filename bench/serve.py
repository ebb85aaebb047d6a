"""What becomes of more requests than a server can serve, beside llama.cpp's server, and what does ours cost itself?

Chats over HTTP, streamed, of the same GGUF file. The load is open: requests arrive by a Poisson process, whatever
became of those before, and every latency counts from when a request was due. The rates are shares of what jaxinfer
served when as many came within BURST seconds as have a row or may wait. Both servers are up and take turns, rate by
rate. What has not ended PATIENCE seconds after the last arrival is hung up on: a latency that this cuts off is a lower
bound, which the table marks. A request is good if all of it came, its first text within GOOD_FIRST seconds.
llama-server queues whatever comes.

--only load|streams|cost: one of three questions. "streams" asks for a thousand at once. "cost" asks a model that takes
next to no time the same in process and over HTTP: what HTTP adds is the server's own.

A first run, which `--quick` may be, fills the compile cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from support.open_load import Reply, offer
from support.random_checkpoint import write
from support.report import BENCH, cores, machine, publish, table, versions
from support.shapes import SHAPES

import jaxinfer as ji
from jaxinfer.frontend.catalog import resolve

ROWS, CONTEXT, WAITING = 32, 512, 16  # sequences at once, tokens of each; requests that may wait for a row
NEW, WORDS = 32, 24  # tokens of an answer; words of a question
SHARES, SECONDS, PATIENCE = (0.3, 0.7, 1.0, 1.5, 3.0), 10.0, 10.0
BURST = 4.0  # seconds in which as many come as have a row or may wait, which tells what a server can do
GOOD_FIRST = 5.0
STREAMS, STREAM_NEW, STREAM_PATIENCE = 1000, 4, 90.0
COST_ROWS, COST_NEW, COST_ROUNDS = 64, 128, 5
START = 600  # seconds that a server may take to be ready: the first time, it compiles
MODEL = "served"


def note(what: str) -> None:
    """What goes on, for who watches."""
    print(f"{time.strftime('%X')} {what}", file=sys.stderr, flush=True)


class Served(NamedTuple):
    """A server's process, and where it is asked."""

    name: str
    url: str
    pid: int

    def ask(self, requests: list[tuple[float, dict[str, Any]]], patience: float) -> list[Reply]:
        replies = offer(f"{self.url}/v1/chat/completions", requests, patience)
        note(f"{self.name}: {sum(reply.whole for reply in replies)} of {len(replies)} chats answered")
        return replies

    @property
    def usage(self) -> dict[str, int]:
        """Open files, and MiB in memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        kib = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        return {"files": len(os.listdir(f"/proc/{self.pid}/fd")), "mib": kib >> 10}


@contextmanager
def serving(name: str, command: list[Any], port: int, ready: str) -> Iterator[Served]:
    """A server, once `ready` is answered; its log is shown if it does not come."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + START
            while not _answers(f"http://127.0.0.1:{port}{ready}"):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise RuntimeError(f"{name} does not serve:\n{log.read().decode(errors='replace')[-2000:]}")
                time.sleep(0.2)
            note(f"{name} is ready")
            yield Served(name, f"http://127.0.0.1:{port}", process.pid)
        finally:
            for number, patience in ((signal.SIGINT, 10), (signal.SIGKILL, 60)):
                if process.poll() is None:
                    process.send_signal(number)
                    process.send_signal(number)  # whoever asks twice does not want to wait
                    try:
                        process.wait(patience)
                    except subprocess.TimeoutExpired:
                        continue


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            models = json.load(response).get("models", {}).values()  # of which llama-server says nothing
            coming = [model["programs"] for model in models if "programs" in model]  # in the background
            return all(one["ready"] + len(one.get("failed", ())) == one["total"] for one in coming)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ours(model: Path, *options: Any):
    port, program = free_port(), "from jaxinfer.cli import main; main()"
    native = any("bf16" in name for name in machine()["instructions"])
    command = [sys.executable, "-c", program, "serve", f"{MODEL}={model}", "--port", port, "--max-rows", ROWS,
               "--max-context", CONTEXT, "--dtype", "bfloat16" if native else "float32", "--quantize", "w8a8",
               *options]
    return serving("jaxinfer", command, port, "/readyz")


def theirs(binary: Path, model: Path):
    port = free_port()
    command = [binary, "-m", model, "--alias", MODEL, "--host", "127.0.0.1", "--port", port, "-np", ROWS,
               "-c", ROWS * CONTEXT, "-t", cores(), "-tb", cores()]
    return serving("llama-server", command, port, "/health")


class Questions:
    """Chats of which no two ask the same."""

    def __init__(self):
        self._rng = np.random.default_rng(0)
        self._words = (BENCH.parent / "LICENSE").read_text().split()

    def chat(self, new: int, words: int = WORDS) -> dict[str, Any]:
        said = " ".join(self._rng.choice(self._words, words))
        return {"model": MODEL, "messages": [{"role": "user", "content": said}], "max_tokens": new, "temperature": 0,
                "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}

    def at_once(self, count: int, new: int, words: int = WORDS, within: float = 0.0) -> list[tuple[float, dict]]:
        return [(within * i / count, self.chat(new, words)) for i in range(count)]

    def poisson(self, rate: float, seconds: float) -> list[tuple[float, dict]]:
        due = np.cumsum(self._rng.exponential(1 / rate, int(3 * rate * seconds) + 30))
        return [(float(at), self.chat(NEW)) for at in due[due < seconds]] or [(0.0, self.chat(NEW))]


class Sample(NamedTuple):
    """Percentiles of what may have been cut off: then a value is a lower bound."""

    values: list[float]
    cut: list[bool]

    def at(self, q: float, scale: float = 1.0, form: str = ".2f") -> str:
        if not self.values:
            return ""
        order = np.argsort(self.values)
        index = order[max(0, math.ceil(q / 100 * len(order)) - 1)]
        return (">" if self.cut[index] else "") + f"{scale * self.values[index]:{form}}"


class Outcome:
    """What became of the requests of one load, of `seconds` in which they arrived."""

    def __init__(self, replies: list[Reply], seconds: float):
        self.refused = [reply for reply in replies if reply.status in (429, 503)]
        self.taken = [reply for reply in replies if reply.status not in (429, 503)]
        self.whole = [reply for reply in self.taken if reply.whole]
        self.lost = [reply for reply in self.taken if not reply.whole]
        over = max(reply.end for reply in replies)
        self.rate = sum(reply.tokens for reply in self.whole) / over
        self.good = sum(reply.first <= GOOD_FIRST for reply in self.whole) / seconds
        began = [bool(reply.times) for reply in self.taken]
        self.first = Sample([r.first if b else r.took for r, b in zip(self.taken, began, strict=True)],
                            [not b for b in began])
        self.took = Sample([reply.took for reply in self.taken], [not reply.whole for reply in self.taken])
        gaps = [gap for reply in self.taken for gap in reply.gaps]
        self.gaps = Sample(gaps, [False] * len(gaps))
        self.told = Sample([reply.took for reply in self.refused], [False] * len(self.refused))
        self.retries = all(reply.retry_after for reply in self.refused)

    def line(self) -> list[str]:
        percents = (50, 95, 99)
        return [str(len(self.taken)), str(len(self.lost)), str(len(self.refused)), self.told.at(99, 1e3, ".0f"),
                f"{self.rate:.0f}", f"{self.good:.2f}", *(self.first.at(q) for q in percents),
                *(self.gaps.at(q, 1e3, ".0f") for q in percents), *(self.took.at(q) for q in percents)]


HEAD = ["taken", "cut off", "429", "429 told within ms: p99", "tokens/s", "good/s", "first text, s: p50", "p95", "p99",
        "between tokens, ms: p50", "p95", "p99", "whole answer, s: p50", "p95", "p99"]


def kept(replies: list[Reply]) -> list[dict[str, Any]]:
    return [{"due": round(r.due, 4), "status": r.status, "times": [round(t, 4) for t in r.times],
             "end": round(r.end, 4), "tokens": r.tokens, "whole": r.whole} for r in replies]


def load(servers: list[Served], asks: Questions, shares: tuple[float, ...], seconds: float, patience: float
         ) -> tuple[str, dict[str, Any]]:
    """Tables and samples of every rate."""
    capacity = {}
    for server in servers:
        for count in (1, 8, ROWS):  # what has not been touched yet is slow
            server.ask(asks.at_once(count, 8, within=1.0), 120)
        replies = server.ask(asks.at_once(ROWS + WAITING, NEW, within=BURST), 120)
        done = [reply for reply in replies if reply.whole]
        capacity[server.name] = len(done) / max(reply.end for reply in done)
    lines, samples, outcomes = [], [], dict[tuple[float, str], Outcome]()
    for share in shares:
        rate = share * capacity["jaxinfer"]
        requests = asks.poisson(rate, seconds)
        for server in servers:
            replies = server.ask(requests, patience)
            outcome = outcomes[share, server.name] = Outcome(replies, seconds)
            lines.append([f"{share:g} x, {rate:.2f}/s", server.name, *outcome.line()])
            samples.append({"share": share, "rate": rate, "server": server.name, "replies": kept(replies)})
            time.sleep(1)  # for what was hung up on
    most, full = max(shares), min(shares, key=lambda share: abs(share - 1))
    flooded, busy = outcomes[most, "jaxinfer"], outcomes[full, "jaxinfer"]
    body = (f"Questions of {WORDS} words, answers of {NEW} tokens, {ROWS} rows; jaxinfer (w8a8) lets {WAITING} wait. A "
            "burst: "
            + ", ".join(f"{name} {rate:.2f} requests/s" for name, rate in capacity.items()) + ".\n\n"
            + table(["offered", "", *HEAD], lines, words=2)
            + "\n\nAsked: past saturation the accepted keep their latency, and the others get 429 at once. At "
            f"{most:g} x the p99 of the first text is {flooded.first.at(99)} s, at {full:g} x {busy.first.at(99)} s; "
            f"{len(flooded.refused)} of {len(flooded.refused) + len(flooded.taken)} were refused")
    if flooded.refused:
        body += (f", the slowest in {flooded.told.at(100, 1e3, '.0f')} ms, "
                 f"{'all' if flooded.retries else 'not all'} with Retry-After")
    body += "."
    if len(servers) > 1:
        mine, other = (server.name for server in servers)
        ratios = [f"{share:g} x: {outcomes[share, mine].rate / outcomes[share, other].rate:.2f}" for share in shares
                  if outcomes[share, other].rate]
        body += f" Tokens/s, x {other}: {', '.join(ratios)}."
    return body, {"capacity": capacity, "loads": samples}


class Watch:
    """The most files and memory that a process had, while it is watched."""

    def __init__(self, server: Served):
        self.before, self.most, self._server, self._over = server.usage, server.usage, server, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            now = self._server.usage
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def streams(servers: dict[str, Served], asks: Questions, count: int, patience: float) -> tuple[str, dict[str, Any]]:
    """All at once, within a second."""
    lines, data = [], {}
    for name, server in servers.items():
        server.ask(asks.at_once(ROWS, STREAM_NEW, 2), 120)
        watch = Watch(server)
        outcome = Outcome(server.ask(asks.at_once(count, STREAM_NEW, 2, within=1.0), patience), 1.0)
        watch.close()
        time.sleep(1)
        after = server.usage
        lines.append([name, str(len(outcome.whole)), str(len(outcome.refused)), str(len(outcome.lost)),
                      outcome.told.at(50, 1e3, ".0f"), outcome.told.at(99, 1e3, ".0f"), outcome.first.at(50),
                      outcome.first.at(99), f"{outcome.rate:.0f}", f"{watch.before['files']} / {watch.most['files']} / "
                      f"{after['files']}", f"{watch.before['mib']} / {watch.most['mib']} / {after['mib']}"])
        data[name] = {"whole": len(outcome.whole), "refused": len(outcome.refused), "lost": len(outcome.lost),
                      "before": watch.before, "most": watch.most, "after": after}
    head = ["", "whole", "429", "lost", "429 told within ms: p50", "p99", "first text, s: p50", "p99", "tokens/s",
            "open files before / most / after", "MiB before / most / after"]
    return (f"{count:,} chats that arrive within one second, answers of {STREAM_NEW} tokens. Asked: none is lost.\n\n"
            + table(head, lines)), data


def cost(asks: Questions, rows: int, new: int, rounds: int) -> tuple[str, dict[str, Any]]:
    """CPU time, of all threads, that a token takes: in process, and over HTTP with the client elsewhere."""
    found: dict[str, list[tuple[float, float]]] = {"in process": [], "over HTTP": []}
    with tempfile.TemporaryDirectory() as scratch:
        lm = ji.load(write(Path(scratch), SHAPES["tiny"] | {"bos_token_id": 0}), dtype="float32", max_rows=ROWS,
                     max_context=CONTEXT)
        lm.warmup()
        with lm, ji.serve({MODEL: lm}, port=0) as server:
            sampling = ji.Sampling(max_tokens=new, ignore_eos=True)
            prompts = lambda: np.random.default_rng(time.perf_counter_ns()).integers(10, 1000, (rows, WORDS)).tolist()

            def in_process() -> float:
                pieces: list[ji.Piece] = []
                begun = time.perf_counter()
                answers = [lm.submit(prompt, sampling, on_piece=pieces.append) for prompt in prompts()]
                assert all(len(answer.result().tokens) == new for answer in answers)
                return time.perf_counter() - begun

            def over_http() -> float:
                body = {key: value for key, value in asks.chat(new).items() if key != "messages"}
                replies = offer(f"{server.url}/v1/completions", [(0.0, body | {"prompt": p}) for p in prompts()], 120)
                assert all(reply.whole and reply.tokens == new for reply in replies)
                return max(reply.end for reply in replies)

            for _ in range(rounds + 1):  # the first touches all for the first time
                for name, way in (("in process", in_process), ("over HTTP", over_http)):
                    before = time.process_time()
                    seconds = way()
                    found[name].append((time.process_time() - before, seconds))
    tokens = rows * new
    cpu, wall = ({name: min(pair[i] for pair in each[1:]) / tokens for name, each in found.items()} for i in (0, 1))
    lines = [[name, f"{1 / wall[name]:,.0f}", f"{1e6 * cpu[name]:.0f}"] for name in found]
    own = 1e6 * (cpu["over HTTP"] - cpu["in process"])
    lines.append(["the server's own", "", f"{own:.0f}"])
    body = (f"A model of two layers, {rows} streams of {new} tokens, a token an event; the best of {rounds} rounds.\n\n"
            + table(["", "tokens/s", "CPU us a token"], lines))
    return body, {"rounds": found, "own_us_per_token": own}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of the catalog or a .gguf file")
    parser.add_argument("--llama-server", type=Path, default=Path(".venv-peers/llama.cpp/bin/llama-server"))
    parser.add_argument("--only", choices=("load", "cost", "streams"), help="one question; nothing is kept")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: few requests, and no peer")
    options = parser.parse_args()
    if not options.quick and options.only != "cost" and not options.llama_server.exists():
        parser.error(f"{options.llama_server} is not here; `make bench` builds it, --llama-server names another")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers are ended too
    model, asks, quick = Path(resolve(options.model)).resolve(), Questions(), options.quick
    parts, data = list[str](), dict[str, Any]()
    wanted = (options.only,) if options.only else ("load", "cost", "streams")
    if {"load", "streams"} & set(wanted):
        with ExitStack() as stack:
            mine = stack.enter_context(ours(model, "--max-waiting", WAITING))
            peers = [] if quick else [stack.enter_context(theirs(options.llama_server.resolve(), model))]
            if "load" in wanted:
                shares, seconds, patience = ((0.5, 3.0), 4.0, 6.0) if quick else (SHARES, SECONDS, PATIENCE)
                part, data["load"] = load([mine, *peers], asks, shares, seconds, patience)
                parts.append(part)
            if "streams" in wanted:
                roomy = stack.enter_context(ours(model))
                named = {f"jaxinfer, {WAITING} may wait": mine, "jaxinfer, its default": roomy}
                part, data["streams"] = streams(named | {peer.name: peer for peer in peers}, asks,
                                                100 if quick else STREAMS, STREAM_PATIENCE)
                parts.append(part)
    if "cost" in wanted:
        part, data["cost"] = cost(asks, COST_ROWS, 16 if quick else COST_NEW, 2 if quick else COST_ROUNDS)
        parts.append(part)
    peer = {} if quick or options.only == "cost" else {"llama-server": version_of(options.llama_server.resolve())}
    publish("serve", "A server under load", "\n\n".join(parts), {
        "versions": versions() | peer, "model": model.name, **data}, keep=not quick and options.only is None)


def version_of(binary: Path) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    return (said.stdout + said.stderr).split("version:", 1)[1].split("\n", 1)[0].strip()


if __name__ == "__main__":
    main()
