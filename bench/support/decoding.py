"""How fast an engine decodes while all of its rows do."""

from __future__ import annotations

import time

import numpy as np

import jaxinfer as ji


def decode_rate(lm: ji.LanguageModel, rows: int, prompt: int, new: int) -> float:
    """Tokens per second of `rows` requests of `prompt` tokens, from when all of them decode until the first one has
    its `new` tokens."""
    prompts = np.random.default_rng(rows).integers(10, lm.graph.vocab, (rows, prompt)).tolist()
    sampling = ji.Sampling(max_tokens=new, ignore_eos=True)
    times: list[list[float]] = [[] for _ in prompts]
    note = lambda at: lambda piece: at.extend([time.perf_counter()] * len(piece.tokens))
    answers = [lm.submit(p, sampling, reuse=False, on_piece=note(at)) for p, at in zip(prompts, times, strict=True)]
    for answer in answers:
        answer.result()
    begun, ended = max(at[0] for at in times), min(at[-1] for at in times)
    return sum(begun < when <= ended for at in times for when in at) / (ended - begun)
