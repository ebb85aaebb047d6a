"""Does the engine answer here? One greedy answer on JAX's first device, with its ledger and step times.

    python bench/first_contact.py [MODEL] [DTYPE]
"""

import json
import sys

import jax

import jaxinfer as ji

source, dtype = (*sys.argv[1:3], *("smollm2-135m", "bfloat16")[len(sys.argv) - 1:])
with ji.load(source, dtype=dtype, max_rows=8, max_context=2048) as lm:
    first = lm.chat("Why is the sky blue?", max_tokens=48)
    again = lm.chat("Why is the sky blue?", max_tokens=48)
    batch = lm.generate(["The sky is blue because", "Once upon a time", "The capital of France is"] * 2, max_tokens=48)
    print(first.text)
    print(batch[2].text)
    print(lm.ledger)
    assert first.tokens == again.tokens
    print(json.dumps({
        "device": jax.devices()[0].device_kind, "jax": jax.__version__, "dtype": dtype,
        "load_seconds": round(lm.timings["load_seconds"], 2), "first_token_cold": round(first.timings.first_token, 2),
        "first_token_warm": round(again.timings.first_token, 4),
        "tokens_per_second": round(again.timings.tokens_per_second, 1), "tokens": again.tokens[:16],
    }))
