"""A checkpoint's tensors become a Graph's params: all of them checked first, then each read once, leaf by leaf."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer.errors import CheckpointMismatch
from jaxinfer.events import Progress, emit
from jaxinfer.frontend.files import Tensor, forget
from jaxinfer.graph import Encoder, Graph, Leaf, Params
from jaxinfer.kernels.quantised import Format, Quantised, blank, fill, finite, format_of, rows_at_once

CHUNK = 1 << 16  # numbers rounded at a time: their temporaries stay in the cache


def load_params(graph: Graph | Encoder, tensors: Mapping[str, Tensor], *, dtype: Any, source: str,
                put: Callable[[Leaf, np.ndarray], Any] = lambda _, array: jax.device_put(array),
                quantize: str | None = None, keep: bool = True) -> Params:
    """The params of `graph`, in the shape of its spec, from `tensors` by their names in the checkpoint.

    Leaves are cast to `dtype`, exact ones to float32; `put(leaf, array)` brings each to its device, or devices. A
    tensor that needs no change is handed over as it is mapped (on the CPU, where its address is a multiple of 64,
    params alias the file). At most one leaf per reading thread is held besides what `put` keeps. Emits
    Progress("load", source, bytes, bytes). With `quantize`, leaves for which its scheme names a format become
    `Quantised`, some rows at a time: such a weight is never held as floats. Unless `keep`, what has been read leaves
    the process's memory: its pages of a mapped file are given back.

    Raises CheckpointMismatch that lists all missing, surplus and misshapen tensors, before anything is read; and for
    numbers that cannot be quantised, when they are.
    """
    leaves, tree = jax.tree.flatten(graph.spec)
    parts = _matched(graph, leaves, tensors, source)
    sizes = [sum(tensors[name].nbytes for name in names) for names in parts]
    params: list[Any] = [None] * len(leaves)
    done, total = 0, sum(sizes)

    def read(leaf: Leaf, names: tuple[str, ...]) -> Any:
        found, number = [tensors[name] for name in names], np.dtype(jnp.float32 if leaf.exact else dtype)
        format = format_of(leaf, quantize)
        weight = assemble(leaf, found, number) if format is None else assemble_quantised(leaf, found, number, format)
        if isinstance(weight, Quantised) and not finite(weight):
            raise CheckpointMismatch(source, [f"not finite: {' + '.join(names)} holds NaN, or numbers too large for "
                                              f"{weight.format}; it cannot be quantised"])
        placed = jax.block_until_ready(jax.tree.map(partial(put, leaf), weight))
        for tensor in () if keep else found:
            forget(tensor)
        return placed

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), "load") as pool:
        futures = {pool.submit(read, leaf, names): i for i, (leaf, names) in enumerate(zip(leaves, parts, strict=True))}
        try:
            for future in as_completed(futures):
                i = futures[future]
                params[i] = future.result()
                done += sizes[i]
                emit(Progress("load", source, done, total))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return jax.tree.unflatten(tree, params)


def _matched(graph: Graph | Encoder, leaves: list[Leaf], tensors: Mapping[str, Tensor], source: str
             ) -> list[tuple[str, ...]]:
    """The names of each leaf's tensors. Raises CheckpointMismatch."""
    parts, problems = [], []
    for leaf in leaves:
        names = next((names for names in leaf.alternatives if all(name in tensors for name in names)), None)
        parts.append(names or ())
        if names is None:
            problems.append(f"missing: {_wanted(leaf, tensors)}")
        elif problem := _misfit(leaf, names, tensors):
            problems.append(problem)
    used = {name for names in parts for name in names}
    wanted = {name for leaf in leaves for names in leaf.alternatives for name in names}
    for name in tensors.keys() - used:
        ignored = any(fnmatchcase(name, pattern) for pattern in graph.ignore)
        if not ignored and not (problems and name in wanted):  # half of a leaf that is missing its other half
            shape = tuple(tensors[name].shape)
            problems.append(f"surplus: {name} with shape {shape} belongs to no weight of this model")
    if problems:
        raise CheckpointMismatch(source, sorted(problems))
    return parts


