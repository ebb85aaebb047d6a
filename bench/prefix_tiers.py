"""How soon does the first token come after a long beginning that has been read before: read again, and found on the
device, on the host, on the disk? And which of these does the engine choose by what it has measured?
"""

from __future__ import annotations

import argparse
import os
import tempfile
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import numpy as np
from support import random_checkpoint
from support.report import publish, table
from support.shapes import LLAMA_8B, SMOLLM2

import jaxinfer as ji

OTHERS = 4  # prompts as long, by which the device, and then the host, are filled
PAGE = 64


class Asker:
    """A model whose device holds one long prompt, and whose host holds two."""

    def __init__(self, lm: ji.LanguageModel, tokens: int):
        self.lm, self.engine = lm, lm._engine
        self.lower, self.mover = lm._engine.scheduler.tree.lower, lm._engine.mover
        rng = np.random.default_rng(0)
        draw = lambda count: rng.integers(10, 1000, count).tolist()
        self.beginning, *self.others = (draw(tokens) for _ in range(1 + OTHERS))
        self.draw = draw

    def ask(self, beginning: list[int], **options) -> ji.Output:
        return self.lm([*beginning, *self.draw(8)], max_tokens=2, ignore_eos=True, **options)

    def settle(self) -> None:
        """Wait until the disk has all that it was given, and its file has left the page cache."""
        self.mover._disk.submit(int).result()
        file = self.mover._spill.file.fileno()
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def first(self, where: str) -> tuple[float, int, dict[str, float | None]]:
        """Seconds to the first token, the tokens that were found, and what the engine believed before."""
        self.ask(self.beginning)
        for other in self.others[: {"host": 1, "disk": OTHERS}.get(where, 0)]:
            self.ask(other)
            self.settle()
        believed = dict(vars(self.lower.costs))
        vars(self.lower.costs).update(back=None, read=None)  # it is to come back, whatever that takes
        output = self.ask(self.beginning, reuse=where != "read again")
        for name, before in believed.items():
            if getattr(self.lower.costs, name) is None:
                setattr(self.lower.costs, name, before)
        return output.timings.first_token, output.reused, believed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu", help="gpu: an 8B shape in bfloat16")
    parser.add_argument("--tokens", type=int, help="of the beginning")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where a GPU's checkpoint is written")
    parser.add_argument("--quick", action="store_true", help="a check that it runs")
    options = parser.parse_args()
    gpu, quick = options.platform == "gpu", options.quick
    tokens = options.tokens or (256 if quick else 4096 if gpu else 1024)
    rounds, config = 1 if quick else options.rounds, LLAMA_8B if gpu else SMOLLM2
    head = config["hidden_size"] // config["num_attention_heads"]
    page = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * PAGE * 2
    context = tokens + 2 * PAGE
    whole = page * (context // PAGE + 1)
    with tempfile.TemporaryDirectory(dir=options.directory) if gpu else nullcontext() as scratch:
        source = random_checkpoint.write(Path(scratch), config) if scratch else "smollm2-135m"
        with ji.load(source, dtype="bfloat16", device=options.platform, max_context=context, max_rows=1,
                     prefix_host_memory=2 * whole, prefix_disk_memory=8 * whole) as lm:
            if not quick:
                lm.warmup()
            lm._engine.executables.compile_all(*lm._engine.executables.moving)
            asker, found = Asker(lm, tokens), {}
            for where in ("read again", "device", "host", "disk"):
                asker.first(where)
                found[where] = [asker.first(where) for _ in range(rounds)]
                print(where, [f"{1e3 * seconds:.1f} ms, {reused} tokens" for seconds, reused, _ in found[where]],
                      flush=True)
            told = lm.prefix_tiers
            print(told)
            asker.ask(asker.beginning)
            for other in asker.others:
                asker.ask(other)
                asker.settle()
            chosen = asker.ask(asker.beginning).reused
    again = median(seconds for seconds, *_ in found["read again"])
    rows = [[where, f"{min(reused for _, reused, _ in each):,}", f"{1e3 * median(s for s, *_ in each):.1f}",
             f"{again / median(s for s, *_ in each):.2f}"] for where, each in found.items()]
    ms = lambda seconds: "not measured" if seconds is None else f"{1e3 * seconds:.2f} ms"
    body = table(["the beginning is found", "tokens not read", "first token, ms", "x sooner"], rows)
    body += (f"\n\nA beginning of {tokens:,} tokens, {tokens // PAGE} pages of {page / 1e6:.1f} MB; medians of "
             f"{rounds}. The disk's file has left the page cache. As the engine measured it, a page takes "
             f"{ms(told.host.back)} from the host and {ms(told.disk.back)} from the disk to the host, its tokens take "
             f"{ms(PAGE * told.seconds_per_token)} to read; a step waits {ms(told.host.away)} for a page that leaves. "
             f"Left to itself, it brought {chosen:,} tokens back from the disk.")
    publish("prefix_tiers", f"A beginning that comes back, {'8B on a GPU' if gpu else 'on a CPU'}", body,
            {"config": config, "tokens": tokens, "found": found, "told": str(told), "chosen": chosen}, keep=not quick,
            part=options.platform if gpu else "")


if __name__ == "__main__":
    main()
