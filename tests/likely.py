"""What a tiny model finds likely, and how far two models are from each other in it."""

import numpy as np

from tests import tiny

HOW = tiny.ONE_BUCKET
PROMPTS = ["The sky is blue because", "x", [(3 + 7 * i) % 320 for i in range(100)]]


def likeliest(lm) -> list[dict[int, float]]:
    """The log-probabilities of the twenty likeliest first tokens after each prompt."""
    outputs = lm.generate(PROMPTS, max_tokens=1, ignore_eos=True, logprobs=20)
    return [dict(output.logprobs[0].top) for output in outputs]


def apart(found: dict[int, float], expected: dict[int, float]) -> tuple[int, float]:
    """How many tokens both hold among their likeliest, and how far these are from each other on average."""
    shared = found.keys() & expected.keys()
    return len(shared), float(np.mean([abs(found[t] - expected[t]) for t in shared]))
