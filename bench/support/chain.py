"""How long one call of an op takes on this device: many calls in one program, each after the one before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bench.support.ops import Arrays, Case
from jaxinfer import kernels
from jaxinfer.compiler.probe import best

MOST_SETS = 8


def seconds(case: Case, platform: str, spread: int, calls: int | None = None) -> tuple[float, str]:
    """Of one call, and the implementation that it took.

    A program is a chain of calls, each of which begins when the one before it is done (XLA neither joins nor drops any:
    a barrier stands between them), and programs are dispatched ahead. Every call has weights, pages or logits of its
    own, `spread` bytes in all, so that they come from memory as those of a model's many layers do, and not from a
    cache; activations come from wherever the call before has put them.
    """
    calls = calls or case.calls

    def chain(x, own_N, state_N, shared, _last):
        for n, own in enumerate(own_N):
            x, own = jax.lax.optimization_barrier((x, own))
            x, state_N[n] = jax.lax.optimization_barrier(case.call(x, own, state_N[n], shared))
        return x, state_N

    with kernels.tracing(platform, kind=jax.devices()[0].device_kind) as traced:
        first = jax.tree.map(jnp.asarray, case.make())
        size = sum(x.nbytes for x in jax.tree.leaves((first.own, first.state)))
        sets = [_copies(first, calls) for _ in range(min(MOST_SETS, -(-spread // max(1, size * calls))))]
        before = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                              jax.eval_shape(chain, first.x, *sets[0], first.shared, None)[0])
        program = jax.jit(chain, donate_argnums=2, keep_unused=True).lower(first.x, *sets[0], first.shared, before)
    compiled = program.compile()

    def once(last):
        own_N, state_N = sets.pop(0)
        x, state_N = compiled(first.x, own_N, state_N, first.shared, before if last is None else last)
        sets.append((own_N, state_N))
        return x

    return best(once) / calls, next(iter(traced.chosen.values()), "")


def _copies(arrays: Arrays, calls: int) -> tuple[list[Any], list[Any]]:
    """The own arrays and states of so many calls."""
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    return [copy(arrays.own) for _ in range(calls)], [copy(arrays.state) for _ in range(calls)]
