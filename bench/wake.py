"""How long does a model that sleeps take to wake? Two of which one fits take turns; one is woken beside the time
in which its bytes come with nothing else done: from pinned memory to the device on a GPU (L2), from the file to memory
on a CPU (L3: its memory is the device's, so that who sleeps there is in its checkpoint, which is mapped again).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from support import random_checkpoint
from support.report import publish, table
from tiers import LLAMA, PROMPT, SMALL, TINY

import jaxinfer as ji

BLOCK = 2**23  # bytes of one read


def seconds(act: Any) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def moved(bed: Any) -> float:
    """Seconds in which weights come from the host's copy to the device."""
    host, shapes = bed.stash._host, bed.stash.shapes
    start = time.perf_counter()
    there = jax.block_until_ready(jax.device_put(host, jax.tree.map(lambda x: x.sharding, shapes)))
    took = time.perf_counter() - start
    for array in jax.tree.leaves(there):
        array.delete()
    return took


def read(path: Path) -> float:
    """Seconds in which the file comes from the page cache to memory."""
    buffer, at = np.empty(BLOCK, np.uint8), 0
    with open(path / "model.safetensors", "rb", buffering=0) as file:
        start = time.perf_counter()
        while count := os.preadv(file.fileno(), [buffer], at):
            at += count
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="gpu: an 8B shape")
    parser.add_argument("--directory", help="where the checkpoint is written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    options = parser.parse_args()
    gpu = options.platform == "gpu"
    config = TINY if options.quick else LLAMA if gpu else SMALL
    how = dict(max_tokens=4, ignore_eos=True, reuse=False)
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        path = random_checkpoint.write(Path(scratch), config)
        load = partial(ji.load, path, device=options.platform, max_context=256, max_rows=1)
        memory = "20GiB" if gpu else "4GiB"
        with load(memory=memory) as lm:
            lm.warmup()
            nbytes, expected = lm.nbytes, lm(PROMPT, **how).tokens
        registry = ji.Registry(device_memory=int(1.5 * nbytes))
        rounds = []
        for name in ("one", "other"):
            registry.load(name, lambda: load(memory=memory), needs=nbytes)
            print(f"{name} is loaded", flush=True)
        beds = {one.name: bed for one, bed in registry._dormitory._beds.items()}
        first = seconds(lambda: registry.sleep("other"))  # its weights are copied to the host
        registry.sleep("one")
        for _ in range(options.rounds):
            registry.wake("one")
            place = registry.tiers["one/1"]
            found = {"wake": place.seconds, "bytes": place.seconds * place.rate}
            found["bare"] = moved(beds["one/1"]) if gpu else read(path)
            awake = registry["one"](PROMPT, **how)
            found["sleep"] = seconds(lambda: registry.sleep("one"))
            registry.wake("other")
            output = registry["one"](PROMPT, **how)  # the other one goes for it
            found |= {"first": awake.timings.first_token, "woken first": output.timings.first_token}
            same = output.tokens == awake.tokens == expected
            registry.sleep("one")
            rounds.append(found)
            print(found, flush=True)
        print(registry.tiers)
        registry.close()
    middle = {name: median(found[name] for found in rounds) for name in rounds[0]}
    share = median(found["bare"] / found["wake"] for found in rounds)
    rows = [["MB of weights", f"{middle['bytes'] / 1e6:,.0f}"],
            ["transfer alone, ms", f"{1e3 * middle['bare']:.1f}"],
            ["GB/s, alone", f"{middle['bytes'] / middle['bare'] / 1e9:.2f}"],
            ["wake, ms", f"{1e3 * middle['wake']:.1f}"],
            ["transfer / wake", f"{share:.2f}"],
            ["going to sleep the first time, ms", f"{1e3 * first:.1f}"],
            ["going to sleep again, ms", f"{1e3 * middle['sleep']:.1f}"],
            ["first token of one that is awake, ms", f"{1e3 * middle['first']:.1f}"],
            ["first token of one that sleeps, while the other is awake, ms", f"{1e3 * middle['woken first']:.1f}"],
            ["tokens are the same", "yes" if same else "no"]]
    source = "pinned memory (L2)" if gpu else "its checkpoint in the page cache, which is mapped (L3)"
    body = table([f"from {source}", ""], rows)
    body += ("\n\nRandom weights in bfloat16; two models, and a `device_memory` for 1.5 of them. To wake one is to "
             "bring its weights and to make empty pages.")
    publish("wake", f"A model that sleeps, on a {'GPU' if gpu else 'CPU'}", body,
            {"config": config, "rounds": rounds, "first sleep": first, "same": same},
            keep=not options.quick, part="gpu" if gpu else "")


if __name__ == "__main__":
    main()