def _wanted(leaf: Leaf, tensors: Mapping[str, Tensor]) -> str:
    """What a missing leaf was looked for under, and which parts of it are absent."""
    absent = [_joined([name for name in names if name not in tensors]) for names in leaf.alternatives]
    shape = leaf.shape[::-1] if leaf.transpose else leaf.shape
    whole = f"part of a weight of shape {shape}" if len(leaf.alternatives[0]) > 1 else f"shape {shape}"
    return " (or ".join(absent) + ")" * (len(absent) - 1) + f", {whole}"


def _joined(parts: Sequence[Any]) -> str:
    """A leaf's parts as its name says them; of the many tensors of a layer's experts, the first and the last."""
    shown = parts if len(parts) <= 4 else (parts[0], "...", f"{parts[-1]} ({len(parts)} in all)")
    return " + ".join(map(str, shown))


def _stored(leaf: Leaf, tensor: Tensor) -> tuple[int, ...]:
    """The shape that a leaf's tensors have together, if they are like this one."""
    if len(leaf.shape) == 3 and len(tensor.shape) == 2:
        return leaf.shape[0] * leaf.shape[1], leaf.shape[2]
    return leaf.shape[::-1] if leaf.transpose else leaf.shape


def _misfit(leaf: Leaf, names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the shapes or the dtypes of a leaf's tensors, if anything."""
    shapes = [tuple(tensors[name].shape) for name in names]
    expected = _stored(leaf, tensors[names[0]])
    for name in names:
        if not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            return f"wrong dtype: {name} holds {tensors[name].dtype}, expected floating-point numbers"
    axis = 1 if leaf.transpose else 0  # of the file's tensors, the one along which they are concatenated
    fits = all(len(shape) == len(expected) for shape in shapes) and all(
        sum(shape[d] for shape in shapes) == size if d == axis else all(shape[d] == size for shape in shapes)
        for d, size in enumerate(expected))
    return None if fits else f"wrong shape: {_joined(names)} has {_joined(shapes)}, expected {expected}"


def assemble(leaf: Leaf, tensors: list[Tensor], dtype: np.dtype) -> np.ndarray:
    """A leaf's array from its tensors: read, transposed, concatenated, cast.

    What changes is written once, into memory aligned so that the CPU's `device_put` takes it over without a copy.
    """
    if len(tensors) == 1 and not leaf.transpose and tensors[0].dtype == dtype:
        return tensors[0].read().reshape(leaf.shape)
    out, row = aligned(leaf.shape, dtype), 0
    rows = out.reshape(-1, *leaf.shape[2:]) if len(tensors[0].shape) < len(leaf.shape) else out
    for tensor in tensors:
        array = tensor.read()
        array = array.T if leaf.transpose else array
        cast_into(rows[row : row + len(array)], array)
        row += len(array)
    return out


def assemble_quantised(leaf: Leaf, tensors: list[Tensor], dtype: np.dtype, format: Format) -> Quantised:
    """A leaf's quantised weight from its tensors, read and rounded some rows at a time (a transposed one of a block
    format is read whole)."""
    out, row, step = blank(format, leaf.shape, dtype, aligned), 0, rows_at_once(leaf.shape)
    for tensor in tensors:
        turned = tensor.read().T if leaf.transpose else None
        count = tensor.shape[1 if leaf.transpose else 0]
        for start in range(0, count, step):
            stop = min(start + step, count)
            fill(out, row + start, tensor.rows(start, stop) if turned is None else turned[start:stop])
        row += count
    return out


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array whose address is a multiple of 64."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def cast_into(out: np.ndarray, array: np.ndarray) -> None:
    """Write `array` over `out`, in out's dtype. float32 to bfloat16 on raw bits is twice as fast as ml_dtypes' own
    cast on one thread and, since numpy lets go of the lock, four times on two (3.3 and 4.4 GB/s of float32)."""
    if out.dtype != ml_dtypes.bfloat16 or array.dtype != np.float32:
        out[...] = array
        return
    step = max(1, CHUNK // max(1, math.prod(array.shape[1:])))
    for i in range(0, len(array), step):
        bits = np.ascontiguousarray(array[i : i + step]).view(np.uint32)
        if ((bits & 0x7FFFFFFF) > 0x7F800000).any():  # rounding could carry a NaN into an infinity
            out[i : i + step] = array[i : i + step]
            continue
        half = bits >> 16
        half &= 1  # to nearest, ties to even
        half += 0x7FFF
        half += bits
        half >>= 16
        out[i : i + step].view(np.uint16)[...] = half
