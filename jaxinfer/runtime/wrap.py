"""`jaxinfer.endpoint`: what a user says of a function becomes an Endpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxinfer import compiler
from jaxinfer.compiler.buckets import MOST_BUCKETS, powers
from jaxinfer.compiler.functions import Functions, LeafLike
from jaxinfer.errors import InvalidOption
from jaxinfer.frontend.modules import as_function
from jaxinfer.runtime import memory as planning
from jaxinfer.runtime.devices import find_device
from jaxinfer.runtime.door import Door
from jaxinfer.runtime.endpoint import Endpoint
from jaxinfer.runtime.inert import check_inert
from jaxinfer.runtime.padded import BATCH, Ladders, NanPolicy
from jaxinfer.runtime.versions import own

OWN = ("priority", "queue_timeout", "timeout")  # names of a call's options


def endpoint(fn: Any, params: Any = None, *, example: Any, axis: int | Mapping[str, int] | None = 0,
             out_axis: int = 0, ragged: Mapping[str, Mapping[int, str]] | None = None,
             ladders: Mapping[str, Sequence[int]] | None = None, pad: Mapping[str, Any] | None = None,
             max_batch: int = 64, max_delay: float = 0.002, max_waiting: int = 4096, nan: NanPolicy = "pass",
             memory: int | str | None = None, device: str | jax.Device | None = None, name: str | None = None
             ) -> Endpoint:
    """Serve a pure function: requests are queued, batched, padded to a ladder of shapes, and each caller gets its own.

    `fn(params, *arguments)`, or `fn(*arguments)` without params; or a Flax module: NNX as it is, Linen with its
    variables as `params`. Arguments and results are pytrees of arrays, and all results have the batch axis.
    `example`: one request, without the batch axis: a dict of named arguments, a tuple of arguments, or the only one.
    `axis`: where the function wants the batch, in all arrays or by path; `out_axis`: where it puts it. None: the
    function takes one request alone, and is vmapped.
    `ragged`: axes that differ from request to request, by array and named: {"ids": {0: "length"}}. They are padded
    with `pad[path]` (0), to a rung of `ladders[name]`; results are cut to what the function gives for the true size,
    for which it is traced once, in the thread of the first who asks with it.
    That padding changes nothing else is for the function to see to, by a mask or by `pad`: the example is tried.
    `ladders`: rungs by axis, "B" for the batch: by default powers of two, to `max_batch` and to the example's size (of
    four, of eight, ... where two would make more than sixteen Executables). None for an axis: it is not padded, and
    every size of it is compiled as it comes (the 128 programs used last are kept).
    `max_delay`: seconds that the oldest request waits for company while the device is busy (an idle one takes what
    there is). `max_waiting`: requests that may wait; one more is Rejected.
    `memory`: bytes, or a text such as "1GiB", that the weights and the largest batch may take: `warmup`, and so a
    registry's `load`, raises OutOfMemory otherwise.
    `nan`: "pass", "flag" (a `Reply` names the arrays) or "reject" requests and results with NaN in them.

    Raises InvalidOption where what is said contradicts itself or the function, or where padding changes a result.

    >>> double = endpoint(lambda x: 2 * x, example=np.zeros(3, np.float32), max_batch=4)
    >>> double([1, 2, 3]).tolist()
    [2.0, 4.0, 6.0]
    >>> double.close()
    """
    compiler.enable()
    place = find_device(device)
    call, params = as_function(fn, params)
    names, arguments = _arguments(example)
    leaves, structure = _leaves(arguments, axis, ragged or {}, pad or {})
    rungs = _ladders(leaves, arguments, ladders or {}, _count("max_batch", max_batch))
    _count("max_waiting", max_waiting)
    if not isinstance(max_delay, int | float) or not 0 <= max_delay < 3600:
        raise InvalidOption(f"max_delay is {max_delay!r}; it must be seconds, 0 to 3600")
    if type(out_axis) is not int or out_axis < 0:
        raise InvalidOption(f"out_axis is {out_axis!r}; it must be an integer >= 0")
    if nan not in ("pass", "flag", "reject"):
        raise InvalidOption(f"nan is {nan!r}; it must be 'pass', 'flag' or 'reject'")
    if axis is None:
        call = _vmapped(call, out_axis)
    params = own(params, place)
    functions = Functions(call, params, leaves, structure, out_axis, place)
    try:
        smallest = tuple((dim, rungs.axes[dim][0] if dim in rungs.axes else size)
                         for dim, size in sorted(_sizes(leaves, arguments).items()))
        functions.check(smallest, rungs.axes[BATCH])
        if smallest:
            check_inert(functions, params, rungs, [np.asarray(x, leaf.dtype) for x, leaf in
                                                   zip(jax.tree.leaves(arguments), leaves, strict=True)])
        door = Door(leaves, structure, names, {name: rungs.axes[name][-1] for name in rungs.axes})
        budget = None if memory is None else planning.parse_bytes(memory)
        return Endpoint(functions, params, door, rungs, max_delay=max_delay, max_waiting=max_waiting, nan=nan,
                        memory=budget, name=name or getattr(fn, "__name__", type(fn).__name__))
    except BaseException:
        functions.close()
        raise


def _count(name: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 2**20:
        raise InvalidOption(f"{name} is {value!r}; it must be an integer from 1 to {2**20}")
    return value


def _arguments(example: Any) -> tuple[tuple[str, ...], tuple[tuple, dict[str, Any]]]:
    """The arguments' names, if they have some, and (args, kwargs)."""
    if not isinstance(example, dict):
        return (), (example if type(example) is tuple else (example,), {})
    if not example or not all(isinstance(name, str) and name.isidentifier() for name in example):
        raise InvalidOption(f"example is a dict with the keys {list(example)}; they must be names of the function's "
                            "arguments. For a function of one dict, give a tuple: (dict,)")
    if taken := sorted(set(example) & set(OWN)):
        raise InvalidOption(f"arguments cannot be called {', '.join(taken)}: that is what a call's options are called")
    return tuple(example), ((), dict(example))


