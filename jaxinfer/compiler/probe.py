"""What this device's memory and its matmul units give, measured: the two limits of a roofline, and how near to them the
ops of a step come on a device of which nothing is known.

Axes: T tokens, O outputs, I inputs, N query heads, K KV heads, H head width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import kernels
from jaxinfer.compiler.hardware import Hardware, Seconds, Work
from jaxinfer.graph import Run
from jaxinfer.kernels.quantised import FP8, INT4, INT8, blank

LEAST, ROUNDS = 0.02, 5  # seconds that a round takes at least, and how many there are; the best one counts
QUICK, CALLS, MOST_COPIES = 0.01, 4, 64  # seconds of a probe's round, calls in its program, and all it has arrays for
EDGE, SPREAD = 1024, 2**26  # of the matmul, and bytes, by which a device is known: more than a cache holds
MOST_WEIGHTS, MOST_SEEN, MOST_OPERATIONS, SLOTS = 2**22, 1024, 2 * 10**9, 64  # of what is tried; the rest is like it
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


@dataclass(frozen=True)
class Probed(Hardware):
    """A device whose figures nobody has written down: each matmul and each attention that a step needs is tried on it,
    once for each shape, with what `forced` says. How much longer it takes than its limit stands `beside`."""

    device: Any = None
    forced: Mapping[str, str] = field(default_factory=dict)
    found: dict[tuple, float] = field(default_factory=dict)

    def seconds(self, work: Work) -> Seconds:
        limit = super().seconds(work)
        if work.op not in PROBES:
            return limit
        probe = PROBES[work.op]
        key, share = probe.cut(*work.shape)
        if (work.op, *key) not in self.found:
            where = kernels.tracing(self.platform, self.forced, kind=self.kind), jax.default_device(self.device)
            with where[0], where[1]:
                self.found[work.op, *key] = PROBES[work.op].try_it(*key)
        took = self.found[work.op, *key] / share
        return limit._replace(beside=max(0.0, took - limit.all))


def probed(device: jax.Device, memory: int, forced: Mapping[str, str]) -> Probed:
    """A device that is here, its bandwidth and the rate of a large matmul measured at once, in less than a second."""
    with jax.default_device(device):
        rates = {dtype: matmul_rate(dtype, EDGE) for dtype in ("float32", "bfloat16", "int8")}
        return Probed(device.device_kind, device.platform, device.device_kind, memory, bandwidth(SPREAD), rates,
                      float("inf"), "measured here, each op as it is used", measured=True, device=device, forced=forced)


class Probe(NamedTuple):
    """How a kind of work is tried: `cut(*shape)` is the shape that is tried and its share of the work; `try_it` gives
    the seconds of one call of it, among others on so many arrays that they come from memory and not from a cache."""

    cut: Callable[..., tuple[tuple, float]]
    try_it: Callable[..., float]


def _cut_matmul(format: str | None, dtype: str, T: int, O: int, I: int) -> tuple[tuple, float]:
    rows = min(O, max(64, MOST_WEIGHTS // I))
    return (format, dtype, T, rows, I), rows / O


def _matmul(format: str | None, dtype: str, T: int, O: int, I: int) -> float:
    kind = next((known for known in (INT8, FP8, INT4) if known.name == format), None)
    ones = lambda shape, dtype: jnp.ones(shape, dtype)
    w_OI = ones((O, I), dtype) if kind is None else blank(kind, (O, I), dtype, ones)

    def chain(x_TI, weights):
        for w_OI in weights:
            x_TI = x_TI + kernels.matmul(x_TI, w_OI)[:, :1] * 1e-9  # one after the other
        return x_TI, weights

    return _chained(chain, jnp.ones((T, I)), _sets(w_OI, 2 * T * O * I))


def _cut_attend(rows: int, new: int, seen: int, N: int, K: int, H: int, *dtypes: Any) -> tuple[tuple, float]:
    return (rows, new, min(seen, max(new, MOST_SEEN)), N, K, H, *dtypes), min(seen, max(new, MOST_SEEN)) / seen


def _attend(rows: int, new: int, seen: int, N: int, K: int, H: int, dtype: str, kv_cache_dtype: str | None) -> float:
    T, ints, P = rows * new, lambda *args: jnp.arange(*args, dtype=jnp.int32), -(-seen // SLOTS)
    pages = kernels.init_pages(rows * P, SLOTS, K, H, jnp.dtype(dtype), kv_cache_dtype)
    run = Run(jnp.zeros(T, jnp.int32), ints(0, T + 1, new), jnp.full(rows, seen, jnp.int32), ints(rows),
              {"": ints(rows * P).reshape(rows, P)}, new, rows if new == 1 else 0)
    new_TKH = jnp.ones((T, K, H))

    def chain(q_TNH, layers):
        for n, pages in enumerate(layers):
            out_TNH, layers[n] = kernels.attend(q_TNH, new_TKH, new_TKH, pages, run, group="", scale=H**-0.5)
            q_TNH = q_TNH + out_TNH * 1e-9
        return q_TNH, layers

    return _chained(chain, jnp.ones((T, N, H)), _sets(pages, 4 * T * N * H * seen))


def _sets(arrays: Any, operations: int) -> list[list[Any]]:
    """Copies of what a call owns, as many as make the caches forget the first, but no more than are soon computed; a
    program calls the op for each of a set."""
    size = sum(x.nbytes for x in jax.tree.leaves(arrays))
    count = max(1, min(SPREAD // size, MOST_OPERATIONS // operations, MOST_COPIES))
    each = min(count, CALLS)
    return [[jax.tree.map(jnp.copy, arrays) for _ in range(each)] for _ in range(count // each)]


def _chained(chain: Callable, x: jax.Array, sets: list[list[Any]]) -> float:
    """Seconds of one call of a chain's op; `chain(x, set)` gives x and the set, whose memory it may write."""
    program = jax.jit(chain, donate_argnums=1)

    def once(_):
        out, own = program(x, sets.pop(0))
        sets.append(own)
        return out

    return best(once, least=QUICK, rounds=3) / len(sets[0])


PROBES = {"matmul": Probe(_cut_matmul, _matmul), "routed_ffn": Probe(_cut_matmul, _matmul),
          "attend": Probe(_cut_attend, _attend)}
