"""How long from nothing to the first word? Process start to the first streamed token, the model being on disk.

Each row is fresh processes, medians over rounds that alternate between the rows. "empty" has a compile cache that
was just created, "filled" the one that the "empty" process before it left. `jaxinfer run` is timed from outside, to
the first byte on its stdout; the others tell when each stage ended. Compiling and loading overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from support.report import BENCH, publish, table, versions

from jaxinfer.frontend.catalog import resolve

CHILD = BENCH / "support" / "first_token.py"
STAGES = ("imported", "opened", "loaded", "compiled", "first token")
ASKED = {"empty": 12, "filled": 4}


def stages(python: str | Path, engine: str, model: str, cache: str | Path = "unused") -> dict[str, float]:
    """Seconds to each stage of a fresh process of `first_token.py`."""
    command = [python, CHILD, repr(time.time()), engine, model]
    done = subprocess.run(command, env=os.environ | {"JAXINFER_CACHE": cache}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{engine} in {python} ended with {done.returncode}:\n{done.stderr}")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["text"].strip(), f"{engine} said nothing"
    return answer["reached"]


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
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one round")
    options = parser.parse_args()
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
