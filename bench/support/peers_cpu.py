"""The peers on the CPU, in their own Python: reads requests from stdin as JSON lines, answers on stdout.

First it says which peers are here: {"peers": [...], "versions": {...}}. Then, for each {"peer", "prompts", "new"},
{"read", "seconds", "tokens"}: the time to read all prompts (token ids, equally long) and draw a token for each, and
that to draw `new` tokens for each, greedily.
For each {"peer", "trace", "rows"}, {"times", "tokens", "slots", "padding"}: how it served the trace's requests, given
as [seconds until it arrives, prompt, new], with at most `rows` at once; see `Served` in trace.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np

BATCH = 2048  # the most tokens that llama-server reads at once, its --batch-size
PROBES = 5  # decode steps by which a number of threads is judged


class Traffic:
    """A trace as it is served: who waits, what each request got and when, and what was computed for it."""

    def __init__(self, trace: list[tuple[float, list[int], int]]):
        self.waiting = deque(enumerate(trace))
        self.times: list[list[float]] = [[] for _ in trace]
        self.tokens: list[list[int]] = [[] for _ in trace]
        self.slots = self.padding = 0
        self.start = time.perf_counter()

    def arrived(self, most: int, *, wait: bool) -> list[tuple[int, list[int], int]]:
        """At most `most` of those that have arrived, as (number, prompt, new); `wait` sleeps until somebody has."""
        now = lambda: time.perf_counter() - self.start
        if wait and self.waiting:
            time.sleep(max(0.0, self.waiting[0][1][0] - now()))
        found = []
        while len(found) < most and self.waiting and self.waiting[0][1][0] <= now():
            number, (_, prompt, new) = self.waiting.popleft()
            found.append((number, prompt, new))
        return found

    def give(self, number: int, tokens: list[int], times: list[float]) -> None:
        self.tokens[number] += tokens
        self.times[number] += [at - self.start for at in times]


class Stamps:
    """A streamer of transformers that notes when tokens come; it is first given the prompts."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, _tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@dataclass
class Slot:
    """A sequence in llama.cpp's memory: request `number` and its tokens that are not read yet."""

    id: int
    number: int
    new: int
    unread: list[int]
    read: int = 0


class Transformers:
    """`generate` of transformers, its defaults but for greedy drawing, on weights dequantised from the GGUF file."""

    def __init__(self, path: Path, dtype: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch, number = torch, getattr(torch, dtype)
        self.model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=number).eval()
        assert self.model.dtype == number, self.model.dtype

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """The tokens, and when all prompts had their first one."""
        ids, stamps = self.torch.tensor(prompts), Stamps()
        with self.torch.inference_mode():
            out = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), do_sample=False, use_cache=True,
                                      min_new_tokens=new, max_new_tokens=new, pad_token_id=0, streamer=stamps)
        return out[:, ids.shape[1]:].tolist(), stamps.times[1]

    def serve(self, traffic: Traffic, rows: int) -> None:
        """Static batches: whoever has arrived (at most `rows`) is padded on the left to the longest prompt and runs
        until the longest answer is done; then the next batch is formed. Each has its tokens as they are drawn."""
        while traffic.waiting:
            numbers, prompts, new = zip(*traffic.arrived(rows, wait=True), strict=True)
            longest, most = max(map(len, prompts)), max(new)
            ids = self.torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = self.torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            stamps = Stamps()
            with self.torch.inference_mode():
                out = self.model.generate(ids, attention_mask=mask, do_sample=False, use_cache=True, streamer=stamps,
                                          max_new_tokens=most, eos_token_id=None, pad_token_id=0)
            for number, row, n in zip(numbers, out[:, longest:].tolist(), new, strict=True):
                traffic.give(number, row[:n], stamps.times[1:n + 1])
            computed = len(prompts) * (longest + most - 1)  # the last token is drawn, and never read
            traffic.slots += computed
            traffic.padding += computed - sum(map(len, prompts)) - sum(n - 1 for n in new)


