"""A pure function on pytrees -> programs: what a request looks like, and one Executable per padded shape.

Axes: B requests of a batch; further ragged axes have names of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxinfer.compiler.programs import Programs
from jaxinfer.errors import InvalidOption

Dim = int | str  # a size, or the name of an axis whose size each request brings


@dataclass(frozen=True)
class LeafLike:
    """One array of a request, without the batch axis: its path in the pytree, its shape, dtype and padding. `batch` is
    the axis at which the function wants the batch."""

    path: str
    shape: tuple[Dim, ...]
    dtype: np.dtype
    pad: Any = 0
    batch: int = 0

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"

    def sized(self, rows: int | None, sizes: dict[str, int]) -> tuple[int, ...]:
        """Its shape in a batch of `rows` (None: of one request alone), each named axis as long as `sizes` says."""
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in self.shape]
        return tuple(shape if rows is None else (*shape[: self.batch], rows, *shape[self.batch:]))


class FunctionKey(NamedTuple):
    """Which program: the rows it is padded to (None: the function takes one request), and the size of each named
    axis."""

    rows: int | None
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        named = self.sizes if self.rows is None else (("B", self.rows), *self.sizes)
        return f"apply[{','.join(f'{name}={size}' for name, size in named)}]"


class Functions(Programs):
    """The programs of `call(params, *args, **kwargs)` on one device, where the arguments are the pytree `structure` of
    `leaves`. In every output the requests of a batch lie along the axis `out_batch`."""

    def __init__(self, call: Callable, params: Any, leaves: tuple[LeafLike, ...], structure: Any, out_batch: int,
                 device: jax.Device):
        super().__init__(device, name=getattr(call, "__name__", type(call).__name__))
        self.call, self.leaves, self.structure, self.out_batch = call, leaves, structure, out_batch
        self.params = jax.tree.map(self._like, params)
        self.names: list[str] = []  # the outputs' paths
        self.checked: FunctionKey | None = None  # a shape that the function is known to take
        self.output_shapes = lru_cache(4096)(lambda key: [leaf.shape for leaf in jax.tree.leaves(self.outputs(key))])

    def traced(self, key: FunctionKey) -> Any:
        return self.call, self.params, self.leaves, self.structure

    def lower(self, key: FunctionKey) -> jax.stages.Lowered:
        args, kwargs = self._arguments(key)
        return jax.jit(self.call).lower(self.params, *args, **kwargs)

    def why(self, key: FunctionKey) -> str:
        """Which arrays have another shape in a batch of `key` than in all that are compiled."""
        shape = lambda leaf, key: leaf.sized(key.rows, dict(key.sizes))
        known = tuple(self._pending)
        new = [leaf for leaf in self.leaves if all(shape(leaf, other) != shape(leaf, key) for other in known)]
        told = ", ".join(f"{leaf.path} {list(shape(leaf, key))}" for leaf in new or self.leaves)
        return f"{told} came for the first time{'' if new else ' together'}"

    def outputs(self, key: FunctionKey) -> Any:
        """What the function returns for a batch of this shape: a pytree of shapes and dtypes."""
        args, kwargs = self._arguments(key)
        return jax.eval_shape(self.call, self.params, *args, **kwargs)

    def _arguments(self, key: FunctionKey) -> Any:
        sizes = dict(key.sizes)
        arrays = [self._array(*leaf.sized(key.rows, sizes), dtype=leaf.dtype) for leaf in self.leaves]
        return jax.tree.unflatten(self.structure, arrays)

    def check(self, sizes: tuple[tuple[str, int], ...], rungs: tuple[int, ...] | None) -> None:
        """Raises InvalidOption if the function cannot be traced, returns no array, or if an output has no batch axis
        where one is promised. `rungs` are the batch's (None: the function takes one request): between the last two an
        output differs in that axis alone. A function for one rung may refuse any other size."""
        rows = rungs[-1] if rungs else None
        found = jax.tree.leaves_with_path(self._traced(FunctionKey(rows, sizes)))
        self.checked = FunctionKey(rows, sizes)
        self.names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]
        if not found:
            raise InvalidOption("the function returns no array; it must return one at least")
        if rungs is None or rows is None:
            return
        fewer = rungs[-2] if len(rungs) > 1 else rows + 1
        try:
            others = jax.tree.leaves(self._traced(FunctionKey(fewer, sizes)))
        except InvalidOption:
            if len(rungs) > 1:
                raise
            others, fewer = [leaf for _, leaf in found], rows
        for (path, leaf), other in zip(found, others, strict=True):
            self._check_batch(jax.tree_util.keystr(path) or "the output", (leaf.shape, rows), (other.shape, fewer))

    def _traced(self, key: FunctionKey) -> Any:
        try:
            return self.outputs(key)
        except Exception as error:
            asked = ", ".join(f"{leaf.path}: {leaf}" for leaf in self.leaves)
            raise InvalidOption(f"the function cannot be traced for a batch of {{{asked}}}: {type(error).__name__}: "
                                f"{error}") from error

    def _check_batch(self, name: str, *shapes: tuple[tuple[int, ...], int]) -> None:
        at, (first, _) = self.out_batch, shapes[0]
        wanted = lambda rows: (*first[:at], rows, *first[at + 1:])
        if not all(at < len(shape) and shape == wanted(rows) for shape, rows in shapes):
            told = " and ".join(f"{list(shape)} for a batch of {rows}" for shape, rows in dict.fromkeys(shapes))
            raise InvalidOption(
                f"{name} has shape {told}: every output must have the batch as its axis {at}, so that each caller can "
                "be given its own. Return one result for each request, name the axis with out_axis, or pass axis=None "
                "for a function of one request")