def _leaves(arguments: Any, axis: int | Mapping[str, int] | None, ragged: Mapping[str, Mapping[int, str]],
            pad: Mapping[str, Any]) -> tuple[tuple[LeafLike, ...], Any]:
    """What each array of a request looks like, and the arguments' structure."""
    found, structure = jax.tree.flatten_with_path(arguments)
    paths = [jax.tree_util.keystr(path[1:], simple=True, separator=".") for path, _ in found]  # 1: args or kwargs
    if not found:
        raise InvalidOption("example has no array in it")
    for option, given in (("ragged", ragged), ("pad", pad), ("axis", axis if isinstance(axis, Mapping) else {})):
        if unknown := sorted(set(given) - set(paths)):
            raise InvalidOption(f"{option} names {unknown}; the example's arrays are {paths}")
    leaves = []
    for path, (_, value) in zip(paths, found, strict=True):
        array = np.asarray(value)
        dtype = jax.dtypes.canonicalize_dtype(array.dtype) if array.dtype.kind in "biufcV" else None
        if dtype is None:
            raise InvalidOption(f"example's {path} is a {type(value).__name__}; it must be an array of numbers")
        batch = axis.get(path, 0) if isinstance(axis, Mapping) else axis or 0
        if type(batch) is not int or not 0 <= batch <= array.ndim:
            raise InvalidOption(f"axis of {path} is {batch!r}; it must be 0 to {array.ndim}")
        leaves.append(LeafLike(path, _shape(path, array, ragged.get(path, {})), dtype,
                               _pad(path, pad.get(path, 0), dtype), batch))
    return tuple(leaves), structure


def _pad(path: str, value: Any, dtype: np.dtype) -> np.ndarray:
    try:
        with np.errstate(all="ignore"):
            pad = np.asarray(value).astype(dtype)
    except (ValueError, TypeError):
        pad = None
    if pad is None or pad.ndim or (dtype.kind in "biu" and pad != value):
        raise InvalidOption(f"pad of {path} is {value!r}; it must be a number that {dtype} can hold")
    return pad


def _shape(path: str, array: np.ndarray, ragged: Mapping[int, str]) -> tuple[int | str, ...]:
    shape: list[int | str] = list(array.shape)
    for at, name in ragged.items():
        if type(at) is not int or not 0 <= at < array.ndim or not isinstance(name, str) or name in ("", BATCH):
            raise InvalidOption(f"ragged says {{{at!r}: {name!r}}} of {path}, which is {array.dtype}"
                                f"{list(array.shape)}; it must map axes of it to names, of which {BATCH!r} is taken")
        shape[at] = name
    return tuple(shape)


def _sizes(leaves: Sequence[LeafLike], arguments: Any) -> dict[str, int]:
    """The example's own size of each named axis."""
    return {dim: size for leaf, value in zip(leaves, jax.tree.leaves(arguments), strict=True)
            for dim, size in zip(leaf.shape, np.shape(value), strict=True) if isinstance(dim, str)}


def _ladders(leaves: Sequence[LeafLike], arguments: Any, given: Mapping[str, Sequence[int] | None], max_batch: int
             ) -> Ladders:
    """The given ladders; for the other axes powers of two, of four, ...: as fine as sixteen Executables allow."""
    sizes = _sizes(leaves, arguments)
    least = {BATCH: 1} | {name: min(16, size) for name, size in sizes.items()}
    most = {BATCH: max_batch} | sizes
    if unknown := sorted(set(given) - set(most)):
        raise InvalidOption(f"ladders names {unknown}; the axes are {sorted(most)}")
    for name, rungs in given.items():
        if rungs is None and name != BATCH:
            continue
        if (not isinstance(rungs, Sequence) or not rungs or not all(type(r) is int and r > 0 for r in rungs)
                or list(rungs) != sorted(set(rungs))):
            raise InvalidOption(f"the ladder of {name!r} is {rungs!r}; it must be rising sizes, such as (1, 8, 64)")
    factor, axes = 1, {}
    while factor == 1 or (math.prod(map(len, axes.values())) > MOST_BUCKETS and factor < max(most.values())):
        factor *= 2
        axes = {name: powers(size, least=least[name], factor=factor) for name, size in most.items()}
        axes |= {name: tuple(rungs) for name, rungs in given.items() if rungs is not None}
        axes = {name: rungs for name, rungs in axes.items() if name not in given or given[name] is not None}
    return Ladders(axes)


def _vmapped(call: Callable, out_axis: int) -> Callable:
    def batched(params, *args, **kwargs):
        return jax.vmap(lambda args, kwargs: call(params, *args, **kwargs), out_axes=out_axis)(args, kwargs)
    return batched
