"""transformers on the GPU, in its own Python: `peers_gpu.py ROWS... --context S`, with a model's config.json on stdin.

The weights are random, made on the device in bfloat16; keys and values are in a static cache, and `generate` compiles
the forward step as it does by default for such a cache (CUDA graphs included). A step is what one more token costs
all rows: the time of a run less that of a shorter one. The last line of its output is {"versions", "seconds"}, by
rows. Where torch has no such device it ends with status 1, and a line that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from statistics import median

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, CompileConfig, StaticCache

SHORT, ROUNDS = 8, 3


def model_of(config: dict, device: str) -> torch.nn.Module:
    config = AutoConfig.for_model(**config)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # every run is as long as was asked
    return model


def step_seconds(model: torch.nn.Module, rows: int, context: int, new: int) -> float:
    """Of a decode step of so many rows, around `context`."""
    prompt = torch.randint(10, model.config.vocab_size, (rows, context - new // 2), device=model.device)
    cache = StaticCache(config=model.config, max_cache_len=context + new)
    compiled = CompileConfig()
    compiled._compile_all_devices = model.device.type == "cpu"  # `generate` would not compile there, to see it run

    def seconds(count: int) -> float:
        cache.reset()
        start = time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, do_sample=False,
                             max_new_tokens=count, pad_token_id=0, compile_config=compiled)
        assert out.shape[1] == prompt.shape[1] + count, out.shape
        out.cpu()  # waits
        return time.perf_counter() - start

    for _ in range(2):  # compiles, then captures
        seconds(SHORT)
    return median(seconds(new) - seconds(SHORT) for _ in range(ROUNDS)) / (new - SHORT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, nargs="+")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device")
    model = model_of(json.load(sys.stdin), options.device)
    found = {}
    with torch.inference_mode():
        for rows in options.rows:
            torch.compiler.reset()  # a program for each shape, none for all
            found[rows] = step_seconds(model, rows, options.context, options.new)
            print(rows, found[rows], file=sys.stderr, flush=True)
    print(json.dumps({"versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                      "seconds": found}))


if __name__ == "__main__":
    main()
