"""The peers on the CPU, in their own Python: reads requests from stdin as JSON lines, answers on stdout.

First it says which peers are here: {"peers": [...], "versions": {...}}. Then, for each {"peer", "prompts", "new"},
{"seconds", "tokens"}: the time to read all prompts (token ids, equally long) and draw `new` tokens greedily for each.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np


class Transformers:
    """`generate` of transformers, its defaults but for greedy drawing, on weights dequantised from the GGUF file."""

    def __init__(self, path: Path, dtype: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, number = torch, getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=number).eval()
        assert self.model.dtype == number, self.model.dtype

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), do_sample=False, use_cache=True,
                                      min_new_tokens=new, max_new_tokens=new, pad_token_id=0)
        return out[:, ids.shape[1]:].tolist()


class LlamaCpp:
    """llama.cpp through its C interface, so that sequences run as one batch; one context per batch size."""

    def __init__(self, path: Path, threads: int, *, extra: bool, context: int = 1024):
        import llama_cpp

        self.api, self.threads, self.context, self.contexts = llama_cpp, threads, context, {}
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library holds a bare pointer to it
        llama_cpp.llama_log_set(self.quiet, None)
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = extra  # weights repacked for special instructions, AMX among them
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def _context(self, rows: int):
        if rows not in self.contexts:
            params = self.api.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.n_batch = rows * self.context, rows, rows * self.context
            params.n_threads = params.n_threads_batch = self.threads
            self.contexts[rows] = self.api.llama_init_from_model(self.model, params)
        return self.contexts[rows]

    def _step(self, context, start: int, tokens_R: list[list[int]]) -> list[int]:
        """Read the rows' next tokens, all from position `start`; the likeliest token after each."""
        flat = [(row, i, token) for row, tokens in enumerate(tokens_R) for i, token in enumerate(tokens)]
        batch, last = self.api.llama_batch_init(len(flat), 0, 1), len(tokens_R[0]) - 1
        batch.n_tokens = len(flat)
        for n, (row, i, token) in enumerate(flat):
            batch.token[n], batch.pos[n], batch.logits[n] = token, start + i, i == last
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
        failed = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        assert not failed, f"llama_decode returned {failed}"
        ends = [n for n, (_, i, _) in enumerate(flat) if i == last]
        logits = (self.api.llama_get_logits_ith(context, n) for n in ends)
        return [int(np.ctypeslib.as_array(pointer, (self.vocab,)).argmax()) for pointer in logits]

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        context = self._context(len(prompts))
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        drawn, start = [self._step(context, 0, prompts)], len(prompts[0])
        while len(drawn) < new:
            drawn.append(self._step(context, start, [[token] for token in drawn[-1]]))
            start += 1
        return [list(row) for row in zip(*drawn, strict=True)]


def survives(path: Path, threads: int) -> bool:
    """Whether llama.cpp can use its repacked weights here: with AMX some builds crash (its issue 20824)."""
    child = os.fork()
    if not child:
        LlamaCpp(path, threads, extra=True).generate([[1] * 32], 2)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def main(path: Path, threads: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries may print: only answers reach the real stdout
    os.dup2(2, 1)
    peers, versions = {}, {}
    try:
        import llama_cpp

        extra = survives(path, threads)  # first: a process with threads should not fork
        peers["llama.cpp"] = LlamaCpp(path, threads, extra=extra)
        versions["llama-cpp-python"] = llama_cpp.__version__ + ("" if extra else " (without AMX: it crashes here)")
    except ImportError as error:
        print(f"llama.cpp is left out: {error}", file=sys.stderr)
    try:
        import torch
        import transformers

        versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
        transformers.logging.set_verbosity_error()
        for dtype in ("float32", "bfloat16"):
            peers[f"transformers {dtype}"] = Transformers(path, dtype, threads)
    except ImportError as error:
        print(f"transformers is left out: {error}", file=sys.stderr)
    print(json.dumps({"peers": list(peers), "versions": versions}), file=answers)
    for line in sys.stdin:
        ask = json.loads(line)
        start = time.perf_counter()
        tokens = peers[ask["peer"]].generate(ask["prompts"], ask["new"])
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens}), file=answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
