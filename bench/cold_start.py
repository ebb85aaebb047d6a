"""How long from nothing to the first word? Process start to the first streamed token, the model being on disk.

Each row is fresh processes, medians over rounds that alternate between the rows. "empty" has a compile cache that
was just created, "filled" the one that the "empty" process before it left. `jaxinfer run` is timed from outside, to
the first byte on its stdout; the others tell when each stage ended. Compiling and loading overlap. "beyond" is the
first token less imports and the device's start.

With `--gpu 8b`, a checkpoint of that shape with random weights is written beside this machine's other temporary files
and loaded onto its GPU: with what 16 threads of bare `pread` take for the same file, from the disk and from the page
cache, and with transformers of this Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

if "--gpu" not in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from support.report import BENCH, publish, table, versions

from jaxinfer.frontend.catalog import resolve

CHILD = BENCH / "support" / "first_token.py"
STAGES = ("imported", "device", "opened", "loaded", "compiled", "first token", "beyond")
ASKED = {"empty": "12", "filled": "4; 2.5 beyond"}
READERS, PIECE = 16, 2**24  # of bare pread: threads, and bytes in one call


def stages(python: str | Path, engine: str, model: str, cache: str | Path = "unused", *prompt: str) -> dict[str, float]:
    """Seconds to each stage of a fresh process of `first_token.py`."""
    command = [python, CHILD, repr(time.time()), engine, model, *prompt]
    done = subprocess.run(command, env=os.environ | {"JAXINFER_CACHE": cache}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{engine} in {python} ended with {done.returncode}:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["text"].strip(), f"{engine} said nothing"
    sys.stderr.write(done.stderr)  # our own table of the start
    reached = answer["reached"]
    return reached | ({"beyond": reached["first token"] - reached["device"]} if "device" in reached else {})


def bare_read(file: Path) -> float:
    """Seconds that READERS threads take to bring a file into host memory, each into a buffer that it uses again."""
    size, descriptor, mine = file.stat().st_size, os.open(file, os.O_RDONLY), threading.local()

    def read(at: int) -> int:
        if not hasattr(mine, "buffer"):
            mine.buffer = bytearray(PIECE)
        return os.preadv(descriptor, [mine.buffer], at)

    try:
        with ThreadPoolExecutor(READERS) as pool:
            start = time.perf_counter()
            assert sum(pool.map(read, range(0, size, PIECE))) == size
            return time.perf_counter() - start
    finally:
        os.close(descriptor)


def drop_cache(file: Path) -> None:
    """Ask the kernel to forget a file's pages, which it has written."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def on_gpu(shape: str, keep: bool) -> None:
    from support import random_checkpoint
    from support.shapes import SHAPES

    prompt = [str(token) for token in range(1, 17)]
    with tempfile.TemporaryDirectory() as scratch:
        model = random_checkpoint.write(Path(scratch, "model"), SHAPES[shape])
        file, store = model / "model.safetensors", f"{scratch}/store"
        runs: dict[str, dict[str, float]] = {}
        limits = {}
        runs["jaxinfer, empty store, warm"] = stages(sys.executable, "jaxinfer", str(model), store, *prompt)
        for state in ("warm", "cold"):
            ready = (lambda: drop_cache(file)) if state == "cold" else (lambda: bare_read(file))
            ready()
            limits[state] = bare_read(file)
            ready()
            runs[f"jaxinfer, filled store, {state}"] = stages(sys.executable, "jaxinfer", str(model), store, *prompt)
            ready()
            runs[f"transformers, {state}"] = stages(sys.executable, "transformers", str(model), store, *prompt)
        size = file.stat().st_size
    asked = {state: 1.5 * seconds + 3 for state, seconds in limits.items()}
    lines = [[row, *(f"{run[stage]:.2f}" if stage in run else "" for stage in STAGES),
              f"< {asked[row.split()[-1]]:.2f}" if "filled" in row else ""] for row, run in runs.items()]
    body = table(["seconds since the process started", *STAGES, "beyond, asked"], lines)
    body += f"\n\n{size / 1e9:.1f} GB; {READERS} threads of bare pread: " + ", ".join(
        f"{state} {seconds:.2f} s ({size / seconds / 1e9:.1f} GB/s)" for state, seconds in limits.items())
    body += ". Asked: 1.5 times that and 3 s, beyond imports and the device's start."
    publish("cold_start", f"From process start to the first token: {shape} on a GPU", body, {
        "versions": versions(), "shape": shape, "bytes": size, "bare": limits, "runs": runs,
    }, keep=keep, part=f"gpu_{shape}", flags=f"--gpu {shape}")


def command_line(model: str, cache: str) -> dict[str, float]:
    """Seconds to the first byte that `jaxinfer run` prints."""
    command = [Path(sys.executable).with_name("jaxinfer"), "run", model, "The sky is blue because", "--max-tokens", "8"]
    start = time.perf_counter()
    with subprocess.Popen(command, env=os.environ | {"JAXINFER_CACHE": cache}, stdout=subprocess.PIPE) as process:
        assert process.stdout.read(1), "jaxinfer run printed nothing"
        seconds = time.perf_counter() - start
        process.stdout.read()
    return {"first token": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of the catalog or a .gguf file")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", choices=("8b", "1b", "tiny"), help="random weights of this shape, on this GPU")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one round")
    options = parser.parse_args()
    if options.gpu:
        on_gpu(options.gpu, keep=not options.quick)
        return
    if not options.peers_python.exists():
        parser.error(f"{options.peers_python} is not here; `make bench` sets it up, --peers-python names another")
    rounds = 1 if options.quick else options.rounds
    model, peers = str(Path(resolve(options.model)).resolve()), options.peers_python
    ask = "from importlib.metadata import version; print(version('torch'), version('transformers'))"
    theirs = subprocess.run([peers, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/safetensors"
        stages(peers, "save", f"{model}:{folder}")
        rows = {"transformers, the same GGUF": ("transformers", model),
                "transformers, safetensors bfloat16": ("transformers", folder)}
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(dir=scratch) as cache, tempfile.TemporaryDirectory(dir=scratch) as other:
                for state in ("empty", "filled"):
                    runs[f"jaxinfer, {state} cache"].append(stages(sys.executable, "jaxinfer", model, cache))
                    runs[f"jaxinfer run, {state} cache"].append(command_line(model, other))
            for row, (engine, source) in rows.items():
                runs[row].append(stages(peers, engine, source))
    lines = []
    for row, each in runs.items():
        middle = {stage: median(run[stage] for run in each) for stage in STAGES if stage in each[0]}
        asked = next((f"< {limit}" for state, limit in ASKED.items() if f"{state} cache" in row), "")
        spread = f"{min(run['first token'] for run in each):.2f} to {max(run['first token'] for run in each):.2f}"
        lines.append([row, *(f"{middle[stage]:.2f}" if stage in middle else "" for stage in STAGES), spread, asked])
    body = table(["seconds since the process started", *STAGES, "spread", "asked"], lines)
    body += f"\n\nMedians of {rounds} rounds; the file is in the page cache."
    publish("cold_start", "From process start to the first token", body, {
        "versions": versions() | dict(zip(("torch", "transformers"), theirs, strict=True)), "model": Path(model).name,
        "runs": runs,
    }, keep=not options.quick)


if __name__ == "__main__":
    main()
