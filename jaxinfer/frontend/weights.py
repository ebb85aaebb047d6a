"""A checkpoint's tensors become a Graph's params: all of them checked first, then each read once, leaf by leaf."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.alignment import aligned
from jaxinfer.errors import CheckpointMismatch
from jaxinfer.events import Progress, emit
from jaxinfer.frontend.files import Tensor, as_matrix
from jaxinfer.frontend.saved import Saved, path_name
from jaxinfer.frontend.unread import Part, Rounded, Unread
from jaxinfer.graph import Encoder, Graph, Leaf, Params
from jaxinfer.kernels.quantised import blank, format_of

Timed = Callable[[str, float, float, int], None]
READERS = 8  # threads: an H200's disk gives 2.2 GB/s to 8 or more, its page cache 33 to 39
LARGE = 1 << 28  # bytes: a weight of more comes first, since whoever reads it is at it longest


@dataclass(frozen=True)
class Wanted:
    """An array of params, as a checkpoint has it: by its leaf's names; it may be cast to `dtype`, unless it must be
    stored `as_it_is` (a quantised weight's parts)."""

    leaf: Leaf
    dtype: np.dtype
    as_it_is: bool = False


@dataclass(frozen=True)
class Weight:
    """A leaf's array, or its quantised ones, unread; and the names of its tensors."""

    leaf: Leaf
    unread: Any
    names: tuple[str, ...]


class Memory(threading.local):
    """Memory of a thread's own, for one array at a time: `least` bytes, or those of a larger array. `lock` is called on
    it, which may take long and keep others waiting, so that it should seldom be new."""

    def __init__(self, least: int, lock: Callable[[np.ndarray], Any]):
        self.held, self.least, self.lock = np.empty(0, np.uint8), least, lock

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        size = math.prod(shape) * dtype.itemsize
        if self.held.nbytes < size:
            self.held = aligned((max(size, self.least),), np.dtype(np.uint8))
            self.lock(self.held)
        return self.held[:size].view(dtype).reshape(shape)


class Looked:
    """An unread array that tells when it was read; into `memory`, if it is given and the array is taken as it lies."""

    def __init__(self, unread: Any, timed: Timed, memory: Memory | None):
        self.unread, self.shape, self.dtype, self.timed = unread, unread.shape, unread.dtype, timed
        self.memory = memory
        self.read_at = time.perf_counter()

    def __getitem__(self, index: Any) -> np.ndarray:
        began, array = time.perf_counter(), None
        if self.memory is not None and index is ...:
            array = self.unread.as_stored(self.memory.array)
        array = self.unread[index] if array is None else array
        self.read_at = time.perf_counter()
        self.timed("weights read", began, self.read_at, array.nbytes)
        return array


def load_params(graph: Graph | Encoder, tensors: Mapping[str, Tensor], *, dtype: Any, source: str,
                put: Callable[[Leaf, Any], Any] = lambda _, x: jax.device_put(x[...]),
                quantize: str | None = None, saved: Saved | None = None, timed: Timed = lambda *_: None,
                copies: bool = False, again: Callable[[np.ndarray], Any] | None = None) -> Params:
    """The params of `graph`, in the shape of its spec, from `tensors` by their names in the checkpoint, or by what we
    `saved` them under.

    Leaves are cast to `dtype`, exact ones to float32; `put(leaf, x)` brings each to its device, or devices, where `x`
    is read as it is cut (`Unread`): every byte once, and for a mesh only what this process's devices hold. At most one
    leaf per reading thread is held besides what `put` keeps. Emits Progress("load", source, bytes, bytes), and calls
    `timed` in the thread that read a leaf with what was done ("weights read", "weights transferred"), from when to
    when, and for how many bytes. With `quantize`, leaves for which its scheme names a format become `Quantised`, some
    rows at a time: such a weight is never held as floats.

    With `copies`, `put` is known to copy (to a GPU, say): then eight threads read, and nothing of a file is mapped.
    With `again`, it has done so when what it returns is ready: each thread then has memory that it uses again, on
    which `again` is called when it is new.

    Raises CheckpointMismatch that lists all missing, surplus and misshapen tensors, before anything is read; and for
    numbers that cannot be quantised, when they are. CorruptFile if a file changes or ends while it is read.
    """
    weights, tree = _open(graph, tensors, dtype, source, quantize, saved, copies)
    params: list[Any] = [None] * len(weights)
    sizes = [sum(tensors[name].nbytes for name in weight.names) for weight in weights]
    place = {name: i for i, name in enumerate(tensors)}  # a file's tensors come in its order
    in_order = sorted(range(len(weights)), key=lambda i: (sizes[i] <= LARGE, place[weights[i].names[0]]))
    mine = again and Memory(max((size for size in sizes if size <= LARGE), default=0), again)
    done, total = 0, sum(sizes)

    def read(weight: Weight) -> Any:
        memory = mine if isinstance(weight.unread, Unread) else None
        parts = jax.tree.map(lambda x: Looked(x, timed, memory), weight.unread)
        placed = jax.block_until_ready(jax.tree.map(partial(put, weight.leaf), parts))
        for part in jax.tree.leaves(weight.unread):
            if isinstance(part, Part):
                part.weight.forget()
        since = max(part.read_at for part in jax.tree.leaves(parts))
        timed("weights transferred", since, time.perf_counter(), sum(x.nbytes for x in jax.tree.leaves(placed)))
        return placed

    with ThreadPoolExecutor(READERS if copies else min(8, os.cpu_count() or 1), "load") as pool:
        futures = {pool.submit(read, weights[i]): i for i in in_order}
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


def open_params(graph: Graph | Encoder, tensors: Mapping[str, Tensor], *, dtype: Any, source: str,
                quantize: str | None = None, saved: Saved | None = None) -> Params:
    """What `load_params` would read, unread: params whose arrays are `Unread`, or parts of a weight that is
    quantised while it is read. Raises CheckpointMismatch."""
    weights, tree = _open(graph, tensors, dtype, source, quantize, saved)
    return jax.tree.unflatten(tree, [weight.unread for weight in weights])


def _open(graph: Graph | Encoder, tensors: Mapping[str, Tensor], dtype: Any, source: str, quantize: str | None,
          saved: Saved | None, copies: bool = False) -> tuple[list[Weight], Any]:
    leaves, tree = jax.tree.flatten(graph.spec)
    number = lambda leaf: np.dtype(jnp.float32 if leaf.exact else dtype)
    if saved is None:
        wanted = [Wanted(leaf, number(leaf)) for leaf in leaves]
    else:
        wanted = [_as_saved(path_name(path), leaf, number(leaf), saved.quantize)
                  for path, leaf in jax.tree.leaves_with_path(graph.spec)]
    names = iter(_matched(graph, jax.tree.leaves(wanted), tensors, source))
    weights = []
    for leaf, array in zip(leaves, wanted, strict=True):
        arrays, shape = jax.tree.flatten(array)
        mine = [next(names) for _ in arrays]
        unread = [Unread(one.leaf.shape, one.dtype, tuple(as_matrix(tensors[name]) for name in each),
                         one.leaf.transpose, copies) for one, each in zip(arrays, mine, strict=True)]
        format = format_of(leaf, quantize)
        if format is None or len(arrays) > 1:
            made = jax.tree.unflatten(shape, unread)
        else:
            made = Rounded(unread[0], format, number(leaf), source, _joined(mine[0])).parts()
        weights.append(Weight(leaf, made, tuple(name for each in mine for name in each)))
    return weights, tree


def _as_saved(name: str, leaf: Leaf, dtype: np.dtype, quantize: str | None) -> Any:
    """What is wanted of a checkpoint that has the leaf's arrays as the engine holds them."""
    format = format_of(leaf, quantize)
    if format is None:
        return Wanted(Leaf(leaf.shape, leaf.axes, name), dtype)
    parts = blank(format, leaf.shape, dtype)
    return jax.tree_util.tree_map_with_path(
        lambda path, part: Wanted(Leaf(part.shape, leaf.axes[: len(part.shape)], f"{name}.{path_name(path)}"),
                                  part.dtype, as_it_is=True), parts)


def _matched(graph: Graph | Encoder, arrays: list[Wanted], tensors: Mapping[str, Tensor], source: str
             ) -> list[tuple[str, ...]]:
    """The names of each array's tensors. Raises CheckpointMismatch."""
    parts, problems, leaves = [], [], [array.leaf for array in arrays]
    for array, leaf in zip(arrays, leaves, strict=True):
        names = next((names for names in leaf.alternatives if all(name in tensors for name in names)), None)
        parts.append(names or ())
        if names is None:
            problems.append(f"missing: {_wanted(leaf, tensors)}")
        elif problem := _misfit(array, names, tensors):
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


def _misfit(array: Wanted, names: tuple[str, ...], tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the shapes or the dtypes of an array's tensors, if anything."""
    leaf, shapes = array.leaf, [tuple(tensors[name].shape) for name in names]
    expected = _stored(leaf, tensors[names[0]])
    for name in names:
        if array.as_it_is and tensors[name].dtype != array.dtype:
            return f"wrong dtype: {name} holds {tensors[name].dtype}, expected {array.dtype}"
        if not array.as_it_is and not jnp.issubdtype(tensors[name].dtype, jnp.floating):
            return f"wrong dtype: {name} holds {tensors[name].dtype}, expected floating-point numbers"
    axis = 1 if leaf.transpose else 0  # of the file's tensors, the one along which they are concatenated
    fits = all(len(shape) == len(expected) for shape in shapes) and all(
        sum(shape[d] for shape in shapes) == size if d == axis else all(shape[d] == size for shape in shapes)
        for d, size in enumerate(expected))
    return None if fits else f"wrong shape: {_joined(names)} has {_joined(shapes)}, expected {expected}"
