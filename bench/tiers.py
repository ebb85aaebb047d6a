"""How near is a streamed model to the limit that its weights have to come through? A decode step of one row, beside the
time in which the same bytes come with nothing computed from them: from the disk to memory on a CPU (with a cold page
cache), from pinned memory to the device on a GPU. And are the tokens those of the whole model?
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from support import random_checkpoint
from support.report import publish, table

import jaxinfer as ji
from jaxinfer.runtime.ring import Ring

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096,
         "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
         "head_dim": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
         "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16", "bos_token_id": 0,
         "eos_token_id": 1}
SMALL = {**LLAMA, "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 12,
         "num_attention_heads": 32, "head_dim": 64}
TINY = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPT, ASKED = list(range(10, 74)), 0.8


def cold(ring: Ring) -> None:
    """From now on, what is read from the disk leaves the page cache again, and what lies there has left it."""
    spill = ring._spill
    file = spill.file.fileno()
    os.fsync(file)
    drop = lambda: os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    read = spill.read
    spill.read = lambda i, buffer: (read(i, buffer), drop())
    drop()


def bare(ring: Ring, device: jax.Device, spare: np.ndarray) -> float:
    """Seconds in which what streams comes, into a `spare` buffer from the disk, with nothing computed; the ring itself
    stands still meanwhile."""
    start = time.perf_counter()
    for i in ring.tiers.streamed:
        if i in ring.tiers.on_disk:
            ring._spill.read(i, spare)
        else:
            there = jax.block_until_ready(jax.device_put(ring._hosted[i], SingleDeviceSharding(device)))
            for array in jax.tree.leaves(there):
                array.delete()
    return time.perf_counter() - start


def step(lm: ji.LanguageModel, new: int) -> tuple[float, tuple[int, ...]]:
    """Seconds of a decode step, and the tokens."""
    output = lm(PROMPT, max_tokens=new, ignore_eos=True, reuse=False)
    return (output.timings.total - output.timings.first_token) / (new - 1), output.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="gpu: an 8B shape in 6 GiB")
    parser.add_argument("--device-memory")
    parser.add_argument("--directory", help="where the checkpoint is written")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    gpu = options.platform == "gpu"
    config = LLAMA if gpu else TINY if options.quick else SMALL
    budget = options.device_memory or ("6GiB" if gpu else "36MiB" if options.quick else "600MiB")
    new = 4 if options.quick else 17 if gpu else 9
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        path = random_checkpoint.write(Path(scratch), config)
        load = partial(ji.load, path, device=options.platform, max_context=256, max_rows=1)
        with load(device_memory=budget) as lm:
            ring, tiers = lm._ring, lm.tiers
            spare = np.zeros(tiers.largest, np.uint8)
            print(f"loaded in {lm.timings['load_seconds']:.1f} s", flush=True)
            if tiers.on_disk:
                cold(ring)
            step(lm, new)  # compiles
            rounds = []
            for _ in range(options.rounds):
                least = bare(ring, lm.device, spare)
                start = time.perf_counter()
                seconds, tokens = step(lm, new)
                line = lm.timeline.since(start)
                rounds.append({"least": least, "step": seconds, "overlap": line.overlap})
                print(rounds[-1], flush=True)
        with load(memory="60GiB" if gpu else "8GiB") as lm:
            step(lm, new)
            whole, expected = step(lm, new)
    same = sum(a == b for a, b in zip(tokens, expected, strict=True))
    middle = {name: median(found[name] for found in rounds) for name in rounds[0]}
    share = median(found["least"] / found["step"] for found in rounds)
    rate = tiers.swept / middle["least"] / 1e9
    rows = [["layers, and those that stream", f"{tiers.layers}, {len(tiers.streamed)}"],
            ["MB of weights held on the device", f"{tiers.device / 1e6:,.0f}"],
            ["MB that come in every step", f"{tiers.swept / 1e6:,.0f}"],
            ["GB/s, alone", f"{rate:.2f}"],
            ["limit, ms", f"{1e3 * middle['least']:.1f}"],
            ["step, ms", f"{1e3 * middle['step']:.1f}"],
            [f"limit / step (asked: {ASKED})", f"{share:.2f}"],
            ["overlap of coming and computing", f"{middle['overlap']:.0%}"],
            ["step of the whole model, ms", f"{1e3 * whole:.1f}"],
            ["tokens that are the same", f"{same} of {len(expected)}"]]
    body = table([f"device_memory {budget}", ""], rows)
    source = "pinned memory" if gpu else "the disk, with a cold page cache"
    body += ("\n\nRandom weights in bfloat16, one row, whose likeliest tokens rounding may change. The limit is the "
             f"time in which the same bytes come alone, from {source}.")
    publish("tiers", f"A model larger than its {'GPU' if gpu else 'memory'}'s budget", body,
            {"config": config, "budget": budget, "rounds": rounds, "unstreamed": whole, "same": same},
            keep=not options.quick, part="gpu" if gpu else "")


if __name__ == "__main__":
    main()
