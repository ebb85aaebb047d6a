"""What do quantised weights, and keys and values, cost in quality? Perplexity on a fixed text, and how far the
distributions of the next token are from those of float32 (Kullback-Leibler divergence, in nats), beside llama.cpp's
Q8_0 and Q4_1.

The text is this repository's LICENSE, in one context. Every engine reads the same token ids. A platform's own way to
multiply is forced on the CPU where it is another's, so that its arithmetic is what is measured.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from support.report import BENCH, publish, table, versions

from jaxinfer import kernels
from jaxinfer.frontend.architectures import architecture
from jaxinfer.frontend.catalog import resolve
from jaxinfer.frontend.checkpoint import open_checkpoint
from jaxinfer.frontend.gguf_tokenizer import from_gguf
from jaxinfer.frontend.weights import load_params
from jaxinfer.graph import Graph, Params, Run, hidden
from jaxinfer.kernels.quantised import FORCED
from jaxinfer.runtime import memory as planning
from jaxinfer.scheduler import PageGroup

SLICE = 128  # positions whose logits are made at a time


class Way(NamedTuple):
    """How weights are loaded, which implementations their matmuls are forced to take, and what pages hold."""

    dtype: str
    quantize: str | None = None
    forced: dict[str, str] = {}
    kv_cache_dtype: str | None = None


WAYS = {
    "float32": Way("float32"),
    "bfloat16": Way("bfloat16"),
    "bfloat16 (prompts on a GPU)": Way("bfloat16", forced={"gated": "rounded", "project": "rounded"}),
    "int8 (CPU, TPU)": Way("bfloat16", "int8"),
    "int8 (GPU)": Way("bfloat16", "int8", {"matmul_int8": "reference"}),
    "w8a8": Way("bfloat16", "w8a8", FORCED["w8a8"]),
    "fp8, activations as they are (CPU, TPU)": Way("bfloat16", "fp8"),
    "fp8 (GPU)": Way("bfloat16", "fp8", {"matmul_fp8": "w8a8", "matmul_int8": "reference", "gated": "rounded",
                                         "project": "rounded"}),
    "int4": Way("bfloat16", "int4"),
    "int4, float32 beside it": Way("float32", "int4"),
    "float32, KV in bfloat16": Way("float32", kv_cache_dtype="bfloat16"),
    "float32, KV in int8": Way("float32", kv_cache_dtype="int8"),
    "float32, KV in fp8": Way("float32", kv_cache_dtype="fp8"),
    "bfloat16, KV in int8": Way("bfloat16", kv_cache_dtype="int8"),
    "bfloat16, KV in fp8": Way("bfloat16", kv_cache_dtype="fp8"),
}
PEERS = {"llama.cpp Q4_1 (the file)": "as it is", "llama.cpp Q8_0": "Q8_0"}


def logits_of(graph: Graph, params: Params, tokens: list[int], way: Way) -> np.ndarray:
    """The logits [T, V] after each token, in one step."""
    T = len(tokens)
    pages = -(-T // planning.PAGE_SIZE)
    groups = tuple(PageGroup(g.name, planning.PAGE_SIZE, pages, g.window) for g in graph.groups)
    shapes = planning.abstract_state(graph, groups, way.dtype, way.kv_cache_dtype)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    run = Run(np.array(tokens, np.int32), np.array([0, T], np.int32), np.array([T], np.int32), np.zeros(1, np.int32),
              {g.name: np.arange(pages, dtype=np.int32)[None] for g in groups}, T)
    with kernels.tracing("cpu", way.forced):
        x_TD = jax.jit(partial(hidden, graph))(params, state, np.zeros(1, np.int32), run)[1]
        head = jax.jit(graph.head)
        return np.concatenate([head(params, x_TD[i: i + SLICE]) for i in range(0, T, SLICE)])


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """In place."""
    logits_TV -= logits_TV.max(1, keepdims=True)
    for row_V in logits_TV:
        row_V -= np.log(np.exp(row_V).sum(dtype=np.float64)).astype(np.float32)
    return logits_TV


def compared(found_TV: np.ndarray, exact_TV: np.ndarray, tokens: list[int]) -> dict[str, float]:
    """What log-probabilities make of the text, and how far they are from exact ones."""
    following = np.array(tokens[1:])
    far_T = np.array([np.sum(np.exp(p_V) * (p_V - q_V), dtype=np.float64)
                      for p_V, q_V in zip(exact_TV, found_TV, strict=True)])
    return {"perplexity": float(np.exp(-found_TV[np.arange(len(following)), following].mean())),
            "divergence": float(far_T.mean()), "99th": float(np.quantile(far_T, 0.99)),
            "same likeliest": float((found_TV.argmax(1) == exact_TV.argmax(1)).mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name of the catalog or a .gguf file")
    parser.add_argument("--peers-python", type=Path, default=Path(".venv-peers/bin/python"))
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--quick", action="store_true", help="only see that it runs: few tokens")
    options = parser.parse_args()
    count, model = 64 if options.quick else options.tokens, Path(resolve(options.model)).resolve()
    checkpoint = open_checkpoint(model)
    graph = architecture(checkpoint.config, max_context=count).graph()
    tokens = from_gguf(checkpoint.gguf).encode((BENCH.parent / "LICENSE").read_text())[:count]
    exact_TV, found = None, {}
    for name, way in WAYS.items():
        params = load_params(graph, checkpoint.tensors, dtype=way.dtype, quantize=way.quantize, source=model.name)
        logits_TV = log_softmax(logits_of(graph, params, tokens, way))
        exact_TV = logits_TV if exact_TV is None else exact_TV
        found[name] = compared(logits_TV, exact_TV, tokens) | {"MB": planning.held(params) / 1e6}
        print(name, found[name], file=sys.stderr)
    used = versions()
    with tempfile.TemporaryDirectory() as folder:
        script = BENCH / "support" / "logits_llama.py"
        done = subprocess.run([options.peers_python, script, model, folder, *PEERS.values()], input=json.dumps(tokens),
                              capture_output=True, text=True)
        if done.returncode:
            print(f"llama.cpp is left out: {done.stderr[-2000:]}", file=sys.stderr)
        else:
            used |= {"llama-cpp-python": done.stdout.split()[-1]}
            for name, kind in PEERS.items():
                found[name] = compared(log_softmax(np.load(Path(folder) / f"{kind}.npy")), exact_TV, tokens)

    lines = [[name, f"{by['MB']:.0f}" if "MB" in by else "", f"{by['perplexity']:.4f}", f"{by['divergence']:.5f}",
              f"{by['99th']:.4f}", f"{by['same likeliest']:.1%}"] for name, by in found.items()]
    body = table(["", "weights, MB", "perplexity", "mean KL from float32", "99th percentile", "same likeliest token"],
                 lines)
    stem = model.stem.split(".")[-1]
    publish("quantise", "What quantised weights cost",
            f"{options.model}, {len(tokens)} tokens of LICENSE in one context. The checkpoint is a {stem} file: "
            f"\"float32\" are its dequantised weights, which int4 and llama.cpp's {stem} hold to the bit; what these "
            f"lose is by rounded activations, and what int4 loses of weights in float32 is not seen here.\n\n{body}",
            {"versions": used, "model": model.name, "tokens": len(tokens), "found": found}, keep=not options.quick)


if __name__ == "__main__":
    main()
