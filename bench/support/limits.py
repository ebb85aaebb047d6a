"""What this device's memory and its matmul units give, measured: the two limits of a roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

LEAST, ROUNDS = 0.02, 5  # seconds that a round takes at least, and how many there are; the best one counts
ACCUMULATES = {jnp.dtype(jnp.int8): jnp.int32}  # everything else in float32


def best(once: Callable[[Any], Any], *, least: float = LEAST, rounds: int = ROUNDS) -> float:
    """Seconds of `once(last)`, which gets what the call before it returned (None at first), and so comes after it.

    Calls are dispatched ahead, and waited for at the end of a round."""
    def round_of(count: int) -> float:
        nonlocal last
        start = time.perf_counter()
        for _ in range(count):
            last = once(last)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    last, count = None, 1
    round_of(1)  # compiles
    while (took := round_of(count)) < least:
        count = max(2 * count, round(1.2 * count * least / max(took, 1e-6)))
    return min(round_of(count) for _ in range(rounds)) / count


def bandwidth(size: int, least: float = LEAST) -> float:
    """Bytes a second that a copy of `size` bytes reads and writes, or a search for the largest reads: the larger."""
    x = jnp.ones(size // 4 // 2**12 * 2**12, jnp.float32)
    copy, look = jax.jit(lambda x: x + 1, donate_argnums=0), jax.jit(lambda x, _: x.reshape(-1, 2**12).max(1))
    read = x.nbytes / best(lambda last: look(x, last), least=least)
    return max(read, 2 * x.nbytes / best(lambda last: copy(x.copy() if last is None else last), least=least))


def matmul_rate(dtype: Any, size: int, least: float = LEAST) -> float:
    """Operations a second of a matmul of two [size, size] of this dtype, weights as [out, in]."""
    dtype = jnp.dtype(dtype)
    out = ACCUMULATES.get(dtype, jnp.float32)
    numbers = lambda key: (jax.random.normal(jax.random.key(key), (size, size)) * 40).astype(dtype)
    x, w = numbers(0), numbers(1)
    dot = jax.jit(lambda x, w, _: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=out),
                  keep_unused=True)
    return 2 * size**3 / best(lambda last: dot(x, w, last), least=least)
