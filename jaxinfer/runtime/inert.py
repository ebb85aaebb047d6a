"""Whether padding is inert: a request in a batch that is padded gives what it gives in one that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.compiler.functions import FunctionKey, Functions
from jaxinfer.errors import InvalidOption
from jaxinfer.runtime.padded import BATCH, Ladders, write

LOOSE, TIGHT = 0.05, 1e-3  # of the largest result: below float32, and from there


def check_inert(functions: Functions, params: Any, ladders: Ladders, examples: list[np.ndarray]) -> None:
    """Raises InvalidOption if the function's results for the example, cut to what is padded most, change with the
    padding. It runs twice, unless nothing is padded or the shape that is cut is not one that it takes."""
    longest = {dim: size for leaf, array in zip(functions.leaves, examples, strict=True)
               for dim, size in zip(leaf.shape, array.shape, strict=True) if isinstance(dim, str)}
    short = {dim: min(_cut(ladders.axes[dim]), size) if dim in ladders.axes else size for dim, size in longest.items()}
    alone, padded = tuple(sorted(short.items())), ladders.padded(short)
    if alone == padded:
        return
    lone, key = (FunctionKey(ladders.axes[BATCH][0], sizes) for sizes in (alone, padded))
    arrays = [_some(array)[tuple(slice(short.get(dim) if isinstance(dim, str) else dim) for dim in leaf.shape)]
              for leaf, array in zip(functions.leaves, examples, strict=True)]
    try:
        expected = _run(functions, functions.lower(lone).compile(), params, lone, arrays)
        found = _run(functions, functions.prepare(key)[0].result(), params, key, arrays)
    except Exception:
        return  # the function has a least size that only its author knows
    for name, own, other in zip(functions.names, expected, found, strict=True):
        other = other[tuple(map(slice, own.shape))]
        if not _close(own, other):
            raise InvalidOption(
                f"{f'output {name}'.rstrip()} changes if a request of {dict(alone)} is padded to {dict(padded)}: mask "
                f"the padding in the function, give a `pad` that does not count, or ladders={{{alone[0][0]!r}: None}}, "
                "which pads nothing and compiles every size")


def _cut(rungs: tuple[int, ...]) -> int:
    """The size that is padded most on the way to the second rung, or to the only one."""
    first = rungs[0]
    return first + 1 if len(rungs) > 1 else -(-first // 2)


def _some(array: np.ndarray) -> np.ndarray:
    """The example itself; if it is all zero, which padding may be as well, something else."""
    if np.any(array) or array.dtype.kind in "biu":
        return array if np.any(array) else np.ones_like(array)
    return np.random.default_rng(0).uniform(0.5, 1.5, array.shape).astype(array.dtype)


def _run(functions: Functions, program: Callable, params: Any, key: FunctionKey, arrays: list[np.ndarray]
         ) -> list[np.ndarray]:
    """The outputs for a batch of one request again and again."""
    batch = []
    for leaf, array in zip(functions.leaves, arrays, strict=True):
        buffer = np.empty(leaf.sized(key.rows, dict(key.sizes)), leaf.dtype)
        moved = np.moveaxis(buffer, leaf.batch, 0)
        for row in range(len(moved)):
            write(moved[row, ...], array, leaf.pad)
        batch.append(buffer)
    args, kwargs = jax.tree.unflatten(functions.structure, batch)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(program(params, *args, **kwargs))]


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    if one.shape != other.shape:
        return False
    if not jnp.issubdtype(one.dtype, jnp.inexact):
        return np.array_equal(one, other)
    share = TIGHT if jnp.finfo(one.dtype).bits >= 32 else LOOSE
    one, other = (x.astype(np.promote_types(np.float32, x.dtype) if x.dtype.kind != "V" else np.float32)
                  for x in (one, other))
    scale = np.abs(one[np.isfinite(one)]).max(initial=0)
    return np.allclose(one, other, rtol=share, atol=share * float(scale), equal_nan=True)