def likeliest(logits_V: np.ndarray) -> int:
    return int(logits_V.argmax())


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
            self._probe(self.contexts[rows], rows)
        return self.contexts[rows]

    def _probe(self, context, rows: int) -> None:
        """Decode with as many threads as are the fastest at it, here and now, and prompts of one row with all."""
        def seconds(threads: int) -> float:
            self.api.llama_set_n_threads(context, threads, threads)
            self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
            start = time.perf_counter()
            self._step(context, 0, [[1]] * rows)
            return time.perf_counter() - start

        counts = [n for n in (1, 2, 4, 8, 16, 32, 64) if n < self.threads] + [self.threads]
        took = {n: min(seconds(n) for _ in range(PROBES)) for n in counts}
        best = min(counts, key=took.get)
        self.api.llama_set_n_threads(context, best, self.threads if rows == 1 else best)
        print(f"llama.cpp decodes {rows} rows with {best} threads", file=sys.stderr)

    def _decode(self, context, entries: list[tuple[int, int, int, bool]], look=likeliest) -> list:
        """Read tokens, given as (sequence, position, token, last); what `look` makes of the logits after each that is
        `last`: the likeliest token."""
        batch = self.api.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens = len(entries)
        for n, (sequence, position, token, last) in enumerate(entries):
            batch.token[n], batch.pos[n], batch.logits[n] = token, position, last
            batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
        failed = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        assert not failed, f"llama_decode returned {failed}"
        logits = (self.api.llama_get_logits_ith(context, n) for n, entry in enumerate(entries) if entry[3])
        return [look(np.ctypeslib.as_array(pointer, (self.vocab,))) for pointer in logits]

    def logits(self, tokens: list[int]) -> np.ndarray:
        """The logits [T, V] after each token of one text."""
        context = self._context(1)
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        return np.stack(self._decode(context, [(0, i, token, True) for i, token in enumerate(tokens)], np.copy))

    def _step(self, context, start: int, tokens_R: list[list[int]]) -> list[int]:
        """Read the rows' next tokens, all from position `start`; the likeliest token after each."""
        last = len(tokens_R[0]) - 1
        return self._decode(context, [(row, start + i, token, i == last)
                                      for row, tokens in enumerate(tokens_R) for i, token in enumerate(tokens)])

    def generate(self, prompts: list[list[int]], new: int) -> tuple[list[list[int]], float]:
        """The tokens, and when all prompts had their first one."""
        context = self._context(len(prompts))
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        drawn, start = [self._step(context, 0, prompts)], len(prompts[0])
        read = time.perf_counter()
        while len(drawn) < new:
            drawn.append(self._step(context, start, [[token] for token in drawn[-1]]))
            start += 1
        return [list(row) for row in zip(*drawn, strict=True)], read

    def serve(self, traffic: Traffic, rows: int) -> None:
        """Continuous batching over `rows` slots, as llama-server does it: each call reads the next token of every slot
        that answers, then as much of the newcomers' prompts as `BATCH` leaves room for."""
        context = self._context(rows)
        memory = self.api.llama_get_memory(context)
        self.api.llama_memory_clear(memory, True)
        free, running = list(range(rows)), []
        while traffic.waiting or running:
            for number, prompt, new in traffic.arrived(len(free), wait=not running):
                running.append(Slot(free.pop(), number, new, list(prompt)))
            entries = []
            for slot in sorted(running, key=lambda slot: len(slot.unread) > 1):
                count = min(len(slot.unread), BATCH - len(entries))
                last = count == len(slot.unread)
                entries += [(slot.id, slot.read + i, token, last and i == count - 1)
                            for i, token in enumerate(slot.unread[:count])]
                slot.unread, slot.read = slot.unread[count:], slot.read + count
            traffic.slots += len(entries)
            drawn, now = self._decode(context, entries), time.perf_counter()
            by_id = {slot.id: slot for slot in running}
            ends = [by_id[sequence] for sequence, _, _, last in entries if last]
            for slot, token in zip(ends, drawn, strict=True):
                traffic.give(slot.number, [token], [now])
                slot.unread = [token]
                if len(traffic.tokens[slot.number]) == slot.new:
                    running.remove(slot)
                    free.append(slot.id)
                    self.api.llama_memory_seq_rm(memory, slot.id, -1, -1)


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
        peer = peers[ask["peer"]]
        if "trace" in ask:
            traffic = Traffic(ask["trace"])
            peer.serve(traffic, ask["rows"])
            answer = {name: getattr(traffic, name) for name in ("times", "tokens", "slots", "padding")}
        else:
            start = time.perf_counter()
            tokens, read = peer.generate(ask["prompts"], ask["new"])
            answer = {"read": read - start, "seconds": time.perf_counter() - start, "tokens": tokens}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
